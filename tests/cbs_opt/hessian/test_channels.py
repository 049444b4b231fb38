"""The layer-input term: its moments against per-sample gradients, its solves against a dense Hessian."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.curvature.layer_inputs import input_moments, with_layer_inputs
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.channel_system import ChannelSystem
from cbs_opt.hessian.channels import ChannelTerm, densified
from cbs_opt.hessian.products import hessian_diagonal, hessian_product, step_loss
from cbs_opt.network.partition import Partition
from cbs_opt.select.joint_program.channel_search import greedy_channel_set
from cbs_opt.select.saliency import inverse_diagonal
from cbs_opt.update.cbs import cbs_updates
from formulations import incumbents
from formulations.errors import ArgumentError
from formulations.solution import Limits


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))
    return nn.Sequential(*layers).eval()


def data(samples: int = 40, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, generator=generator)
    return x, torch.randint(0, 4, (samples,), generator=generator)


@pytest.fixture
def block() -> FisherBlock:
    """All weights of the network with few rows and the term."""
    model = network()
    partition = Partition.from_model(model, blocks="global")
    rows = cbs.gradient_rows(
        model, data(), nn.functional.cross_entropy, partition, curvature=cbs.EmpiricalFisher(samples=20)
    )
    found = with_layer_inputs(rows, model, data(), partition, weight=0.5)
    return FisherBlock(
        name="global",
        start=0,
        stop=partition.n,
        weights=partition.flatten(model),
        rows=found.rows,
        channels=found.channels,
        damping=1e-3,
    )


def test_moments_are_those_of_the_inputs() -> None:
    model = network()
    x, y = data()
    moments = input_moments(model, (x, y), Partition.from_model(model), samples=len(x))
    hidden = model[:3](x).double()
    torch.testing.assert_close(moments["3.weight"], hidden.T @ hidden / len(x), rtol=1e-5, atol=1e-7)
    # A filter's responses r = w.x over all positions have the mean square w.E[x x^T] w.
    responses = model[0](x) - model[0].bias[:, None, None]
    filters = model[0].weight.detach().flatten(1).double()
    squares = responses.detach().double().square().sum((2, 3)).mean(0)
    quadratic = torch.einsum("ci,ij,cj->c", filters, moments["0.weight"], filters)
    torch.testing.assert_close(quadratic, squares, rtol=1e-5, atol=1e-7)


def test_moments_at_other_weights() -> None:
    model, other = network(), network(seed=5)
    partition = Partition.from_model(model)
    with torch.no_grad():
        other[0].bias.copy_(model[0].bias)
    at = input_moments(model, data(), partition, weights=partition.flatten(other))
    expected = input_moments(other, data(), partition)
    for name in expected:
        torch.testing.assert_close(at[name], expected[name])


def test_the_term_has_the_mean_diagonal_of_the_rows_in_every_channel(block: FisherBlock) -> None:
    assert block.channels is not None
    squares = block.rows.double().square().sum(0)
    for channel in block.channels.channels:
        own = squares[channel.start : channel.stop].mean()
        assert float(channel.diagonal().mean()) == pytest.approx(0.5 * float(own), rel=1e-9)


def test_products_agree_with_the_dense_hessian(block: FisherBlock) -> None:
    dense = block.dense_hessian() + block.damping * torch.eye(block.n, dtype=torch.float64)
    x = torch.randn(block.n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(hessian_product(block, x), dense @ x, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(hessian_diagonal(block), dense.diagonal())
    assert step_loss(block, x) == pytest.approx(0.5 * float(x @ dense @ x), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9])
def test_system_solves_and_inverts_the_kept_block(block: FisherBlock, share: float) -> None:
    kept = (torch.rand(block.n, generator=torch.Generator().manual_seed(3)) >= share).nonzero().squeeze(1)
    dense = densified(block, "joint").hessian[kept][:, kept]
    dense.diagonal().add_(block.damping)
    system = ChannelSystem(block, kept, block.damping)
    right = torch.randn(len(kept), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(system.solve(right), torch.linalg.solve(dense, right), rtol=1e-7, atol=1e-9)
    expected = torch.linalg.inv(dense).diagonal()
    torch.testing.assert_close(system.inverse_diagonal(), expected, rtol=1e-7, atol=1e-9)
    rough = ChannelSystem(block, kept, block.damping, torch.float32).inverse_diagonal()
    torch.testing.assert_close(rough, expected, rtol=1e-2, atol=1e-4)


def test_update_leaves_no_gradient_on_kept_weights(block: FisherBlock) -> None:
    pruned = torch.rand(block.n, generator=torch.Generator().manual_seed(6)) < 0.5
    slope = torch.randn(block.n, generator=torch.Generator().manual_seed(7)) * 1e-2
    block = replace(block, gradient=slope)
    (moved,) = cbs_updates(block, pruned, [block.damping])
    assert bool((moved[pruned] == 0.0).all())
    step = moved - block.weights.double()
    residual = hessian_product(block, step) + slope.double()
    assert float(residual[~pruned].abs().max()) < 1e-6


def test_inverse_diagonal_of_the_whole_block(block: FisherBlock) -> None:
    dense = block.dense_hessian() + block.damping * torch.eye(block.n, dtype=torch.float64)
    # The rows are in single precision, and so are their products with one another.
    rounding = 10.0 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        inverse_diagonal(block), torch.linalg.inv(dense).diagonal(), rtol=rounding, atol=0
    )


def test_parts_of_the_term_are_its_submatrices(block: FisherBlock) -> None:
    assert block.channels is not None
    dense = block.channels.dense()
    torch.testing.assert_close(block.channels.within(10, 40).dense(), dense[10:40, 10:40])
    keep = torch.rand(block.n, generator=torch.Generator().manual_seed(8)) < 0.5
    part = block.channels.restricted(keep)
    torch.testing.assert_close(part.dense(), dense[keep][:, keep])
    some = torch.rand(part.n, generator=torch.Generator().manual_seed(9)) < 0.5
    torch.testing.assert_close(part.restricted(some).dense(), dense[keep][:, keep][some][:, some])


def test_problem_of_a_small_block_holds_the_term(block: FisherBlock) -> None:
    problem = block.to_problem(5)
    dense = block.dense_hessian() + block.damping * torch.eye(block.n, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(problem.dense_hessian()), dense)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_weight_must_be_positive(weight: float) -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    moments = input_moments(model, data(), partition)
    with pytest.raises(ArgumentError, match="weight"):
        ChannelTerm.matched(moments, partition, torch.ones(2, partition.n), weight=weight)


def test_greedy_obs_with_one_weight_a_drop_is_the_dense_method(block: FisherBlock) -> None:
    part = slice(0, 54)  # the convolution
    assert block.channels is not None
    assert block.rows is not None
    small = FisherBlock(
        name="small",
        start=0,
        stop=54,
        weights=block.weights[part],
        rows=block.rows[:, part].double(),
        channels=block.channels.within(0, 54),
        damping=block.damping,
    )
    problem = small.to_problem(20)
    expected = incumbents.greedy(problem, "joint", limits=Limits())
    found = greedy_channel_set(small, 20, drops=2_000)
    assert expected.keep is not None
    assert (~found).tolist() == expected.keep.tolist()


def test_more_drops_lower_the_joint_objective(block: FisherBlock) -> None:
    count = round(0.8 * block.n)

    def value(drops: int) -> float:
        pruned = greedy_channel_set(block, count, drops=drops)
        assert int(pruned.sum()) == count
        (moved,) = cbs_updates(block, pruned, [block.damping])
        return step_loss(block, moved - block.weights.double())

    assert value(20) < value(1)


def test_prune_takes_the_term() -> None:
    plain, term = network(), network()
    common = {"sparsity": 0.8, "program": "joint", "method": "greedy_obs", "samples": 20, "progress": False}
    before = cbs.prune(plain, data(), layer_inputs=0.0, **common)
    after = cbs.prune(term, data(), layer_inputs=1.0, **common)
    assert after.n_prune == before.n_prune
    assert after.settings["layer_inputs"] == (1.0,)
    assert after.layer_inputs == 1.0
    assert not torch.equal(plain[3].weight, term[3].weight)
    assert after.predicted_loss_increase > 0.0


def test_swap_search_of_the_selection_program_goes_by_the_rows() -> None:
    one, other = network(), network()
    common = {"sparsity": 0.6, "program": "selection", "samples": 20, "progress": False}
    cbs.prune(one, data(), layer_inputs=0.0, **common)
    cbs.prune(other, data(), layer_inputs=1.0, **common)
    assert torch.equal(one[3].weight == 0, other[3].weight == 0)
    assert not torch.equal(one[3].weight, other[3].weight)
