"""What layers before have lost is made up for: levels, pairs of inputs, and the weights aimed at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.layers import calibration
from cbs_opt.layers.asymmetry import Asymmetry
from cbs_opt.layers.blocks import find_blocks
from cbs_opt.layers.calibration import Calibration, calibrate
from cbs_opt.layers.gram import GramSum
from cbs_opt.layers.recipe import layer_recipe
from cbs_opt.layers.sequential import prune_layers
from formulations.errors import ArgumentError
from tests.cbs_opt.layers.networks import LENGTH, WIDTH, Network, tokens

CPU = torch.device("cpu")


def paired(x: Tensor, y: Tensor) -> GramSum:
    sums = GramSum(x.shape[1], CPU, paired=True)
    for number, (fed, wanted) in enumerate(zip(x.tensor_split(4), y.tensor_split(4), strict=True)):
        sums.add(fed, "layer", number, wanted)
    return sums


def test_sums_of_pairs_are_those_of_all_tokens_and_of_those_set_aside() -> None:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 5, generator=draw) for _ in range(2))
    sums = paired(x, y)
    every, fitted, held = sums.missing()
    last = torch.cat([torch.arange(10 * part + 8, 10 * part + 10) for part in range(4)])
    assert sums.held == len(last)
    missing = (y - x).double()
    assert torch.allclose(every, missing.T @ x.double() / 40, rtol=1e-5, atol=1e-6)
    assert torch.allclose(held, missing[last].T @ x[last].double() / 8, rtol=1e-5, atol=1e-6)
    assert torch.allclose(fitted * 32 + held * 8, every * 40, rtol=1e-5, atol=1e-6)


def test_what_inputs_still_tell_is_made_up_for_and_chance_is_not() -> None:
    draw = torch.Generator().manual_seed(1)
    x, other = (torch.randn(4_000, 12, generator=draw) for _ in range(2))
    mixing = 0.3 * torch.randn(12, 12, generator=draw)
    weights = torch.randn(6, 12, generator=draw)
    wanted = x + x @ mixing
    found, distance = Asymmetry(paired(x, wanted)).target(weights)
    before, after = ((target @ x.T - weights @ wanted.T).square().mean() for target in (weights, found))
    assert after < 0.02 * before
    assert distance == pytest.approx(float((found - weights).norm() / weights.norm()), rel=1e-5)
    # What is missing has nothing to do with what is left.
    found, distance = Asymmetry(paired(x[:60], x[:60] + other[:60])).target(weights)
    fresh = weights @ (x + other).T
    assert (found @ x.T - fresh).square().mean() < 1.05 * (weights @ x.T - fresh).square().mean()


def test_half_precision_keeps_what_is_made_up_for() -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(400, 8, generator=draw)
    weights = torch.randn(4, 8, generator=draw).bfloat16()
    found, distance = Asymmetry(paired(x, 1.001 * x)).target(weights)
    assert found.dtype == torch.float32
    assert 0.0 < distance < 1e-3
    assert float((found - weights.float()).norm() / weights.float().norm()) == pytest.approx(
        distance, rel=1e-2
    )


def test_nothing_is_made_up_for_where_nothing_is_missing() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(3, 6)
    for sums in (paired(x, x), paired(torch.zeros_like(x), x)):
        found, distance = Asymmetry(sums).target(weights)
        assert torch.equal(found, weights)
        assert distance == 0.0


class Chain(nn.Module):
    """Layers of four levels: two fed the same, one fed by both, a side branch, and one at the end."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "second", "third", "side", "last"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        one, two = self.get_submodule("first")(hidden_states), self.get_submodule("second")(hidden_states)
        one.relu_()
        three = self.get_submodule("third")(one * two)
        side = self.get_submodule("side")(2.0 * hidden_states)
        return (hidden_states + scale * self.get_submodule("last")(three + side),)


@pytest.mark.parametrize("frozen", [False, True])
def test_levels_are_found_by_what_feeds_what(frozen: bool) -> None:
    network = Network(2, Chain)
    blocks, _ = find_blocks(network)
    network.requires_grad_(not frozen)
    with torch.no_grad():
        fed = calibrate(network, blocks, tokens(), samples=None, chunk_tokens=64)
        levels = fed.levels(0, blocks[0])
    names = [[layer.name.split(".")[2] for layer in level.block.layers] for level in levels]
    assert names == [["first", "second", "side"], ["third"], ["last"]]
    assert all(level.once for level in levels)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Twice(Chain):
    """The same layer twice, the second time fed by the first."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        layer = self.get_submodule("first")
        return (hidden_states + scale * self.get_submodule("last")(layer(torch.relu(layer(hidden_states)))),)


def test_a_layer_that_runs_twice_has_all_its_inputs_in_its_sum() -> None:
    network = Network(2, Twice)
    report = prune_layers(network, tokens(), sparsity=0.5)
    counts = {layer.name.split(".")[2]: layer.tokens for layer in report.layers}
    assert counts == {"first": 2 * 24 * LENGTH, "last": 24 * LENGTH}
    assert [left.name for left in report.left_out if "second" in left.name]


def outputs_lost(network: Network, dense: Network, x: Tensor) -> float:
    with torch.no_grad():
        wanted, found = dense.hidden(x), network.hidden(x)
    return float((wanted - found).square().mean() / wanted.square().mean())


def test_the_last_hidden_states_of_unseen_tokens_come_nearer_to_the_dense_ones() -> None:
    lost: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(4):
        data, unseen = tokens(400, seed), tokens(200, 100 + seed)
        for asymmetric, found in lost.items():
            network, dense = Network(6), Network(6)
            recipe = cbs.LayerRecipe(asymmetric=asymmetric)
            report = prune_layers(network, data, sparsity=0.5, recipe=recipe)
            found.append(outputs_lost(network, dense, unseen))
            distances = [layer.distance for layer in report.layers]
            assert distances[0] == 0.0
            assert (max(distances) > 0.0) is asymmetric
    assert sum(lost[True]) < 0.95 * sum(lost[False])


def test_methods_of_papers_compare_a_layer_with_itself_unless_asked() -> None:
    assert cbs.LayerRecipe().asymmetric
    assert cbs.LayerRecipe(method="greedy_obs").asymmetric
    moving = cbs.Divergence(passes=1)
    assert cbs.LayerRecipe(divergence=moving).asymmetric is False
    assert cbs.LayerRecipe(divergence=moving, asymmetric=True).asymmetric
    assert cbs.LayerRecipe(divergence=moving, written=100).asymmetric
    assert not cbs.LayerRecipe(method="alps", written=100).asymmetric
    for name, sparsity in (("fast", 0.5), ("balanced", "2:4"), ("balanced", 0.5), ("best", 0.5)):
        assert layer_recipe(name, sparsity).asymmetric
    for method in ("magnitude", "wanda", "sparsegpt", "alps"):
        assert cbs.LayerRecipe(method=method).asymmetric is False
        assert cbs.LayerRecipe(method=method, asymmetric=True).asymmetric
    with pytest.raises(ArgumentError, match=r"recipe\.asymmetric"):
        cbs.LayerRecipe(asymmetric="yes")  # type: ignore[arg-type]


def test_each_level_is_fed_by_the_pruned_ones_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(2)
    x = tokens()
    fed: dict[str, Tensor] = {}
    grams = Calibration.grams

    def seen(self: Calibration, number: int, block: Any, **others: Any) -> dict[str, GramSum]:
        sums = grams(self, number, block, **others)
        fed.update({name: total.mean(0.0)[0] for name, total in sums.items()})
        return sums

    monkeypatch.setattr(Calibration, "grams", seen)
    prune_layers(network, x, sparsity=0.5)
    inputs: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("layers"):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        network(x)
    for name, found in inputs.items():
        flat = found.reshape(-1, found.shape[-1]).double()
        assert torch.allclose(fed[f"{name}.weight"], flat.T @ flat / len(flat), rtol=1e-4, atol=1e-6)


def test_a_small_memory_for_inputs_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for most in (0, calibration.NOTED):
        monkeypatch.setattr(calibration, "NOTED", most)
        network = Network(4)
        prune_layers(network, tokens(), sparsity=0.5, recipe=cbs.LayerRecipe(chunk_tokens=6 * LENGTH))
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Ungraded(Chain):
    """Cannot run with gradients."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return super().forward(hidden_states, scale)


def test_each_layer_is_a_level_where_a_block_cannot_run_with_gradients() -> None:
    network = Network(2, Ungraded)
    blocks, _ = find_blocks(network)
    with torch.no_grad():
        fed = calibrate(network, blocks, tokens(), samples=None, chunk_tokens=64)
        levels = fed.levels(0, blocks[0])
    assert [len(level.block.layers) for level in levels] == [1] * 5
    assert prune_layers(network, tokens(), sparsity=0.5).zeros == 0.5


class InPlace(Chain):
    """Changes in place what layers were fed."""

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        x = 1.0 * hidden_states
        one = self.get_submodule("first")(x)
        x.add_(1.0)
        two = self.get_submodule("second")(x)
        x.mul_(2.0)
        return (hidden_states + scale * self.get_submodule("last")(one * two + x),)


def test_inputs_are_those_at_the_time_of_the_call() -> None:
    network = Network(2, InPlace)
    blocks, _ = find_blocks(network)
    with torch.no_grad():
        fed = calibrate(network, blocks, tokens(), samples=None, chunk_tokens=10_000)
        fed.follow(0, blocks[0])
        noted = fed.batches[0].noted
        assert noted is not None
        hidden = fed.batches[0].hidden
        assert torch.equal(noted["layers.0.first.weight"][0], hidden)
        assert torch.equal(noted["layers.0.second.weight"][0], hidden + 1.0)
        sums = fed.grams(0, blocks[0])
    assert sums["layers.0.first.weight"] is not sums["layers.0.second.weight"]
