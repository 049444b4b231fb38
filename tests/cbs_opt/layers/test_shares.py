"""Budgets of a network: exact in the sum, by scales of the Fisher matrix, more where it matters."""

from __future__ import annotations

import pytest
import torch

import cbs_opt as cbs
from cbs_opt.layers.blocks import find_blocks
from cbs_opt.layers.calibration import first_tokens
from cbs_opt.layers.sequential import prune_layers
from cbs_opt.layers.shares import LayerScales, Scales, kept_counts, measure_scales
from cbs_opt.network.data import Batch
from cbs_opt.system.progress import ignored
from formulations.errors import ArgumentError, NonFiniteError
from tests.cbs_opt.layers.networks import LENGTH, Network, tokens


def test_scales_are_the_diagonal_of_the_fisher_matrix_of_the_outputs() -> None:
    network, x = Network(), tokens(300)
    blocks, _ = find_blocks(network)
    with torch.no_grad():
        scales = measure_scales(network, blocks, [Batch(inputs=x)], 0, ignored)
        p = network(x).flatten(0, 1).softmax(-1)
    assert scales.tokens == x.numel()
    # What the last layer makes goes into the head alone, half of it.
    head = 0.5 * network.head.weight.detach()
    expected = ((p @ head.square()) - (p @ head).square()).mean(0).double()
    assert torch.allclose(scales.layers["layers.2.out.weight"].rows, expected, rtol=0.3)
    fed = network.layers[0].left
    seen = network.embedding(x).flatten(0, 1).double().square().mean(0)
    assert fed.weight.grad is None
    assert torch.allclose(scales.layers["layers.0.left.weight"].inputs, seen)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.7, 0.97])
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_exact_whatever_the_scales(sparsity: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (40, 7), "c": (1, 1), "d": (12, 12), "unreached": (8, 9)}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    weights["b"][:, :3] = 0.0
    scales = {
        name: LayerScales(
            rows=torch.rand(shape[0], generator=draw).double() ** 9,
            inputs=torch.rand(shape[1], generator=draw).double() ** 3,
        )
        for name, shape in shapes.items()
        if name != "unreached"
    }
    scales["d"].rows[:3] = 0.0
    kept = kept_counts(weights, Scales(layers=scales, tokens=1), sparsity)
    size = sum(weight.numel() for weight in weights.values())
    assert sum(kept.values()) == size - round(sparsity * size)
    assert all(0 <= kept[name] <= weights[name].numel() for name in weights)


def test_layers_and_rows_keep_more_where_their_outputs_matter_more() -> None:
    network = Network()
    with torch.no_grad():
        network.layers[1].out.weight[:, :] *= 0.1
        network.layers[1].right.weight[:5] *= 0.05
        network.layers[1].left.weight[5:10] = network.layers[1].left.weight[:5]
    dense = network.layers[1].left.weight.detach().clone()
    recipe = cbs.LayerRecipe(method="wanda", budget="network")
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe)
    kept = {layer.name: layer.rows * layer.inputs - layer.pruned for layer in report.layers}
    assert kept["layers.1.left.weight"] < kept["layers.0.left.weight"]
    # Twins whose outputs are multiplied by small and by ordinary factors.
    rows = report.masks["layers.1.left.weight"].sum(1)
    assert int(rows[:5].sum()) < int(rows[5:10].sum())
    size = sum(layer.rows * layer.inputs for layer in report.layers)
    assert sum(layer.pruned for layer in report.layers) == round(0.5 * size)
    assert report.scale_tokens == report.differentiated == 24 * LENGTH
    keep = report.masks["layers.1.left.weight"]
    assert torch.allclose(network.layers[1].left.weight[keep], dense[keep])


def test_few_samples_are_enough_and_their_number_is_kept_to() -> None:
    batches = [Batch(inputs=part) for part in tokens(20).split(7)]
    few = first_tokens(batches, 9 * LENGTH - 1)
    assert [batch.size for batch in few] == [1] * 9
    assert torch.equal(torch.cat([batch.inputs for batch in few]), tokens(20)[:9])
    assert len(first_tokens(batches, 10**6)) == 20


def test_seeds_decide() -> None:
    reports = [
        prune_layers(Network(), tokens(), sparsity=0.5, recipe=cbs.LayerRecipe(budget="network", seed=seed))
        for seed in (0, 0, 1)
    ]
    counts = [[layer.pruned for layer in report.layers] for report in reports]
    assert counts[0] == counts[1] != counts[2]


def test_predictions_that_are_nan_are_named_by_their_sample_and_nothing_changes() -> None:
    network, x = Network(), tokens()
    with torch.no_grad():
        network.embedding.weight[x[3, 0]] = torch.inf
    before = network.layers[0].left.weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"predictions of sample [0-3];"):
        prune_layers(network, x, sparsity=0.5, recipe="balanced")
    assert torch.equal(network.layers[0].left.weight, before)


def test_a_pattern_leaves_no_choice_of_budgets() -> None:
    with pytest.raises(ArgumentError, match=r"recipe\.budget.*every row has the pattern"):
        prune_layers(Network(), tokens(), sparsity="2:4", recipe=cbs.LayerRecipe(budget="network"))
    report = prune_layers(Network(), tokens(), sparsity="2:4", recipe="balanced")
    assert report.recipe.budget == "rows"
    (moved,) = report.moved
    assert moved.after <= moved.before
    assert report.scale_tokens == 0 < report.differentiated == moved.tokens
