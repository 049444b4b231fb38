"""Writing weights back: all of them or none; and trying them without writing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import TrialNetwork, write_back
from formulations.errors import CbsError, NonFiniteError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot


def test_only_the_chosen_parameters_change_and_in_place() -> None:
    model = network()
    before = snapshot(model)
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    partition = Partition.from_model(model, target="3.weight", blocks="layer")
    write_back(model, partition, torch.arange(24.0))
    assert model[3].weight.flatten().tolist() == list(range(24))
    for name, tensor in model.state_dict().items():
        assert name == "3.weight" or tensor.equal(before[name])
    assert pointers == {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    assert model[3].weight.requires_grad


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_write_restores_everything(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], at: int
) -> None:
    model = network()
    before = snapshot(model)
    partition = Partition.from_model(model, blocks="layer")
    original = torch.Tensor.copy_
    calls = []

    def interrupted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(self)
        if len(calls) == at:
            original(self.view(-1)[:3], torch.zeros(3))  # half written
            raise error
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(error):
        write_back(model, partition, torch.zeros(72))
    monkeypatch.undo()
    assert len(calls) > at
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("dtype", "bad"), [(torch.float32, float("nan")), (torch.float32, 1e300), (torch.float16, 1e5)]
)
def test_weights_that_are_not_finite_are_not_written(dtype: torch.dtype, bad: float) -> None:
    model = network(dtype=dtype)
    before = snapshot(model)
    weights = torch.zeros(72, dtype=torch.float64)
    weights[50] = bad
    with pytest.raises(NonFiniteError, match=r"3\.weight"):
        write_back(model, Partition.from_model(model, blocks="layer"), weights)
    assert_untouched(model, before)


def test_a_vector_of_another_network_is_refused() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(CbsError):
        write_back(model, Partition.from_model(model), torch.zeros(71))
    with pytest.raises(CbsError):
        write_back(nn.Linear(3, 3), Partition.from_model(model), torch.zeros(72))
    assert_untouched(model, before)


def test_a_trial_gives_the_output_that_writing_would() -> None:
    model = network()
    before = snapshot(model)
    partition = Partition.from_model(model)
    weights = torch.linspace(-1, 1, 72, dtype=torch.float64)
    x, _ = data()
    trial = TrialNetwork(model, partition, weights).eval()(x)
    assert_untouched(model, before)
    write_back(model, partition, weights)
    torch.testing.assert_close(trial, model(x), rtol=0.0, atol=0.0)


def test_a_trial_follows_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    model = Tied().eval()
    partition = Partition.from_model(model)
    assert partition.n == 16
    weights = torch.linspace(-1, 1, 16)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    trial = TrialNetwork(model, partition, weights)(x)
    write_back(model, partition, weights)
    torch.testing.assert_close(trial, model(x), rtol=0.0, atol=0.0)
    assert model.first.weight is model.second.weight
