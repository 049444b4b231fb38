"""What `prune` makes of a case: a pruned network, or a refusal."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.parameter import is_lazy

from cbs_opt.pruning import prune
from cbs_opt.report.record import PruneReport
from experiments.any_network import batches, language, layers, running, sequences, vision
from experiments.any_network.case import Case, Trial
from formulations.errors import CbsError

CASES = tuple(
    case for module in (vision, sequences, language, layers, running, batches) for case in module.CASES
)
SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """A case, what it built, its tensors before the run, and the report or the error of `prune`."""

    case: Case
    trial: Trial
    before: dict[str, Tensor]
    result: PruneReport | CbsError


def run(case: Case, sparsity: float = SPARSITY) -> Outcome:
    """Build the case and prune it by the defaults; what is no error of this library is raised."""
    trial = case.trial()
    before = tensors(trial)
    try:
        result: PruneReport | CbsError = prune(trial.model, trial.data, sparsity=sparsity, **trial.options)
    except CbsError as error:
        result = error
    return Outcome(case=case, trial=trial, before=before, result=result)


def tensors(trial: Trial) -> dict[str, Tensor]:
    """Return a copy of every tensor in the state of the trial's network."""
    state = trial.model.state_dict().items()
    known = {name: value for name, value in state if isinstance(value, Tensor) and not is_lazy(value)}
    return {name: value.detach().clone() for name, value in known.items()}
