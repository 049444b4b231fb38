"""The joint program in the space of its rows: against dense algebra and `formulations.loss`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select.joint_program.channel_program import joint_saliency
from cbs_opt.select.joint_program.pairs import Scores, improving_pairs
from cbs_opt.select.joint_program.program import JointProgram
from cbs_opt.select.joint_program.search import open_core
from cbs_opt.select.saliency import obs
from formulations import loss
from formulations.errors import NotPositiveDefiniteError
from tests.cbs_opt.fisher import KINDS, data_of, dense_hessian, fisher_block, random_set, with_rows

SHAPES = [(kind, n, m) for kind in KINDS for n, m in ((24, 9), (24, 60)) if kind != "undamped" or m > n]


def exact_values(block: FisherBlock, sets: list[Tensor]) -> list[float]:
    """Joint objectives of pruned sets, each by a dense solve."""
    problem = block.to_problem(int(sets[0].sum()))
    return [loss.joint_loss(problem, (~pruned).numpy()) for pruned in sets]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "n", "m"), SHAPES)
@pytest.mark.parametrize("n_prune", [0, 10, 24])
def test_a_kept_set_has_the_value_weights_and_leverages_of_dense_algebra(
    kind: str, n: int, m: int, n_prune: int, dtype: torch.dtype
) -> None:
    block = fisher_block(kind, n, m, dtype=dtype)
    pruned = random_set(n, n_prune)
    program = JointProgram(block)
    kept = program.at(~pruned)
    problem = block.to_problem(n_prune)
    assert kept.value == pytest.approx(loss.joint_loss(problem, kept.keep.numpy()), rel=1e-8, abs=1e-10)
    expected = torch.from_numpy(loss.update(problem, kept.keep.numpy()))
    weights = torch.where(kept.keep, program.levels(kept), 0.0)
    torch.testing.assert_close(weights, expected, rtol=1e-7, atol=1e-8)
    inverse = torch.linalg.inv(dense_hessian(block)[kept.keep][:, kept.keep]).diagonal()
    leverages = program.leverages(kept)
    torch.testing.assert_close((1 - leverages[kept.keep]) / program.damping, inverse, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exchange_agrees_with_a_fresh_start(dtype: torch.dtype) -> None:
    program = JointProgram(fisher_block("gradient", 60, 20, dtype=dtype))
    before, after = ~random_set(60, 40, 1), ~random_set(60, 40, 2)
    kept = program.at(before)
    moved = program.exchanged(kept, (before & ~after).nonzero()[:, 0], (~before & after).nonzero()[:, 0])
    fresh = program.at(after)
    assert moved.keep.equal(after)
    assert moved.value == pytest.approx(fresh.value, rel=1e-10)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    leverages = program.moved_leverages(program.leverages(kept), kept, moved)
    torch.testing.assert_close(leverages, program.leverages(fresh), rtol=tolerance, atol=tolerance)
    some = torch.tensor([3, 17, 40])
    torch.testing.assert_close(program.leverages(fresh, index=some), program.leverages(fresh)[some])


@pytest.mark.parametrize(("kind", "n", "m"), SHAPES)
def test_scores_are_the_changes_by_single_moves(kind: str, n: int, m: int) -> None:
    block = fisher_block(kind, n, m)
    pruned = random_set(n, 10)
    program = JointProgram(block)
    kept = program.at(~pruned)
    scores = Scores.of(program, kept, program.levels(kept), program.leverages(kept))
    for i in range(n):
        other = pruned.clone()
        other[i] = not pruned[i]
        (value,) = exact_values(block, [other])
        expected = kept.value - 0.5 * scores.gains[i] if pruned[i] else kept.value + 0.5 * scores.costs[i]
        assert value == pytest.approx(float(expected), rel=1e-8, abs=1e-10)


@pytest.mark.parametrize(("kind", "n", "m"), SHAPES)
def test_the_scan_finds_the_best_partner_of_every_weight_that_may_leave(kind: str, n: int, m: int) -> None:
    block = fisher_block(kind, n, m)
    pruned = random_set(n, 14)
    program = JointProgram(block)
    kept = program.at(~pruned)
    scores = Scores.of(program, kept, program.levels(kept), program.leverages(kept))
    found = improving_pairs(program, kept, scores, 0.0, None)
    best: dict[int, float] = {}
    for i in kept.keep.nonzero()[:, 0].tolist():
        swaps = []
        for j in pruned.nonzero()[:, 0].tolist():
            other = pruned.clone()
            other[i], other[j] = True, False
            swaps.append(other)
        best[i] = min(exact_values(block, swaps)) - kept.value
    assert found.complete
    assert float(found.changes[0]) == pytest.approx(min(best.values()), rel=1e-6)
    for leaving, entering, change in zip(found.leaving, found.entering, found.changes, strict=True):
        assert float(change) == pytest.approx(best[int(leaving)], rel=1e-6, abs=1e-9)
        assert kept.keep[leaving]
        assert pruned[entering]
    assert len(found.entering.unique()) == len(found.entering)
    improving = {i for i, change in best.items() if change < -1e-9 * kept.value}
    partners = {int(i) for i in found.leaving}
    assert partners <= {i for i, change in best.items() if change < 1e-9 * kept.value}
    assert partners or not improving


def test_the_core_values_its_sets_as_the_block_does() -> None:
    block = fisher_block("gradient", 40, 15)
    pruned = random_set(40, 20)
    program = JointProgram(block)
    kept = program.at(~pruned)
    core = open_core(
        program, kept, Scores.of(program, kept, program.levels(kept), program.leverages(kept)), 12
    )
    assert core.keep.equal(kept.keep[core.index])
    other = core.keep.roll(3)
    changed = ~pruned
    changed[core.index] = other
    now, then = exact_values(block, [pruned, ~changed])
    inner = [loss.joint_loss(core.problem, keep.numpy()) for keep in (core.keep, other)]
    assert inner[1] - inner[0] == pytest.approx(then - now, rel=1e-8)


def test_the_saliency_is_that_of_obs_without_a_gradient() -> None:
    for n, m in ((30, 10), (30, 50)):
        block = fisher_block("flat", n, m)
        torch.testing.assert_close(joint_saliency(block), obs(block), rtol=1e-8, atol=0.0)


def test_the_saliency_counts_the_gradient() -> None:
    block = fisher_block("gradient", 16, 6)
    everything, *others = (
        exact_values(block, [torch.zeros(16, dtype=torch.bool)]),
        *(exact_values(block, [torch.arange(16) == i])[0] for i in range(16)),
    )
    rises = torch.tensor(others, dtype=torch.float64) - everything[0]
    torch.testing.assert_close(joint_saliency(block), rises, rtol=1e-8, atol=1e-10)


def test_a_singular_hessian_is_named() -> None:
    wide = fisher_block("undamped", 12, 5)
    with pytest.raises(NotPositiveDefiniteError, match="5 rows for 12 weights"):
        JointProgram(wide)
    tall = fisher_block("undamped", 5, 12)
    repeated = with_rows(tall, data_of(tall)[:, [0, 0, 1, 2, 3]])
    with pytest.raises(NotPositiveDefiniteError):
        JointProgram(repeated)
