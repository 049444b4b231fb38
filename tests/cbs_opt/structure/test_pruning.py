"""Groups are pruned for a share of themselves or of the operations, and what is asked wrongly is named."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.errors import UnmatchedPatternError
from cbs_opt.network.data import Batch
from cbs_opt.network.evaluation import evaluate
from cbs_opt.structure import pruning, reading
from cbs_opt.structure.pruning import METRICS
from cbs_opt.structure.reading import moments, regression
from cbs_opt.structure.refinement import Refined
from formulations.errors import ArgumentError, NonFiniteError, UnsupportedProblemError
from tests.cbs_opt.structure.networks import built

FEW = cbs.GroupRecipe(samples=60, steps=0)


def data(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, torch.randint(0, 3, (len(inputs),), generator=torch.Generator().manual_seed(0))


def test_a_share_of_every_set_is_kept_and_the_network_is_not_touched() -> None:
    model, _ = built("mlp")
    before = copy.deepcopy(model.state_dict())
    small, report = cbs.prune_groups(model, data(torch.randn(60, 7)), keep=0.5, recipe=FEW)
    assert [(part.n_keep, part.n_groups) for part in report.choices.values()] == [(6, 12), (4, 9)]
    assert [tuple(entry.shape) for entry in small.parameters() if entry.ndim == 2] == [(6, 7), (4, 6), (3, 4)]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(entry.grad is None for entry in model.parameters())
    assert "0: 6 of 12 kept" in report.summary()


def test_the_same_call_gives_the_same_network() -> None:
    model, _ = built("mlp")
    samples = data(torch.randn(90, 7))
    one, other = (cbs.prune_groups(model, samples, keep=0.5, recipe=FEW, seed=3)[0] for _ in range(2))
    assert all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_copies_of_neurons_are_taken_out_without_loss() -> None:
    model, _ = built("mlp")
    with torch.no_grad():
        model[0].weight[6:] = model[0].weight[:6]
        model[0].bias[6:] = model[0].bias[:6]
    x = torch.randn(60, 7)
    recipe = cbs.GroupRecipe(samples=60, damping=1e-7, steps=0)
    small, report = cbs.prune_groups(model, data(x), keep={"0": 0.5}, recipe=recipe)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-3)
    assert report.choices["0"].loss < 1e-4


def test_operations_are_within_the_budget_and_the_choice_is_proved() -> None:
    model, _ = built("residual")
    x = torch.randn(60, 3, 10, 10)
    small, report = cbs.prune_groups(model, data(x), flops=0.5, recipe=FEW)
    assert report.widths is not None
    assert report.widths.gap <= 1e-6 * max(report.widths.error, 1.0)
    before, after = report.shrinkage.flops
    assert after <= 0.5 * before
    assert after == pytest.approx(report.widths.cost)
    assert str(report) == report.summary()
    assert len(str(report)) < 1_000
    assert evaluate(small, data(x)).accuracy is not None


@pytest.mark.parametrize(("name", "part"), [("mlp", "2"), ("packed", "qkv")])
def test_small_layers_are_proved(name: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads by trying all sets, neurons by leaps and bounds where those are too many."""
    monkeypatch.setattr(pruning, "ENUMERATED", 10)
    model, x = built(name)
    x = torch.randn(60, *x.shape[1:])
    with torch.no_grad():
        y = model(x) + torch.randn_like(model(x))
    recipe = cbs.GroupRecipe(samples=60, exact_seconds=30.0, steps=0)
    options: dict[str, Any] = {"recipe": recipe, "loss_fn": torch.nn.functional.mse_loss}
    _, report = cbs.prune_groups(model, (x, y), keep={part: 0.5}, **options)
    (choice,) = report.choices.values()
    assert choice.bound is not None
    assert choice.bound <= choice.loss * (1 + 1e-9)
    assert choice.loss == pytest.approx(choice.bound, rel=1e-3)
    assert "bound" in report.summary()


def test_a_program_too_singular_to_prove_names_the_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "ENUMERATED", 0)
    model, x = built("packed")
    x = torch.randn(60, *x.shape[1:])
    with torch.no_grad():
        y = torch.randn_like(model(x))
    recipe = cbs.GroupRecipe(samples=60, exact_seconds=30.0, damping=1e-12, steps=0)
    options: dict[str, Any] = {"recipe": recipe, "loss_fn": torch.nn.functional.mse_loss}
    with pytest.raises(ArgumentError, match=r"recipe\.damping: 1e-12, with which a program is singular"):
        cbs.prune_groups(model, (x, y), keep={"qkv": 0.5}, **options)


def test_a_set_with_an_ignored_layer_is_left_whole_and_noted() -> None:
    model, _ = built("residual")
    x = torch.randn(60, 3, 10, 10)
    _, report = cbs.prune_groups(model, data(x), keep=0.5, ignore="first.conv2", recipe=FEW)
    assert "stem" not in report.choices
    assert "stem is left whole: first.conv2 is ignored" in report.notes
    assert list(report.choices) == ["second.conv1", "second.conv2"]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ArgumentError, "keep, flops, milliseconds: none given"),
        ({"keep": 0.5, "flops": 0.5}, ArgumentError, "milliseconds: keep and flops given"),
        ({"milliseconds": 1.0}, ArgumentError, "milliseconds: without latency"),
        ({"keep": 0.5, "latency": 1.0}, ArgumentError, "latency: given without milliseconds"),
        ({"milliseconds": 1.0, "latency": 1.0}, ArgumentError, "latency: a float"),
        ({"keep": 1.5}, ArgumentError, "keep: 1.5"),
        ({"keep": {"4": 0.5}}, UnmatchedPatternError, "'4' matches no groups; choose among 0, 2"),
        ({"keep": 0.5, "ignore": "x*"}, UnmatchedPatternError, "'x\\*' matches no layer"),
        ({"keep": 0.5, "ignore": "*"}, ArgumentError, "no groups that may be taken out"),
        ({"flops": 1e-4}, ArgumentError, "flops: .* and the smallest network has"),
        ({"keep": 0.5, "recipe": "fast"}, ArgumentError, "recipe: a str"),
    ],
)
def test_what_cannot_be_done_is_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model, _ = built("mlp")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        cbs.prune_groups(model, data(torch.randn(60, 7)), **options)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_data_that_are_not_finite_are_named_and_nothing_is_changed() -> None:
    model, _ = built("mlp")
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(60, 7)
    x[3, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model, data: NaN or infinity in what .* reads"):
        cbs.prune_groups(model, data(x), keep=0.5)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_reader_that_is_no_plain_layer_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.Flatten()).eval()
    with pytest.raises(UnsupportedProblemError, match=r"2\.weight: read groups"):
        cbs.prune_groups(model, data(torch.randn(60, 3, 5, 5)), keep=0.5, recipe=FEW)


@pytest.mark.parametrize("name", ["transformer", "packed"])
def test_heads_are_chosen_by_what_reads_them(name: str) -> None:
    """Heads that the output projection hardly reads go, and what is left gives nearly the same."""
    model, _ = built(name)
    made = {"transformer": "layers.1.self_attn.out_proj", "packed": "out"}[name]
    head = {"transformer": "layers.1.self_attn", "packed": "qkv"}[name]
    with torch.no_grad():
        model.get_submodule(made).weight[:, 6:18] *= 1e-4
    x = torch.randn(60, 5, 24)
    with torch.no_grad():
        y = model(x) + 0.1 * torch.randn(60, 5, 1)
    recipe = replace(FEW, damping=1e-6)
    options: dict[str, Any] = {"recipe": recipe, "loss_fn": torch.nn.functional.mse_loss}
    small, report = cbs.prune_groups(model, (x, y), keep={head: 0.5}, **options)
    assert report.shrinkage.keep[head].tolist() == [True, False, False, True]
    with torch.no_grad():
        assert float((small(x) - model(x)).abs().max()) < 0.1 * float(model(x).std())
    layer = small.get_submodule(made)
    assert layer.weight.shape == (24, 12)
    assert report.shrinkage.parameters[1] < report.shrinkage.parameters[0]


def test_heads_and_neurons_of_a_transformer_are_cut_together() -> None:
    model, _ = built("transformer")
    x = torch.randn(60, 5, 24)
    options: dict[str, Any] = {"recipe": FEW, "loss_fn": torch.nn.functional.mse_loss}
    small, report = cbs.prune_groups(model, (x, torch.randn(60, 5, 24)), keep=0.5, **options)
    assert {(part.n_keep, part.n_groups) for part in report.choices.values()} == {(2, 4), (20, 40)}
    assert small.layers[0].self_attn.num_heads == 2
    # The fit reaches layers that a fast path would hide.
    assert not small.layers[1].linear2.bias.equal(model.layers[1].linear2.bias)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_heads_that_read_more_than_their_inputs_stay_whole(option: str) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), 1).eval()
    model.layers[0].self_attn = nn.MultiheadAttention(24, 4, batch_first=True, **{option: True}).eval()
    x = torch.randn(60, 5, 24)
    options: dict[str, Any] = {"recipe": FEW, "loss_fn": torch.nn.functional.mse_loss}
    small, report = cbs.prune_groups(model, (x, torch.randn(60, 5, 24)), keep=0.5, **options)
    assert list(report.choices) == ["layers.0.linear1"]
    assert small.layers[0].linear2.weight.shape == (24, 20)
    assert type(small.layers[0].self_attn) is nn.MultiheadAttention


def test_of_two_metrics_the_network_of_the_lower_loss_on_samples_set_aside_stays() -> None:
    model, _ = built("mlp")
    x = torch.randn(400, 7)
    recipes = {metric: cbs.GroupRecipe(samples=256, steps=0, metric=metric) for metric in (None, *METRICS)}
    found = {
        metric: cbs.prune_groups(model, data(x), keep=0.4, recipe=recipe)
        for metric, recipe in recipes.items()
    }
    small, report = found[None]
    assert report.judged.keys() == set(METRICS)
    assert report.metric == min(METRICS, key=report.judged.__getitem__)
    assert f"{report.metric} taken" in report.summary()
    wanted, alone = found[report.metric]
    assert alone.judged == {}
    assert torch.equal(small(x), wanted(x))


def test_without_samples_to_set_aside_one_metric_is_tried() -> None:
    model, _ = built("mlp")
    recipe = cbs.GroupRecipe(samples=256, steps=0)
    _, report = cbs.prune_groups(model, data(torch.randn(200, 7)), keep=0.4, recipe=recipe)
    assert (report.metric, report.judged) == ("loss", {})


def test_one_batch_of_samples_is_too_few_to_move_and_a_note_says_so() -> None:
    model, _ = built("mlp")
    _, report = cbs.prune_groups(model, data(torch.randn(100, 7)), keep=0.4)
    assert report.refined is None
    assert any("no more than 128 samples" in note for note in report.notes)


def test_layers_are_chosen_on_inputs_of_the_network_as_pruned_so_far() -> None:
    """The second set is chosen by what the first one left: the same by a program written out here."""
    model, _ = built("mlp")
    x, damping = torch.randn(300, 7), 1e-3
    recipe = cbs.GroupRecipe(samples=300, metric="outputs", damping=damping, steps=0)
    samples = data(x)
    first, _ = cbs.prune_groups(model, samples, keep={"0": 0.5}, recipe=recipe)
    _, report = cbs.prune_groups(model, samples, keep=0.5, recipe=recipe)
    with torch.no_grad():
        now, wanted = first[:4](x).double().numpy(), model(x).double().numpy()
    rows = np.c_[now, np.ones(300)]
    gram = rows.T @ rows / 300
    dense = np.c_[model[4].weight.detach().numpy(), model[4].bias.detach().numpy()].astype(float)
    level = damping * np.trace(gram) / len(gram)
    system = gram + level * np.eye(len(gram))
    right = wanted.T @ rows / 300 + level * dense

    def loss(kept: tuple[int, ...]) -> float:
        """The least value of the damped squared error over weights on `kept` and a bias."""
        places = [*kept, 9]
        best = np.linalg.solve(system[np.ix_(places, places)], right[:, places].T)
        return -0.5 * float(np.sum(right[:, places].T * best))

    losses = sorted(loss(kept) for kept in combinations(range(9), 4))
    chosen = loss(tuple(np.flatnonzero(report.shrinkage.keep["2"])))
    everything = loss(tuple(range(9)))
    assert report.choices["2"].loss == pytest.approx(chosen - everything, rel=2e-2)
    assert chosen - everything <= 1.1 * (losses[0] - everything)


def test_steps_lower_the_loss_on_samples_set_aside_and_leave_ignored_layers() -> None:
    model, _ = built("mlp")
    x = torch.randn(300, 7)
    with torch.no_grad():
        y = model(x).argmax(1)
    recipe = cbs.GroupRecipe(samples=200, step_samples=300, steps=2)
    fitted, _ = cbs.prune_groups(model, (x, y), keep=0.5, recipe=replace(recipe, steps=0))
    small, report = cbs.prune_groups(model, (x, y), keep=0.5, recipe=recipe)
    assert report.refined is not None
    assert all(after < before for before, after in pairwise(report.refined.losses))
    assert evaluate(small, (x, y)).loss < evaluate(fitted, (x, y)).loss
    assert "Newton step" in report.summary()
    small, _ = cbs.prune_groups(model, (x, y), keep={"0": 0.5}, ignore="4", recipe=recipe)
    assert small[4].weight.equal(model[4].weight)
    assert not small[2].weight.equal(model[2].weight[:, report.shrinkage.keep["0"]])


def test_new_statistics_are_no_newton_step() -> None:
    refined = Refined(losses=(3.0, 2.0, 1.0), samples=9, recalibrated=True)
    assert str(refined).startswith("batch-norm statistics and 1 Newton step on 9 samples")
    assert str(replace(refined, recalibrated=False)).startswith("2 Newton steps on 9 samples")


def test_statistics_that_overflow_leave_the_old_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(*_: object) -> int:
        raise NonFiniteError("data", "leads to infinite statistics", "check the data")

    model, x = built("residual")
    assert isinstance(x, Tensor)
    count = 200
    images = x[:1].repeat(count, *[1] * (x.ndim - 1))
    images = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("cbs_opt.structure.refinement.recalibrate_batchnorm", overflowing)
    recipe = cbs.GroupRecipe(samples=20, step_samples=count, steps=1)
    labels = torch.zeros(count, dtype=torch.int64)
    _, report = cbs.prune_groups(model, (images, labels), keep=0.5, recipe=recipe)
    assert report.refined is not None
    assert not report.refined.recalibrated


def test_without_room_for_rows_there_are_no_steps_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = built("mlp")
    x, y = torch.randn(100, 7), torch.zeros(100, dtype=torch.int64)
    monkeypatch.setattr("cbs_opt.structure.refinement.free_memory", lambda: 1_000)
    _, report = cbs.prune_groups(model, (x, y), keep=0.5, recipe=cbs.GroupRecipe(samples=100))
    assert report.refined is None
    assert any("no Newton steps" in note for note in report.notes)


def test_a_refitted_layer_is_the_least_squares_solution() -> None:
    model, _ = built("mlp")
    x = torch.randn(300, 7)
    recipe = cbs.GroupRecipe(samples=300, damping=1e-9, steps=0)
    small, _ = cbs.prune_groups(model, data(x), keep={"2": 0.5}, recipe=recipe)
    with torch.no_grad():
        rows = torch.cat([small[:4](x), torch.ones(300, 1)], 1).double()
        wanted = torch.linalg.lstsq(rows, model(x).double()).solution
        found = torch.cat([small[4].weight, small[4].bias[:, None]], 1).T.double()
    assert torch.allclose(found, wanted, atol=1e-4)


def test_no_more_batches_are_read_than_second_moments_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """36 places a sample, 27 inputs and a one: a batch of ten lacks 20 rows an input, two have them."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    x = torch.randn(40, 2, 10, 10)
    batches = [Batch(inputs=part) for part in x.split(10)]

    def read(some: Sequence[Batch]) -> list[np.ndarray]:
        loss = moments(model, ["2"], some, lambda output, batch: output.square().mean())
        return [*regression(model, model, "2", some), loss["2"].gram]

    monkeypatch.setattr(reading, "FEWEST_ROWS", 1)
    for per_input, count in ((20, 2), (1000, 4)):
        monkeypatch.setattr(reading, "ROWS_A_COLUMN", per_input)
        whole = reading.inputs_of(model[2], model[:2](x[: 10 * count]).detach()).double()
        for found, own in zip(read(batches), read(batches[:count]), strict=True):
            assert np.allclose(found, own, rtol=1e-12)
        assert np.allclose(read(batches)[2], whole.T @ whole / len(whole))
    assert reading.enough_rows(41) > 1024, (
        "a linear layer of forty neurons reads every sample of a default run"
    )


def test_ignored_layers_are_not_refitted() -> None:
    model, _ = built("mlp")
    small, report = cbs.prune_groups(model, data(torch.randn(60, 7)), keep=0.5, ignore="4", recipe=FEW)
    assert "2 is left whole: 4 is ignored" in report.notes
    assert small[0].weight.shape == (6, 7)
    assert small[4].weight.equal(model[4].weight)
    assert small[4].bias.equal(model[4].bias)


def test_a_recipe_is_checked() -> None:
    for options in (
        {"metric": "x"},
        {"samples": 1},
        {"damping": 0.0},
        {"swaps": -1},
        {"steps": -1},
        {"step_samples": 1},
        {"exact_seconds": -1.0},
    ):
        with pytest.raises(ArgumentError, match="recipe"):
            cbs.GroupRecipe(**options)
    assert np.isfinite(cbs.GroupRecipe().damping)
