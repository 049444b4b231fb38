"""The parts of a report: a layer, a block, a step of a run in stages, and the bounds added up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cbs_opt.certify.certificates import relative_gap
from cbs_opt.report.numbers import bound_text, gap_text

MEANING = "bound for the block-diagonal quadratic model of the loss, not for the loss or the accuracy"
"""What the sum of the blocks' bounds is; printed wherever the sum is."""
MOST_BINS = 60
FEWEST_BINS = 12


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts over bins: ``counts[i]`` values lie between ``edges[i]`` and ``edges[i + 1]``."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def shared_histograms(first: Tensor, second: Tensor) -> tuple[Histogram, Histogram]:
    """Return histograms of two tensors over the same equal bins that cover both.

    Twice the square root of the number of values, within limits, gives the number of bins. Values
    that are not finite are left out. O(number of values).
    """
    arrays = [values.detach()[values.isfinite()].double().cpu().numpy() for values in (first, second)]
    joined = np.concatenate(arrays)
    low, high = (float(joined.min()), float(joined.max())) if joined.size else (0.0, 0.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, min(MOST_BINS, max(FEWEST_BINS, 2 * math.isqrt(arrays[0].size))) + 1)
    counts = [tuple(np.histogram(array, edges)[0].tolist()) for array in arrays]
    shared = tuple(edges.tolist())
    return Histogram(edges=shared, counts=counts[0]), Histogram(edges=shared, counts=counts[1])


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One parameter tensor before and after pruning.

    `name`, `shape`, `dtype`: of the parameter. `n`, `n_prune`: number of weights, and of those set to zero.
    `weight_histogram_before` and `weight_histogram_after`: both over the same bins; the second counts kept
    weights only. `axes`: those of the parameter in the order of the blocks, the slowest first; empty for
    that of its memory.
    """

    name: str
    shape: tuple[int, ...]
    n: int
    n_prune: int
    dtype: str = ""
    weight_histogram_before: Histogram | None = None
    weight_histogram_after: Histogram | None = None
    axes: tuple[int, ...] = ()

    @classmethod
    def from_weights(
        cls, name: str, before: Tensor, after: Tensor, keep: Tensor, axes: tuple[int, ...] = ()
    ) -> LayerSummary:
        """Return the summary of a parameter from its values before and after and its boolean `keep`."""
        old, new = shared_histograms(before, after[keep])
        return cls(
            name=name,
            shape=tuple(before.shape),
            n=before.numel(),
            n_prune=int((~keep).sum()),
            dtype=str(before.dtype).removeprefix("torch."),
            weight_histogram_before=old,
            weight_histogram_after=new,
            axes=axes,
        )

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return self.n_prune / self.n if self.n else 0.0


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One block: its losses as the quadratic model predicts them, and how the search went.

    Parameters
    ----------
    name : str
        Name of the block in its partition.
    n, n_prune : int
        Number of weights, and of those removed.
    selection_loss, updated_loss : float, optional
        Predicted loss increase with the kept weights as they were, and after their update.
    initial_loss : float, optional
        Selection loss of the set that the search started from.
    iterations, locally_optimal : int and bool, optional
        Steps of the search, and whether it ended because no single swap improves the set; 0 and None for
        methods that do not search.
    seconds : float
        Time spent on this block; blocks solved as a batch share theirs evenly.
    status : str, default ""
        How the search ended.
    objective, bound, gap : float, optional
        Value of the chosen set under the program of the run, in float64; a proved lower bound on it; and
        ``(objective - bound) / max(|objective|, 1e-12)``.
    certificate : str, optional
        The relaxation that proves `bound`, such as "perspective".
    certificate_status, certificate_seconds : str and float, optional
        How the certification ended and the time it took; "" and None if none was asked for.
    rho, effective_rank : float, optional
        Damping over the mean diagonal of the block's Fisher matrix ``F``, and ``tr(F)^2 / tr(F^2)``.
        Gaps fall with `rho` and with ``n / effective_rank``.
    n_fixed : int, optional
        Weights proved to have the same fate in every set as good as the best one known.
    fingerprint : str, default ""
        Of the float64 `BlockProblem` that was certified.
    """

    name: str
    n: int
    n_prune: int
    selection_loss: float | None
    updated_loss: float | None
    initial_loss: float | None
    iterations: int
    locally_optimal: bool | None
    seconds: float
    bound: float | None = None
    gap: float | None = None
    status: str = ""
    objective: float | None = None
    certificate: str | None = None
    certificate_status: str = ""
    certificate_seconds: float | None = None
    rho: float | None = None
    effective_rank: float | None = None
    n_fixed: int | None = None
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One step: a selection with its update, an update alone, or a fine-tuning.

    Parameters
    ----------
    stage, update : int
        From 0; update 0 of a stage also prunes, where the stage prunes at all.
    sparsity, n_prune : float and int
        Share and number of weights pruned after the step.
    loss_before, loss : float
        Training loss before and after, on the same samples, drawn afresh for every step.
    damping, update_scale : float
        Of the winner: added to the diagonal of the Fisher matrix, and step length; 0 if the kept weights
        did not move.
    accepted : bool
        False if an update did not lower the loss, so that nothing changed.
    tried, best_rejected : int and float, optional
        Networks that were compared, and the lowest training loss among the others; None if there was none.
    predicted_change : float, optional
        What the quadratic model, without damping, says of the winner's step; None of a fine-tuning.
    samples : int
        Samples differentiated since the run began, for rows and gradients.
    seconds : float
        Wall-clock time of the step; the first of a stage includes the rows.
    rate_kind, rate : str and float
        How a fine-tuning went down, "momentum", "newton" or "adam", and its learning rate, of "newton" the
        damping; empty and 0 of other steps.
    """

    stage: int
    update: int
    sparsity: float
    n_prune: int
    loss_before: float
    loss: float
    damping: float
    update_scale: float
    accepted: bool
    tried: int
    best_rejected: float | None
    predicted_change: float | None
    samples: int
    seconds: float
    rate_kind: str = ""
    rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CertifiedSum:
    """Certified blocks added up.

    `program` and `objective`: the program, and the sum of the values of the chosen sets under it. `bound`:
    sum of the blocks' bounds, rounded down; None if a block has none. `blocks` and `bounded`: number of
    blocks, and of those with a bound. `meaning`: what the bound is.
    """

    program: str
    objective: float
    bound: float | None
    blocks: int
    bounded: int
    meaning: str = MEANING

    @classmethod
    def of(cls, program: str, blocks: Sequence[BlockSummary]) -> CertifiedSum:
        """Return the sum over blocks; its bound is rounded down, so that it holds in the last digit."""
        bounds = [block.bound for block in blocks if block.bound is not None]
        total = math.fsum(bounds)
        return cls(
            program=program,
            objective=math.fsum(block.objective or 0.0 for block in blocks),
            bound=None if len(bounds) < len(blocks) else math.nextafter(total, -math.inf),
            blocks=len(blocks),
            bounded=len(bounds),
        )

    @property
    def gap(self) -> float | None:
        """``(objective - bound) / max(|objective|, 1e-12)``; None without a bound."""
        return relative_gap(self.objective, self.bound)

    def lines(self) -> list[str]:
        """Return the sum in words, or how many blocks have no bound."""
        if self.bound is None or self.gap is None:
            return [f"certified: {self.bounded} of {self.blocks} blocks have a bound; no sum"]
        blocks = "one block" if self.blocks == 1 else f"sum over {self.blocks} blocks"
        values = f"objective {self.objective:.6g}, bound {bound_text(self.bound)}, gap {gap_text(self.gap)}"
        return [f"certified, program {self.program}, {blocks}: {values}", f"this is a {self.meaning}"]
