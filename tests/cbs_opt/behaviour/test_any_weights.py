"""`prune` on networks of every kind of weight: what goes, what is left, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import cbs_opt as cbs
from cbs_opt.network import eligible
from cbs_opt.network.masks import apply_masks
from tests.cbs_opt.small_network import data, network, snapshot

FEW = cbs.Recipe(curvature=cbs.EmpiricalFisher(samples=40))


def pruned(model: nn.Module, train: Any, **options: Any) -> cbs.PruneReport:
    return cbs.prune(model, train, **{"sparsity": 0.5, "recipe": FEW, "progress": False} | options)


def test_the_report_has_what_was_left_out_and_the_sparsity_of_the_whole() -> None:
    model = network()
    report = pruned(model, data())
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert report.n + sum(entry.n for entry in report.left_out) == whole
    assert report.network_sparsity == report.n_prune / whole < report.sparsity
    text = report.summary()
    assert f"{report.network_sparsity:.4f} of the whole network" in text
    assert "left out: bias: 3 parameters, 19 weights; normalisation: 1 parameter, 8 weights" in text
    again = cbs.PruneReport.from_dict(report.to_dict())
    assert (again.left_out, again.notes, again.warnings) == (report.left_out, report.notes, report.warnings)


def test_reports_of_the_version_before_are_read() -> None:
    document = pruned(network(), data()).to_dict() | {"version": 2}
    for name in ("left_out", "notes", "warnings"):
        del document[name]
    assert cbs.PruneReport.from_dict(document).left_out == ()


def test_a_wrapped_network_is_pruned_under_its_own_names() -> None:
    expected = network()
    masks = pruned(expected, data()).masks
    for wrap in (nn.DataParallel, torch.compile):
        model = network()
        report = pruned(wrap(model), data())
        assert all(torch.equal(report.masks[name], keep) for name, keep in masks.items())
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        apply_masks(model, report.masks)


def test_a_weight_normed_direction_is_left_alone_and_named() -> None:
    model = network()
    parametrizations.weight_norm(model[0])
    before = snapshot(model)
    report = pruned(model, data(), sparsity=0.9)
    assert {layer.name for layer in report.layers} == {"3.weight"}
    names = {entry.name for entry in report.left_out if entry.reason == eligible.WEIGHT_NORM}
    assert names == {"0.parametrizations.weight.original0", "0.parametrizations.weight.original1"}
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items() if "0." in name
    )
    assert bool(torch.isfinite(model(data()[0])).all())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 4, batch_first=True)
        self.up = nn.ConvTranspose1d(4, 3, 2, stride=2)
        self.head = nn.Linear(3 * 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.lstm(x.unsqueeze(-1))
        y: Tensor = self.head(self.up(hidden.mT).tanh().flatten(1))
        return y


def test_zeros_are_where_the_masks_say_in_layers_of_every_order() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    report = pruned(model, data())
    assert [layer.name for layer in report.layers] == [
        "lstm.weight_ih_l0",
        "lstm.weight_hh_l0",
        "up.weight",
        "head.weight",
    ]
    tensors = dict(model.named_parameters())
    for name, keep in report.masks.items():
        assert keep.shape == tensors[name].shape
        assert torch.equal(tensors[name] == 0.0, ~keep)
    assert sum(int((~keep).sum()) for keep in report.masks.values()) == report.n_prune == report.n // 2
    assert any("lstm.weight_ih_l0" in note for note in report.notes)


def test_the_loss_of_transposed_layers_is_that_which_was_predicted() -> None:
    """Rows, moments and weights agree on their order: pruning nothing predicts and changes nothing."""
    torch.manual_seed(0)
    model = Recurrent().eval()
    x, y = data()
    outputs = model(x).detach()
    report = pruned(model, (x, y), sparsity=0.0)
    torch.testing.assert_close(model(x).detach(), outputs)
    assert report.predicted_loss_increase == pytest.approx(0.0, abs=1e-12)


def test_rows_of_transposed_layers_are_their_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ConvTranspose1d(2, 3, 2), nn.Flatten()).eval()
    x, y = data(5)
    partition = cbs.Partition.from_model(model)
    rows = cbs.gradient_rows(
        model,
        (x, y),
        nn.functional.cross_entropy,
        partition,
        curvature=cbs.EmpiricalFisher(samples=5),
        progress=False,
    )
    loss = nn.functional.cross_entropy(model(x), y)
    (gradient,) = torch.autograd.grad(loss, [model[1].weight])
    torch.testing.assert_close(partition.split(rows.gradient)["1.weight"], gradient)
    torch.testing.assert_close(rows.rows.sum(0) / 5**0.5, rows.gradient)


def test_sparsity_by_pattern_leaves_the_rest_alone() -> None:
    model = network()
    before = snapshot(model)
    report = pruned(model, data(), sparsity={"3.*": 0.75})
    assert {layer.name: layer.n_prune for layer in report.layers} == {"0.weight": 0, "3.weight": 18}
    assert report.n_prune == 18
    assert report.requested_sparsity == pytest.approx(18 / 72)
    assert int((model[0].weight == 0.0).sum()) == 0
    assert report.partition == "layer"
    again = network()
    assert report.request is not None
    assert report.request.recipes[0].weights.budget == {"3.*": 0.75, "*": 0.0}
    second = pruned(again, data(), sparsity=report.request.sparsity, recipe=report.request.recipes)
    assert all(torch.equal(report.masks[name], keep) for name, keep in second.masks.items())
    assert not torch.equal(before["3.weight"], model[3].weight)


def test_the_first_pattern_counts_and_stages_end_at_the_shares() -> None:
    report = pruned(network(), data(), sparsity={"0.*": 0.25, "*": 0.5})
    assert [layer.n_prune for layer in report.layers] == [12, 12]
    staged = pruned(network(), data(), sparsity={"0.*": 0.25, "*": 0.5}, stages=2)
    assert [layer.n_prune for layer in staged.layers] == [12, 12]


def test_a_uniform_budget_is_uniform_by_default() -> None:
    recipe = cbs.Recipe(curvature=FEW.curvature, weights=cbs.Weights(budget="uniform"))
    report = pruned(network(), data(), recipe=recipe)
    assert [layer.n_prune for layer in report.layers] == [24, 12]


def test_a_budget_that_contradicts_the_sparsity_is_refused_with_both() -> None:
    recipe = cbs.Recipe(weights=cbs.Weights(budget={"0.*": 0.9, "*": 0.7}))
    with pytest.raises(cbs.CbsError, match=r"weights\.budget: it comes to 0\.8333 where sparsity=0\.5"):
        pruned(network(), data(), recipe=recipe)


def test_a_broken_network_is_said_to_be_one(caplog: pytest.LogCaptureFixture) -> None:
    """The first layer has small weights, and magnitude takes all of them."""
    x, _ = data()
    y = (x[:, 0] > 0.0).long()
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 2, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(1e-3 * torch.eye(6))
        model[1].weight.copy_(1e4 * torch.tensor([[-1.0], [1.0]]) * torch.eye(6)[0] + 1.0)
    magnitude = cbs.Recipe(select=cbs.Magnitude(), update=None)
    report = pruned(model, (x, y), sparsity=36 / 48, recipe=magnitude, evaluate=(x, y))
    assert report.train_before is not None
    assert report.train_before.accuracy == 1.0
    assert len(report.warnings) == 2
    for warning in report.warnings:
        assert "no better than a guess" in warning
        assert "stages" in warning
        assert warning in report.summary()
        assert warning in caplog.text


def test_inputs_of_another_precision_are_those_of_the_network() -> None:
    expected, model = network(), network()
    x, y = data()
    masks = pruned(expected, (x, y)).masks
    found = pruned(model, (x.double(), y)).masks
    assert all(torch.equal(masks[name], keep) for name, keep in found.items())


def test_a_layer_that_the_loss_does_not_see_is_named() -> None:
    model = network()
    model.register_module("unused", nn.Linear(3, 3))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))  # type: ignore[method-assign]
    report = pruned(model, data())
    assert [note for note in report.notes if "does not depend" in note] == [
        "the loss does not depend on unused.weight, as far as the samples say"
    ]


def test_wide_layers_leave_the_term_out_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbs_opt.curvature.layer_inputs.TERM_WORK", 1.0)
    report = pruned(network(), data())
    assert report.layer_inputs == 0.0
    assert any("layer_inputs=1" in note and note in report.summary() for note in report.notes)
