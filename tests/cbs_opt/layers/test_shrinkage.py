"""Shrinkage chosen on tokens set aside: less loss on inputs that nobody saw, where tokens are few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cbs_opt as cbs
from cbs_opt.layers.gram import FEW, HELD, GramSum
from cbs_opt.layers.sequential import prune_layers
from cbs_opt.layers.shrinkage import chosen_shrinkage
from cbs_opt.select.layer_program.exchanges import by_exchanges
from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram
from cbs_opt.select.layer_program.support import LayerCount, LayerSupport, RowCounts, support_of
from tests.cbs_opt.layers.networks import LENGTH, Network, tokens

CPU = torch.device("cpu")


def summed(x: Tensor, *, hold: bool) -> GramSum:
    sums = GramSum(x.shape[1], CPU, hold=hold)
    for part in x.split(16):
        sums.add(part, "layer", 0)
    return sums


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_rows_lose_less_on_inputs_that_nobody_saw(sparsity: float | str) -> None:
    inputs, rows = 96, 40
    lost = {"chosen": 0.0, "none": 0.0, "ledoit_wolf": 0.0}
    for seed in range(2):
        draw = torch.Generator().manual_seed(seed)
        sizes = torch.linspace(0.2, 2.0, inputs)
        mixing = torch.randn(inputs, inputs, generator=draw) / inputs**0.5 * sizes
        x = torch.randn(int(0.7 * inputs), inputs, generator=draw) @ mixing
        weights = torch.randn(rows, inputs, generator=draw)
        truth = (mixing.T @ mixing).double()
        sums = summed(x, hold=True)
        support = support_of(sparsity, (rows, inputs))
        share = chosen_shrinkage(sums, weights, support, 0.01)
        wanted = {"chosen": share, "none": 0.0, "ledoit_wolf": sums.ledoit_wolf()}
        for name in lost:
            hessian = LayerHessian(sums.mean(wanted[name])[0], 0.01)
            solution = by_exchanges(LayerProgram(weights=weights, hessian=hessian, support=support))
            error = weights.double() - solution.weights.double()
            lost[name] += float(((error @ truth) * error).sum())
    assert lost["chosen"] < 0.9 * lost["none"]
    assert lost["chosen"] <= lost["ledoit_wolf"]


@pytest.mark.parametrize("support", [RowCounts(5), LayerCount(37)])
def test_every_support_that_rows_may_share_is_taken(support: LayerSupport) -> None:
    draw = torch.Generator().manual_seed(0)
    sums = summed(torch.randn(20, 8, generator=draw), hold=True)
    share = chosen_shrinkage(sums, torch.randn(7, 8, generator=draw), support, 0.01)
    assert 0.0 <= share <= 1.0


def test_what_is_set_aside_is_a_part_and_counts_all_the_same() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    sums, plain = summed(x, hold=True), summed(x, hold=False)
    assert torch.equal(sums.mean(0.0)[0], plain.mean(0.0)[0])
    assert sums.held == sum(int(HELD * len(part)) for part in x.split(16))
    fitted, held = sums.parted()
    both = fitted * (50 - sums.held) + held * sums.held
    assert torch.allclose(both / 50, sums.mean(0.0)[0])
    last = torch.cat([part[len(part) - int(HELD * len(part)) :] for part in x.split(16)])
    assert torch.allclose(held, (last.T @ last).double() / len(last), atol=1e-6)


def test_only_layers_of_few_tokens_choose_and_a_share_that_is_asked_for_is_kept() -> None:
    many = 24 * LENGTH
    report = prune_layers(Network(), tokens(), sparsity=0.5)
    assert all(layer.inputs <= many / FEW for layer in report.layers)
    assert all(layer.shrinkage == 0.0 for layer in report.layers)
    report = prune_layers(Network(), tokens(2), sparsity=0.5, recipe=cbs.LayerRecipe(shrinkage=0.125))
    assert {layer.shrinkage for layer in report.layers} == {0.125}
    report = prune_layers(Network(), tokens(2), sparsity=0.5)
    assert any(layer.shrinkage > 0.0 for layer in report.layers)
