"""Batch-norm statistics of a pruned network, estimated anew where that lowers its loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from types import MappingProxyType

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from cbs_opt.errors import EmptyDataError, NoBatchNormError
from cbs_opt.network.batchnorm import holds_statistics, recalibrate_batchnorm
from cbs_opt.network.data import Data, device_of, iterate
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.state import kept
from cbs_opt.oneshot import Candidate, Sample, Task
from formulations.errors import NonFiniteError

SAMPLES = 4
"""Samples that statistics are estimated on, in multiples of those that networks are compared on."""
SHARES = (0.5, 1.0)
"""How far statistics go from the old ones to the new ones."""
SEED_STEP = 500_009
"""Between the seed of the run and that of the samples."""


def recalibrated(task: Task, best: Candidate, sample: Sample) -> tuple[Candidate, str]:
    """Return the network with the statistics of the lowest loss on `sample`, and a note about them.

    The note is empty where there are none to estimate.
    """
    if not task.recipe.recalibrate or task.data is None or not sample:
        return best, ""
    found, note = fitting(task, best.weights, sample, best.others or {})
    return replace(best, others=found or None), note


def fitting(
    task: Task, weights: Tensor, sample: Sample, others: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[Mapping[str, Tensor], str]:
    """Return `others` with the statistics of the lowest loss on `sample` for `weights`, and a note.

    `others` are tensors by name in the place of the network's own. Compared are the old statistics, of them
    or of the network, the new ones, and those halfway. `others` and an empty note are returned where nothing
    can be estimated.
    """
    data = task.data
    assert data is not None
    own = {name: buffer.detach() for name, buffer in task.model.named_buffers()}
    stay = f"those {'from before fine-tuning' if own.keys() & others.keys() else 'of training'} stay"
    count = SAMPLES * sum(batch.size for batch in sample)
    try:
        new, used = _estimated(task, data, weights, count, others)
    except (NoBatchNormError, EmptyDataError):
        # Nothing to estimate, or a single sample to do it from.
        return others, ""
    except NonFiniteError:
        return others, f"batch-norm statistics of the pruned network overflow: {stay}"
    old = {**own, **others}

    def loss(others: Mapping[str, Tensor]) -> float:
        return evaluate(task.trial(weights, others), sample, task.loss_fn).loss

    before = loss(others)
    moved = [{name: old[name].lerp(value, share) for name, value in new.items()} for share in SHARES]
    tried = [{**others, **statistics} for statistics in moved]
    losses = [loss(entry) for entry in tried]
    after = min(losses)
    found = (
        f"loss on samples set aside {before:.4g}, with batch-norm statistics of {used} samples {after:.4g}"
    )
    if not after < before:
        return others, f"{found}: {stay}"
    return tried[losses.index(after)], f"{found}: taken"


class Comparison:
    """Losses of networks on the samples of a task that are set aside.

    Where `estimated`, each has batch-norm statistics of its own, of as many samples, if there can be any.
    They are estimated once for a tensor of weights, as long as it lives.
    """

    def __init__(self, task: Task, sample: Sample, *, estimated: bool = True) -> None:
        self._task, self._sample, self._estimated = task, sample, estimated
        self._statistics: MutableMapping[Tensor, Mapping[str, Tensor] | None] = WeakIdKeyDictionary()

    def loss(
        self, weights: Tensor, objective: Objective | None = None, sample: Sample | None = None
    ) -> float:
        """Return the loss for `weights` (n,), infinity if their statistics overflow.

        It is that of the task, or `objective` at `sample`, the same samples with the labels of that.
        """
        if weights not in self._statistics:
            self._statistics[weights] = self._found(weights) if self._estimated else {}
        found = self._statistics[weights]
        if found is None:
            return math.inf
        task, known = self._task, self._sample if sample is None else sample
        return evaluate(task.trial(weights, found), known, objective or task.loss_fn).loss

    def _found(self, weights: Tensor) -> Mapping[str, Tensor] | None:
        """Return the statistics of a network; none where there can be none, None if they overflow."""
        data = self._task.data
        assert data is not None
        try:
            return _estimated(self._task, data, weights, sum(batch.size for batch in self._sample))[0]
        except (EmptyDataError, NoBatchNormError):
            return {}
        except NonFiniteError:
            return None


def _estimated(
    task: Task,
    data: Data,
    weights: Tensor,
    samples: int,
    others: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[dict[str, Tensor], int]:
    """Return the statistics by name, and how many samples they are of; the network keeps its own.

    Of `others` parameters stand in the place of the network's own.
    """
    batches = iterate(
        data,
        batch_size=None,
        max_samples=samples,
        seed=task.request.seed + SEED_STEP,
        device=device_of(task.model),
    )
    parameters = {name for name, _ in task.model.named_parameters()}
    network = task.trial(weights, {name: value for name, value in others.items() if name in parameters})
    with kept(task.model):
        used = recalibrate_batchnorm(network, [task.loss_fn.fitted(batch) for batch in batches])
        values = {
            f"{path}.{name}" if path else name: buffer.detach().clone()
            for path, module in task.model.named_modules()
            if holds_statistics(module)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point()
        }
    return values, used
