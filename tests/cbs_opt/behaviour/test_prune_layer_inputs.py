"""`prune` with the layer-input term: which weight is taken, and what it does to the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.curvature import layer_inputs
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.curvature.layer_inputs import term_work, with_layer_inputs
from cbs_opt.hessian.channel_system import ChannelHessian
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.records import Recipe, Weights, absolute
from cbs_opt.recipe.select import OBD, OBS, Magnitude, SwapSearch
from cbs_opt.report.files import save_report
from cbs_opt.report.verification import check_certificates
from formulations.errors import ArgumentError, UnsupportedProblemError
from tests.cbs_opt.recipes import arguments

pytestmark = pytest.mark.usefixtures("without_pictures")

COMMON: dict[str, Any] = {
    "sparsity": 0.7,
    "select": Magnitude(program="selection"),
    "curvature": EmpiricalFisher(samples=16),
    "damping": absolute(1e-3),
    "progress": False,
}
ROWS = Weights(blocks="row", budget="uniform")


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()


def data(samples: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(samples, 2, 5, 5, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def rows_of(model: nn.Module) -> cbs.Rows:
    partition = Partition.from_model(model, blocks="global")
    return cbs.gradient_rows(
        model,
        data(),
        nn.functional.cross_entropy,
        partition,
        curvature=cbs.EmpiricalFisher(samples=16),
        progress=False,
    )


def pruned(**options: Any) -> tuple[nn.Sequential, cbs.PruneReport]:
    model = network()
    given = options.pop("data", data())
    if "recipe" in options:
        options |= {"sparsity": COMMON["sparsity"], "progress": False}
        return model, cbs.prune(model, given, **options)
    return model, cbs.prune(model, given, **arguments(**COMMON | options))


def grid(weights: Sequence[float], **fields: Any) -> list[Recipe]:
    """Recipes that differ in the weight of the term."""
    common = {name: value for name, value in COMMON.items() if name in Recipe.__dataclass_fields__}
    return Recipe.grid(Recipe(**common | fields), layer_inputs=weights)


def weights(model: nn.Sequential) -> Tensor:
    return torch.cat([model[0].weight.detach().flatten(), model[3].weight.detach().flatten()])


def test_weight_zero_is_the_model_of_the_rows_alone() -> None:
    rows, zero = pruned(curvature=rows_of(network()))[0], pruned(layer_inputs=0.0)[0]
    assert torch.equal(weights(rows), weights(zero))


def test_by_default_the_weight_is_one_unless_layers_are_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    default, one = pruned(), pruned(layer_inputs=1.0)
    assert default[1].layer_inputs == 1.0
    assert torch.equal(weights(default[0]), weights(one[0]))
    work = 4 * 18**3 + 3 * 36**3
    assert term_work(Partition.from_model(network(), blocks="global")) == work
    monkeypatch.setattr(layer_inputs, "TERM_WORK", work - 1)
    too_wide, zero = pruned(), pruned(layer_inputs=0.0)
    assert too_wide[1].layer_inputs == 0.0
    assert torch.equal(weights(too_wide[0]), weights(zero[0]))
    assert pruned(layer_inputs=1.0)[1].layer_inputs == 1.0


def test_without_curvature_there_is_no_term() -> None:
    report = pruned(update=None, data=None)[1]
    assert report.layer_inputs == 0.0
    assert report.request is not None
    assert report.request.recipes[0].layer_inputs == 0.0


def test_of_a_grid_the_lowest_training_loss_is_taken() -> None:
    tried = (0.0, 0.1, 1.0, 10.0)
    losses = {}
    for weight in tried:
        report = pruned(layer_inputs=weight)[1]
        assert report.train_after is not None
        losses[weight] = report.train_after.loss
    chosen = pruned(recipe=grid(tried))[1]
    assert chosen.train_after is not None
    assert chosen.train_after.loss == min(losses.values())
    assert losses[chosen.layer_inputs] == min(losses.values())
    assert chosen.request is not None
    assert tuple(recipe.layer_inputs for recipe in chosen.request.recipes) == tried


def test_the_report_says_the_weight() -> None:
    report = pruned(layer_inputs=0.5)[1]
    assert report.layer_inputs == 0.5
    assert "layer inputs 0.5" in report.summary()
    assert report.to_dict()["layer_inputs"] == 0.5
    assert "layer inputs" in report.seconds
    assert "layer inputs" not in pruned(layer_inputs=0.0)[1].summary()


def test_a_term_that_the_rows_bring_counts_by_default_and_is_scaled_to_the_weight() -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    rows = with_layer_inputs(rows_of(model), model, data(), partition, weight=0.5, samples=48)
    expected = weights(pruned(layer_inputs=0.5)[0])
    by_default, report = pruned(curvature=rows, data=None)
    assert report.layer_inputs == 0.5
    torch.testing.assert_close(weights(by_default), expected)
    rescaled = pruned(curvature=rows, layer_inputs=2.0)[0]
    torch.testing.assert_close(weights(rescaled), weights(pruned(layer_inputs=2.0)[0]))
    without = pruned(curvature=rows, layer_inputs=0.0)[0]
    assert torch.equal(weights(without), weights(pruned(layer_inputs=0.0)[0]))


def test_the_update_does_not_hang_on_the_scale_of_the_loss() -> None:
    """With damping relative to the Fisher diagonal nothing changes if the loss is multiplied."""

    def half(output: Tensor, y: Tensor) -> Tensor:
        return 0.5 * nn.functional.cross_entropy(output, y)

    options: dict[str, Any] = {"layer_inputs": 1.0, "damping": 0.1}
    one, other = pruned(**options)[0], pruned(loss_fn=half, **options)[0]
    torch.testing.assert_close(weights(one), weights(other), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("partition", ["global", "layer", "row", 7])
def test_every_partition_takes_the_term(partition: str | int) -> None:
    model, report = pruned(
        layer_inputs=1.0,
        weights=Weights(blocks=partition, budget="global" if partition == "global" else "uniform"),
        select=OBS(),
    )
    assert int((weights(model) == 0).sum()) == report.n_prune == round(0.7 * report.n)
    assert torch.isfinite(weights(model)).all()
    assert report.predicted_loss_increase is not None
    assert report.predicted_selection_loss is not None
    assert 0.0 < report.predicted_loss_increase < report.predicted_selection_loss


def test_rows_of_a_partition_know_no_other_channel() -> None:
    """The update of a block of one channel is the dense minimiser with that channel's moments."""
    model = network()
    partition = Partition.from_model(model, blocks="row")
    rows = with_layer_inputs(rows_of(model), model, data(), partition)
    assert rows.channels is not None
    before = weights(model).double()
    found = pruned(curvature=rows, weights=ROWS, damping=absolute(0.01))[0]
    for block in partition.blocks:
        span = slice(block.start, block.stop)
        part = rows.rows[:, span].double()
        hessian = part.T @ part + rows.channels.dense()[span, span] + 0.01 * torch.eye(part.shape[1])
        after = weights(found)[span].double()
        slope = hessian @ (after - before[span])
        assert float(slope[after != 0].abs().max()) < 1e-6


def test_certificates_hold_for_the_model_with_the_term() -> None:
    select = OBD(program="selection")
    report = pruned(layer_inputs=1.0, weights=ROWS, select=select, certify=True, sparsity=0.5)[1]
    for block in report.blocks:
        assert block.bound is not None
        assert block.selection_loss is not None
        assert block.bound <= block.selection_loss * (1 + 1e-9)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much", ()])
def test_a_bad_weight_is_named(value: Any) -> None:
    with pytest.raises(ArgumentError, match="layer_inputs"):
        pruned(layer_inputs=value)


def test_the_term_needs_data_unless_the_rows_bring_it() -> None:
    with pytest.raises(ArgumentError, match="data"):
        pruned(curvature=rows_of(network()), data=None, layer_inputs=1.0)


def test_one_problem_is_not_made_of_a_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    rows = with_layer_inputs(rows_of(model), model, data(), partition)
    block = cbs.fisher_blocks(
        model,
        data(),
        loss_fn=nn.functional.cross_entropy,
        partition=partition,
        curvature=cbs.EmpiricalFisher(samples=16),
        progress=False,
    )[0]
    with_term = replace(block, hessian=ChannelHessian(block.hessian, rows.channels))
    monkeypatch.setattr("cbs_opt.hessian.channel_system.DENSE_LIMIT", 20)
    assert block.to_problem(5).n == block.n
    with pytest.raises(UnsupportedProblemError, match="layer-input term"):
        with_term.to_problem(5)
    monkeypatch.setattr("cbs_opt.hessian.channel_system.SPLIT_LARGEST", 20)
    beside = with_term.to_problem(5, by_channels=True)
    assert beside.channels is not None
    np.testing.assert_allclose(
        beside.dense_hessian(), with_term.hessian.dense() + block.damping * torch.eye(block.n)
    )


@pytest.mark.parametrize("select", [OBS(), OBS(program="selection")])
def test_large_blocks_are_certified_channel_by_channel(
    select: OBS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No Hessian is formed, and the files prove the bounds."""
    monkeypatch.setattr("cbs_opt.hessian.channel_system.SPLIT_LARGEST", 20)
    monkeypatch.setattr("formulations.relaxations.bounds.SPLIT_LARGEST", 20)
    certify = cbs.Certify(block_dir=tmp_path / "certificates")
    report = pruned(recipe=grid((1.0,), select=select), certify=certify)[1]
    assert report.layer_inputs == 1.0
    assert report.certified is not None
    assert report.certified.gap is not None
    assert 0.0 <= report.certified.gap < 0.9
    save_report(report, tmp_path)
    assert all(block.ok and block.proved for block in check_certificates(tmp_path))


def test_searches_of_the_selection_program_are_certified_for_the_rows_they_went_by() -> None:
    options: dict[str, Any] = {
        "select": SwapSearch(program="selection"),
        "sparsity": 0.5,
        "certify": True,
    }
    report = pruned(layer_inputs=1.0, **options)[1]
    without = pruned(layer_inputs=0.0, **options)[1]
    assert [block.bound for block in report.blocks] == [block.bound for block in without.blocks]


def test_stages_take_one_weight() -> None:
    with pytest.raises(ArgumentError, match="layer_inputs"):
        pruned(recipe=grid((0.1, 1.0)), stages=2)


@pytest.mark.parametrize("partition", ["global", "layer", "row"])
def test_more_inputs_than_samples_are_no_obstacle(partition: str) -> None:
    """Second moments are then singular, and their rounding must not make the Hessian indefinite."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 80), nn.ReLU(), nn.Linear(80, 10)).eval()
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(40, 30, generator=generator), torch.randint(0, 10, (40,), generator=generator)
    recipe = Recipe(curvature=EmpiricalFisher(samples=20), weights=Weights(blocks=partition))
    report = cbs.prune(model, few, sparsity=0.8, recipe=recipe, progress=False)
    assert report.n_prune == round(0.8 * report.n)
    assert report.layer_inputs == 1.0
