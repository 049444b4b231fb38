"""Swap search on the selection program, from small dense blocks to whole networks.

Small blocks are searched at once on their Gram matrix. A large block alternates between two moves
until neither finds anything: best-improvement swaps within a pool of the most promising weights
(their Gram matrix is small, and one product with the rows brings ``v = A y`` up to date for all),
and a search over all pairs that discards most of them with proof (`pair_search`). When the second
comes back empty the set is a proved 1-swap optimum of the whole block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cbs_opt.hessian.on_demand import chosen
from cbs_opt.select.choice import SearchResult
from cbs_opt.select.selection_program.dense import swap_dense
from cbs_opt.select.selection_program.large import (
    MAX_SWAPS,
    ROUNDING,
    TINY,
    LargeSwapSearch,
    relative_tolerance,
)
from cbs_opt.select.selection_program.program import SelectionProgram
from cbs_opt.select.selection_program.tuning import TUNING, SwapTuning
from formulations.solution import Limit


def swap_search(program: SelectionProgram, start: Tensor, **options: Any) -> SearchResult:
    """Return `swap_search_batch` of one block, with its options."""
    return swap_search_batch([program], [start], **options)[0]


def swap_search_batch(
    programs: Sequence[SelectionProgram],
    starts: Sequence[Tensor],
    *,
    tolerance: float | None = None,
    max_swaps: int | None = None,
    deadline: float | None = None,
    seed: int = 0,
    tuning: SwapTuning = TUNING,
) -> list[SearchResult]:
    """Improve kept sets by best-improvement swaps until none helps, equal small blocks side by side.

    Parameters
    ----------
    programs : sequence of SelectionProgram
    starts : sequence of (n,) bool tensors
        Weights kept at the start.
    tolerance : float, optional
        Relative: a swap counts if it lowers the objective by more than ``tolerance * |objective|``.
        Default 1e-10 for float64 rows and 1e-7 for lower precision.
    max_swaps : int, optional
    deadline : float, optional
        Reading of `time.monotonic` at which to stop. A large block looks at it every second or so;
        small blocks are searched to the end once begun.
    seed : int, default 0
        Seed of the column sample that the pair search fits its directions to.
    tuning : SwapTuning

    Returns
    -------
    list of SearchResult
        In the order of `programs`, never worse than the start; the seconds of a batch are spread evenly.

    Notes
    -----
    Memory beyond the rows: O(n), and less than 256 MiB for pools and pairs.
    Source of the move: Yu et al. (ICML 2022), section 4.
    """
    results: dict[int, SearchResult] = {}
    groups: dict[tuple[int, torch.device], list[int]] = {}
    for number, (n, device) in enumerate([(program.n, program.weights.device) for program in programs]):
        if n <= tuning.dense_limit:
            groups.setdefault((n, device), []).append(number)
        else:
            search = LargeSwapSearch(
                programs[number], starts[number], tolerance, max_swaps, deadline, seed, tuning
            )
            results[number] = search.result()
    for (n, _), members in groups.items():
        size = max(1, tuning.batch_bytes // (8 * max(1, n) ** 2))
        for first in range(0, len(members), size):
            batch = members[first : first + size]
            ends = _search_dense(
                chosen(programs, batch), [starts[i] for i in batch], tolerance, max_swaps, deadline, tuning
            )
            results.update(zip(batch, ends, strict=True))
    return [results[number] for number in range(len(programs))]


def _grams(programs: Sequence[SelectionProgram]) -> Tensor:
    """Return Gram matrices of blocks of one size, (B, n, n) float64, one block's rows in use at a time."""
    n, device = programs[0].n, programs[0].weights.device
    everything = torch.arange(n, device=device)
    grams = torch.empty(len(programs), n, n, dtype=torch.float64, device=device)
    for gram, program in zip(grams, programs, strict=True):
        gram.copy_(program.gram(everything))
    return grams


def _search_dense(
    programs: Sequence[SelectionProgram],
    starts: Sequence[Tensor],
    tolerance: float | None,
    max_swaps: int | None,
    deadline: float | None,
    tuning: SwapTuning,
) -> list[SearchResult]:
    """Search blocks of one size at once, each on its whole Gram matrix."""
    began = time.monotonic()
    gram = _grams(programs)
    linear = torch.stack([program.linear() for program in programs])
    pruned = ~torch.stack(list(starts))
    product = torch.einsum("bij,bj->bi", gram, pruned.double())
    relative = torch.tensor([relative_tolerance(program, tolerance) for program in programs])
    expired = deadline is not None and time.monotonic() >= deadline
    most = 0 if expired else MAX_SWAPS if max_swaps is None else max_swaps
    budget = torch.full((len(programs),), most, dtype=torch.int64, device=gram.device)
    terms = torch.diagonal(gram, dim1=1, dim2=2).amax(1) + linear.abs().amax(1)
    swaps = torch.zeros_like(budget)
    while True:
        # The threshold follows the objective down, so a pass that moves nothing ends it.
        value = 0.5 * (product * pruned).sum(1) - (linear * pruned).sum(1)
        rounding = ROUNDING * (terms + product.abs().amax(1)) + TINY
        threshold = torch.maximum(relative.to(value) * value.abs(), rounding)
        counts = swap_dense(
            gram, product, linear, pruned, threshold, budget - swaps, compiled=tuning.compiled
        )
        swaps += counts.swaps
        if not bool((counts.locally_optimal & (counts.swaps > 0)).any()):
            break
    share = (time.monotonic() - began) / len(programs)
    limit = Limit.TIME if expired else Limit.ITERATION
    results = []
    for b, program in enumerate(programs):
        initial = program.objective(starts[b])
        final = program.objective(~pruned[b])
        worse = final > initial  # by rounding only
        settled = bool(counts.locally_optimal[b]) and not worse
        results.append(
            SearchResult(
                keep=starts[b].clone() if worse else ~pruned[b],
                value=min(final, initial),
                initial_value=initial,
                swaps=0 if worse else int(swaps[b]),
                locally_optimal=settled,
                limit=None if bool(counts.locally_optimal[b]) else limit,
                seconds=share,
            )
        )
    return results
