"""Newton steps of what is left: the move that `prune` makes, for a network that lost groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import gradient_rows, mean_gradient
from cbs_opt.curvature.kinds import EmpiricalFisher, Fisher, SketchedFisher
from cbs_opt.errors import EmptyDataError, NoBatchNormError, NoEligibleWeightsError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.products import column_squares
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.layers.calibration import without_cache
from cbs_opt.layers.divergence import Divergence, DivergenceRecord, move, predictions
from cbs_opt.network.batchnorm import recalibrate_batchnorm
from cbs_opt.network.data import Batch
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.network.trial import TrialNetwork, write_back
from cbs_opt.system.memory import free_memory
from cbs_opt.update.cbs import cbs_updates
from formulations.errors import NonFiniteError

ROWS = 512
"""Gradient rows of a step at most."""
ROW_SAMPLES = 2048
"""Samples that they are made of at most; the gradient is that of all."""
FEWEST_ROWS = 32
"""Rows below which there is no step."""
COPIES = 3
"""Of the rows, that a step holds at most."""
JUDGES = 8
"""One sample of so many is set aside, and says which step is taken."""
DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Dampings that are tried, in multiples of the mean diagonal of the Fisher matrix.

Rows are far fewer than weights: beside the directions that they span, a step is the gradient over the
damping, and convolutions of ResNet20 that are far from rest need the largest ones.
"""
SCALES = (1.0, 0.5)
"""Shares of a step that are tried."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """What the steps did: losses on samples set aside, before and after each that was taken.

    Where batch-norm statistics were estimated anew, `recalibrated`, that is the first of them.
    """

    losses: tuple[float, ...]
    samples: int
    recalibrated: bool = False

    def __str__(self) -> str:
        """Return it in one line."""
        steps = len(self.losses) - 1 - self.recalibrated
        what = "batch-norm statistics and " if self.recalibrated else ""
        found = f"{self.losses[0]:.4g} -> {self.losses[-1]:.4g} on samples set aside"
        return f"{what}{steps} Newton step{'' if steps == 1 else 's'} on {self.samples} samples: loss {found}"


def rows_that_fit(model: nn.Module) -> int:
    """Return how many rows of all weights of a network half of the free memory holds, `ROWS` at most."""
    size = COPIES * 4 * sum(parameter.numel() for parameter in model.parameters())
    return min(ROWS, int(0.5 * free_memory() / max(1, size)))


def refine(
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    *,
    steps: int,
    ignore: Sequence[str] = (),
    rows: int = ROWS,
    seed: int = 0,
) -> Refined | None:
    """Move the weights of a network by damped Newton steps, in place, as long as they gain.

    A step is ``-(R^T R + damping I)^-1 g`` over all weights together: R are Gauss-Newton rows of the loss
    where its form is known, and gradients of samples elsewhere; g is the gradient. Of several dampings and
    lengths that of the lowest loss on samples set aside is taken, none if all are worse than before.

    `ignore` names layers by globs; `rows` is how many rows there are at most. Returns None if there is no
    weight that may move, or one batch alone.
    Time: two passes forward and backward over the samples for each step, and O(rows^2 n).
    """
    globs = [f"{glob}.*" for glob in ignore]
    fixed = [name for name, _ in model.named_parameters() if any(fnmatchcase(name, glob) for glob in globs)]
    try:
        partition = Partition.from_model(model, ignore=fixed, blocks="global")
    except NoEligibleWeightsError:
        return None
    judges, own = list(batches[::JUDGES]), [batch for n, batch in enumerate(batches) if n % JUDGES]
    if not own:
        return None
    samples = sum(batch.size for batch in own)
    weights = partition.flatten(model).double()
    losses = [evaluate(model, judges, objective).loss]
    losses += _recalibrated(model, own, judges, objective, losses[0])
    recalibrated = len(losses) > 1
    for step in range(steps):
        best: Tensor | None = None
        least = losses[-1]
        for moved in _steps(model, partition, own, objective, samples, rows, seed + step):
            loss = evaluate(TrialNetwork(model, partition, moved), judges, objective).loss
            if loss < least:
                best, least = moved, loss
        if best is None:
            break
        weights = best
        losses.append(least)
        write_back(model, partition, weights)
    return Refined(losses=tuple(losses), samples=samples, recalibrated=recalibrated)


def follow(
    dense: nn.Module,
    model: nn.Module,
    batches: Sequence[Batch],
    options: Divergence,
    ignore: Sequence[str] = (),
) -> DivergenceRecord | None:
    """Move the weights of a network in place towards the predictions of the dense one it was cut from.

    By passes of AdamW, see `cbs_opt.layers.divergence`; embeddings, and heads that are tied to them, stay.
    `ignore` names layers by globs. Returns None if there is no weight that may move, or one sample alone.
    """
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    parameters = {
        name: entry
        for name, entry in model.named_parameters()
        if entry.requires_grad
        and id(entry) not in tables
        and not any(fnmatchcase(name.rpartition(".")[0], glob) for glob in ignore)
    }
    if not parameters or sum(batch.size for batch in batches) < 2:
        return None
    aim = predictions(model, dense, batches, options)
    with ExitStack() as stack:
        for network in (dense, model):
            for context in (kept(network), evaluation_mode(network), without_cache(network)):
                stack.enter_context(context)
        return move(aim, parameters, {}, replace(options, stages=1), 0, lambda _: None)


def judged_loss(
    model: nn.Module, own: Sequence[Batch], judges: Sequence[Batch], objective: Objective
) -> float:
    """Return the loss on `judges`, with batch-norm statistics of `own` where they lower it; infinity for NaN.

    The network is not changed.
    """
    trial = deepcopy(model)
    loss = evaluate(trial, judges, objective).loss
    loss = math.inf if math.isnan(loss) else loss
    return min([loss, *_recalibrated(trial, own, judges, objective, loss)])


def _recalibrated(
    model: nn.Module, own: Sequence[Batch], judges: Sequence[Batch], objective: Objective, before: float
) -> list[float]:
    """Estimate batch-norm statistics anew where that gains; return the loss that it leads to, if it does."""
    old = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        recalibrate_batchnorm(model, own)
    except (NoBatchNormError, EmptyDataError, NonFiniteError):
        # Nothing to estimate, a single sample to do it from, or outputs that overflow: the old ones are back.
        return []
    after = evaluate(model, judges, objective).loss
    if after < before:
        return [after]
    for buffer, values in old:
        buffer.copy_(values)
    return []


def _steps(
    model: nn.Module,
    partition: Partition,
    batches: Sequence[Batch],
    objective: Objective,
    samples: int,
    most_rows: int,
    seed: int,
) -> list[Tensor]:
    """Return the weights after each of the steps that are tried, (n,) float64."""
    weights = partition.flatten(model)
    seen = min(samples, ROW_SAMPLES)
    per_row = -(-seen // most_rows)
    kind: Fisher = EmpiricalFisher(samples=seen, per_row=per_row)
    if objective.output_hessian is not None:
        kind = SketchedFisher(samples=seen, per_row=per_row)
    rows = gradient_rows(
        model,
        batches,
        objective,
        partition,
        curvature=kind,
        seed=seed,
        progress=False,
        gradient=False,
    )
    gradient, _ = mean_gradient(model, batches, objective, partition, samples=samples, progress=False)
    with rows:
        data = rows.block(0, partition.n)
        unit = float(column_squares(data).mean())
        block = FisherBlock(
            name="what is left", weights=weights, hessian=RowsHessian(data), gradient=gradient
        )
        keep = torch.ones(partition.n, dtype=torch.bool, device=weights.device)
        targets = cbs_updates(block, keep, [share * unit for share in DAMPINGS])
    start = weights.double()
    return [start + scale * (target - start) for target in targets for scale in SCALES]
