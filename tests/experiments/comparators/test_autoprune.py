"""AutoPrune: gradients are those of the method, weights come back, the price decides how many stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import experiments.comparators.autoprune as module
from experiments.comparators.autoprune import (
    SLOPE,
    AutoPrune,
    Gate,
    autoprune,
    coarse_derivative,
    initial_auxiliary,
)
from experiments.comparators.subjects import accuracy, copied, weight_counts
from experiments.ledger import Ledger
from formulations.errors import ArgumentError
from tests.experiments.comparators.tiny import tiny_subject
from tests.experiments.tiny_data import write_mnist


def method(**fields: Any) -> AutoPrune:
    few = {
        "price": 1e-3,
        "gate_rate": 5.0,
        "rate": 0.05,
        "samples": 1_600,
        "retraining": 800,
        "batch_size": 16,
    }
    return AutoPrune(**(few | fields))


def vectors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, auxiliary, gradient = torch.randn(3, 40, generator=generator)
    return weight.requires_grad_(), auxiliary.requires_grad_(), gradient


@pytest.mark.parametrize("coarse", ["softplus", "leaky_relu"])
def test_gradients_are_straight_through_and_blind_to_the_size_of_a_weight(coarse: str) -> None:
    weight, auxiliary, gradient = vectors()
    gated = Gate.apply(weight, auxiliary, coarse)
    stays = auxiliary > 0.0
    assert gated.equal(torch.where(stays, weight, 0.0))
    gated.backward(gradient)
    assert weight.grad is not None
    assert auxiliary.grad is not None
    assert weight.grad.equal(torch.where(stays, gradient, 0.0))
    m = auxiliary.detach().clone().requires_grad_()
    smooth = torch.nn.functional.softplus(m) if coarse == "softplus" else torch.where(m > 0, m, SLOPE * m)
    (derivative,) = torch.autograd.grad(smooth.sum(), m)
    torch.testing.assert_close(auxiliary.grad, weight.sign() * gradient * derivative)
    assert bool((coarse_derivative(auxiliary, coarse) > 0.0).all())
    larger, same = (10.0 * weight.detach()).requires_grad_(), auxiliary.detach().clone().requires_grad_()
    Gate.apply(larger, same, coarse).backward(gradient)
    assert same.grad is not None
    assert same.grad.equal(auxiliary.grad)


def test_all_weights_stay_at_first_in_the_order_of_their_size() -> None:
    weights = {"a": torch.randn(20, 5), "b": 100.0 * torch.randn(7), "zero": torch.zeros(3)}
    auxiliary = initial_auxiliary(weights)
    for name in ("a", "b"):
        assert auxiliary[name].flatten().argsort().equal(weights[name].abs().flatten().argsort())
        assert float(auxiliary[name].detach().square().mean()) == pytest.approx(1.0)
    assert auxiliary["zero"].equal(torch.zeros(3))


@pytest.mark.parametrize("coarse", ["softplus", "leaky_relu"])
def test_a_higher_price_leaves_fewer_weights_and_the_network_learns(coarse: str) -> None:
    dense, kept = tiny_subject(), []
    for price in (0.0, 1e-3, 1e-2):
        subject = copied(dense)
        autoprune(subject, method(price=price, coarse=coarse))
        kept.append(weight_counts(subject.network)[1])
        assert accuracy(subject.network, subject.data) > 90.0
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 3
    assert kept[-1] < 0.5 * weight_counts(dense.network)[0]


def test_weights_come_back_and_cost_counts_the_images_held_out() -> None:
    subject, read = tiny_subject(), 0

    def count(_: object, inputs: tuple[Tensor]) -> None:
        nonlocal read
        read += len(inputs[0])

    subject.network.model.register_forward_pre_hook(count)
    outcome = autoprune(subject, method(price=2e-3))
    assert outcome.recovered > 0
    assert outcome.cost.samples == read
    assert not subject.network.model.training


def test_the_seed_decides_everything() -> None:
    def weights(seed: int) -> Tensor:
        subject = tiny_subject()
        autoprune(subject, method(seed=seed, samples=300, retraining=200))
        return torch.cat([value.detach().flatten() for value in subject.network.model.parameters()])

    assert weights(1).equal(weights(1))
    assert not weights(1).equal(weights(2))


@pytest.mark.parametrize(
    ("field", "value"), [("price", -1.0), ("coarse", "step"), ("samples", 0), ("gate_rate", float("nan"))]
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"method\.{field}"):
        AutoPrune(**({"price": 1e-3} | {field: value}))


def test_the_command_measures_each_cell_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mnist(tmp_path, train=60, test=10)
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify", "--prices", "1e-3"]
    command += ["--coarse", "softplus", "--times", "50", "--samples", "192"]
    command += ["--contenders", "autoprune", "gradual_sgd"]
    assert module.main(command) == 0
    path = tmp_path / "out" / "autoprune.jsonl"
    first = path.read_bytes()
    monkeypatch.setattr(module, "measure", None)
    assert module.main(command) == 0
    assert path.read_bytes() == first
    ours, rival = Ledger(path).results()
    assert ours["contender"] == "autoprune"
    assert ours["n"] == rival["n"] == 430_500
    assert rival["kept"] == 430_500 - round(0.98 * 430_500)
    assert sum(ours["kept_by_layer"].values()) == ours["kept"]
    assert ours["held_out"][0] == rival["held_out"][0]
    assert all(0.0 <= value <= 100.0 for value in ours["held_out"])
    assert module.main([*command, "--seeds", "2", "--data", str(tmp_path / "none")]) == 1
    assert "data_dir" in capsys.readouterr().err
