"""Methods for layers: exact counts, the properties that their papers claim, and all sets of small rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cbs_opt.select.layer_program.alternating import Alternating
from cbs_opt.select.layer_program.exchanges import Exchanges, by_exchanges, improved, mean_schur
from cbs_opt.select.layer_program.methods import METHODS, layer_method
from cbs_opt.select.layer_program.one_swaps import search_swaps
from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram
from cbs_opt.select.layer_program.support import RowCounts, RowPattern
from cbs_opt.select.layer_program.update import descend, exact_update
from formulations import incumbents
from formulations.errors import (
    ArgumentError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    UnknownOptionError,
    UnsupportedProblemError,
)
from formulations.loss import joint_loss, update
from formulations.problem import BlockProblem
from formulations.solution import Limits
from tests.cbs_opt.select.layer_program.layers import every_set, gram, layer_program, masks


def problem(program: LayerProgram, row: int, keep: Tensor) -> BlockProblem:
    """The joint program of one row, as `formulations` has it."""
    hessian = program.hessian.values.numpy() * program.hessian.unit
    return BlockProblem(
        weights=program.weights[row].double().numpy(), hessian=hessian, n_prune=int((~keep).sum())
    )


def least_losses(program: LayerProgram, sparsity: float | str) -> Tensor:
    """The optimum of every row, by all sets."""
    sets = masks(every_set(program.hessian.n, sparsity), program.hessian.n)
    best = torch.full((program.rows,), torch.inf, dtype=torch.float64)
    for keep in sets:
        everywhere = keep.expand(program.rows, -1)
        best = torch.minimum(best, program.losses(exact_update(program, everywhere)))
    return best


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, "2:4", "1:4"])
def test_every_method_has_its_count_exactly_and_says_what_it_costs(
    method: str, sparsity: float | str
) -> None:
    program = layer_program(12, 20, sparsity, dtype=torch.float32)
    solution = layer_method(method)(program)
    assert solution.weights.dtype == torch.float32
    assert bool((solution.weights[~solution.keep] == 0.0).all())
    assert torch.allclose(solution.losses, program.losses(solution.weights))
    counts = program.support.counts(12, 20) * (20 // program.support.group(20))
    assert int(solution.keep.sum()) == int(counts.sum())
    if method != "sparsegpt" or isinstance(program.support, RowPattern):
        assert torch.equal(solution.keep, program.support.best(solution.keep.float()))
    if sparsity == 0.0:
        assert torch.equal(solution.weights, program.weights)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps", "exchanges"])
def test_a_count_of_the_layer_is_exact_and_never_loses_to_equal_rows(method: str) -> None:
    program = layer_program(24, 32, dtype=torch.float32, budget="layer")
    uneven = program.weights * torch.linspace(0.2, 2.0, 24).view(24, 1)
    program = replace(program, weights=uneven)
    solution = layer_method(method)(program)
    assert int(solution.keep.sum()) == 24 * 16
    assert len(set(solution.keep.sum(1).tolist())) > 4
    equal = layer_method(method)(replace(program, support=RowCounts(16)))
    assert float(solution.losses.sum()) <= float(equal.losses.sum())


def test_greedy_obs_has_no_count_of_the_layer() -> None:
    with pytest.raises(UnsupportedProblemError, match='budget="rows"'):
        layer_method("greedy_obs")(layer_program(4, 8, budget="layer"))


@pytest.mark.parametrize("keep_share", [0.3, 0.7])
def test_losses_and_updates_are_those_of_the_joint_program_of_a_row(keep_share: float) -> None:
    program = layer_program(5, 16)
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(5, 16, generator=generator) < keep_share
    weights = exact_update(program, keep)
    for row in range(5):
        one = problem(program, row, keep[row])
        assert np.allclose(weights[row], update(one, keep[row].numpy()), atol=1e-10)
        assert float(program.losses(weights)[row]) == pytest.approx(
            joint_loss(one, keep[row].numpy()), rel=1e-9
        )


def test_conjugate_gradients_of_alps_end_at_the_exact_update() -> None:
    program = layer_program(9, 24)
    solution = layer_method("alps")(program)
    assert torch.allclose(solution.weights, exact_update(program, solution.keep), atol=1e-6)
    weights, residual = descend(program, solution.keep, program.weights, 200)
    assert torch.allclose(residual, (program.weights - weights) @ program.matrix, atol=1e-9)
    assert float(residual[solution.keep].abs().max()) < 1e-6


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_sparsegpt_is_obs_in_the_order_of_the_inputs(sparsity: float | str) -> None:
    program = layer_program(6, 12, sparsity)
    solution = layer_method("sparsegpt")(program)
    for row in range(6):
        weights = program.weights[row].clone()
        for column in range(12):
            if not solution.keep[row, column]:
                rest = torch.linalg.inv(program.hessian.values[column:, column:])
                weights[column:] -= weights[column] / rest[0, 0] * rest[0]
        assert torch.allclose(solution.weights[row], torch.where(solution.keep[row], weights, 0.0), atol=1e-9)


def test_wanda_ranks_by_the_norm_of_the_inputs_without_damping() -> None:
    program = layer_program(4, 10, damping=0.3)
    norms = gram(10).diagonal().sqrt()
    assert torch.equal(layer_method("wanda")(program).keep, RowCounts(5).best(program.weights.abs() * norms))


def test_greedy_obs_is_the_dense_method_row_by_row() -> None:
    program = layer_program(6, 14)
    solution = layer_method("greedy_obs")(program)
    for row in range(6):
        dense = incumbents.greedy(problem(program, row, solution.keep[row]), "joint", limits=Limits())
        assert dense.keep is not None
        assert solution.keep[row].tolist() == dense.keep.tolist()


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_exchanges_come_close_to_the_optimum_of_small_rows(sparsity: float | str) -> None:
    program = layer_program(40, 12, sparsity)
    best = least_losses(program, sparsity)
    found = by_exchanges(program, Exchanges(examine=40))
    assert found.proved == 40
    assert bool((found.losses >= best * (1.0 - 1e-9)).all())
    assert float(found.losses.sum()) < 1.08 * float(best.sum())
    assert float((found.losses < best * (1.0 + 1e-9)).double().mean()) > 0.8


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "1:4"])
def test_a_proved_row_has_no_swap_that_lowers_its_loss(sparsity: float | str) -> None:
    program = layer_program(8, 16, sparsity, seed=4)
    start = layer_method("magnitude")(program).keep
    found = search_swaps(program, start)
    assert bool((found.losses <= program.losses(exact_update(program, start)) * (1.0 + 1e-12)).all())
    size = program.support.group(16)
    for row in range(8):
        part = program.take(torch.tensor([row]))
        for leaving in found.keep[row].nonzero().flatten().tolist():
            for entering in (~found.keep[row]).nonzero().flatten().tolist():
                if leaving // size == entering // size:
                    keep = found.keep[row].clone()
                    keep[leaving], keep[entering] = False, True
                    loss = part.losses(exact_update(part, keep.unsqueeze(0)))
                    assert float(loss) >= float(found.losses[row]) * (1.0 - 1e-8)


def test_exchanges_never_make_a_row_worse() -> None:
    program = layer_program(30, 24, dtype=torch.float32)
    keep = layer_method("magnitude")(program).keep
    before, _ = descend(program, keep, program.weights, Exchanges().steps)
    after, weights = improved(program, keep, program.weights)
    assert torch.equal(after.sum(1), keep.sum(1))
    assert bool((program.losses(weights) <= program.losses(before) * (1.0 + 1e-5)).all())
    assert float(program.losses(weights).sum()) < 0.8 * float(program.losses(before).sum())


def test_the_mean_schur_complement_is_what_single_moves_cost() -> None:
    program = layer_program(1, 10)
    keep = torch.tensor([[True, False] * 5])
    matrix, schur = program.hessian.values, mean_schur(program, keep)
    for index in range(10):
        others = keep[0].clone()
        others[index] = False
        inner, across = matrix[others][:, others], matrix[others, index]
        assert float(schur[index]) == pytest.approx(
            float(matrix[index, index] - across @ inner.inverse() @ across)
        )


def test_a_spectrum_is_that_of_its_scale_and_precision_and_shared_by_layers_fed_the_same() -> None:
    hessian = layer_program(4, 12).hessian
    one, two = hessian.values.diagonal().sqrt(), hessian.least_scale.sqrt()
    first = hessian.spectrum(one, torch.float64)
    assert hessian.spectrum(one.clone(), torch.float64) is first
    for scale, dtype in ((one, torch.float64), (two, torch.float64), (two, torch.float32)):
        matrix, values, vectors = hessian.spectrum(scale, dtype)
        assert matrix.dtype == values.dtype == vectors.dtype == dtype
        torch.testing.assert_close(matrix, (hessian.values / scale.outer(scale)).to(dtype))
        torch.testing.assert_close((vectors * values) @ vectors.T, matrix)


def test_rows_do_not_depend_on_the_rows_around_them() -> None:
    program = layer_program(6, 16, seed=2)
    alone = by_exchanges(program, Exchanges(rounds=0))
    for row in range(6):
        one = program.take(torch.tensor([row]))
        assert torch.equal(
            search_swaps(one, alone.keep[[row]]).keep, search_swaps(program, alone.keep).keep[[row]]
        )


def test_ours_is_below_alps_and_alps_below_sparsegpt_on_a_layer_of_many_inputs() -> None:
    program = layer_program(64, 96, dtype=torch.float32)
    losses = {name: float(layer_method(name)(program).losses.sum()) for name in METHODS}
    assert losses["exchanges"] <= losses["alps"] < losses["sparsegpt"] < losses["wanda"] < losses["magnitude"]


def test_dead_inputs_are_pruned_first_and_change_nothing_else() -> None:
    moment = gram(12)
    moment[3] = moment[:, 3] = 0.0
    hessian = LayerHessian(moment)
    assert hessian.dead == 1
    weights = layer_program(5, 12).weights
    program = LayerProgram(weights=weights, hessian=hessian, support=RowCounts(6))
    live = [index for index in range(12) if index != 3]
    without = LayerProgram(
        weights=weights[:, live], hessian=LayerHessian(moment[live][:, live]), support=RowCounts(6)
    )
    ours, theirs = by_exchanges(program), by_exchanges(without)
    assert not bool(ours.keep[:, 3].any())
    assert torch.equal(ours.keep[:, live], theirs.keep)
    assert torch.allclose(ours.weights[:, live], theirs.weights)
    with pytest.raises(NotPositiveDefiniteError, match="1 dead inputs; use a larger damping"):
        LayerHessian(moment, 0.0)


def test_what_does_not_fit_is_refused_by_name() -> None:
    hessian = LayerHessian(gram(8), name="head")
    with pytest.raises(ShapeError, match="head"):
        LayerProgram(weights=torch.ones(2, 9), hessian=hessian, support=RowCounts(4))
    with pytest.raises(NonFiniteError, match="head"):
        LayerProgram(weights=torch.full((2, 8), torch.nan), hessian=hessian, support=RowCounts(4))
    with pytest.raises(NonFiniteError, match="gram"):
        LayerHessian(torch.full((3, 3), torch.inf))
    with pytest.raises(ShapeError, match="gram"):
        LayerHessian(torch.ones(3, 4))
    with pytest.raises(ArgumentError, match="method"):
        layer_method("obs")
    with pytest.raises(UnknownOptionError, match="leave options out"):
        layer_method("wanda", Exchanges())
    with pytest.raises(UnknownOptionError, match="Exchanges"):
        layer_method("exchanges", Alternating())
    with pytest.raises(ArgumentError, match=r"exchanges\.share"):
        Exchanges(share=0.0)
    with pytest.raises(ArgumentError, match=r"alternating\.growth"):
        Alternating(growth=(1.0, 0.5, 1.0))
