"""A shrunk network computes what the masked one does, and is one that can be saved, loaded and exported."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.errors import StructureError
from cbs_opt.network.data import forward
from formulations.errors import ArgumentError
from tests.cbs_opt.structure.networks import (
    NETWORKS,
    Packed,
    Residual,
    built,
    masking,
    random_keep,
    randomised,
    relative,
)

SAMPLES = 100


def output(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        found = forward(model, inputs)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shrunk_network_computes_what_the_masked_one_does(name: str) -> None:
    model, example = built(name)
    structure = cbs.groups(model, example)
    keep = random_keep(structure)
    before = copy.deepcopy(model.state_dict())
    small, record = cbs.shrink(model, example, keep=keep)
    inputs = NETWORKS[name][1](SAMPLES)
    with masking(model, structure, keep):
        wanted = output(model, inputs)
    assert relative(wanted, output(small, inputs)) < 1e-5
    assert relative(output(model, inputs), wanted) > 1e-3
    assert all((record.keep[part] <= mask).all() for part, mask in keep.items())
    assert record.parameters[1] == sum(entry.numel() for entry in small.parameters()) < record.parameters[0]
    assert record.parameters[1] == structure.parameters_of(record.keep)
    assert record.flops[1] == pytest.approx(structure.flops_of(record.keep))
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["residual", "depthwise", "transposed", "packed", "transformer"])
def test_a_shrunk_network_is_saved_loaded_and_exported(name: str) -> None:
    model, example = built(name)
    keep = random_keep(cbs.groups(model, example))
    small, _ = cbs.shrink(model, example, keep=keep)
    again = copy.deepcopy(small)
    with torch.no_grad():
        for entry in again.parameters():
            entry.zero_()
    again.load_state_dict(small.state_dict())
    assert output(again, example).equal(output(small, example))
    exported = torch.export.export(small, (example,)).module()
    assert relative(output(small, example), output(exported, example)) < 1e-5


def test_gradients_flow_through_a_shrunk_network() -> None:
    model, example = built("transformer")
    small, _ = cbs.shrink(model, example, keep=random_keep(cbs.groups(model, example)))
    small.train()(example).square().sum().backward()
    assert all(entry.grad is not None for entry in small.parameters())


@pytest.mark.parametrize("weights", [True, False])
def test_attention_without_heads_takes_masks_as_the_whole_one_does(weights: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 40, batch_first=True), 1).eval()
    example = torch.randn(3, 5, 24)
    structure = cbs.groups(model, example)
    keep = {"layers.0.self_attn": np.array([True, False, True, True])}
    small, _ = cbs.shrink(model, example, keep=keep)
    padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    whole, cut = model.layers[0].self_attn, small.layers[0].self_attn
    options = {"key_padding_mask": padding, "attn_mask": causal, "need_weights": weights}
    full = {part.name: np.ones(part.n_groups, dtype=bool) for part in structure.sets}
    with masking(model, structure, full | keep), torch.no_grad():
        wanted, _ = whole(example, example, example, **options)
        found, attention = cut(example, example, example, **options)
    assert relative(wanted, found) < 1e-5
    assert (attention is not None) == weights


def test_constants_that_nothing_feeds_are_folded_into_biases() -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=False), nn.Flatten()
    model = randomised(nn.Sequential(*layers, nn.Linear(20, 2)))
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[1].running_mean[:2] = -1.0
    inputs = torch.randn(SAMPLES, 3, 6, 6)
    small, record = cbs.shrink(model, inputs[:2])
    assert record.keep["0"].tolist() == [False] * 2 + [True] * 4
    assert small[3].bias is not None
    assert relative(output(model, inputs), output(small, inputs)) < 1e-5


def test_a_constant_that_padding_cuts_off_stays_and_is_named() -> None:
    torch.manual_seed(0)
    model = randomised(nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1)))
    with torch.no_grad():
        model[0].weight[:2] = 0.0
        model[0].bias[0] = -1.0
    inputs = torch.randn(SAMPLES, 3, 6, 6)
    small, record = cbs.shrink(model, inputs[:2])
    assert record.keep["0"].tolist() == [False] + [True] * 5
    assert len(record.notes) == 1
    assert "0[1] has no input, but stays: 2.weight pads it with zeros" in record.notes[0]
    assert relative(output(model, inputs), output(small, inputs)) < 1e-5


def test_a_removal_leads_to_others() -> None:
    """What nobody reads takes along what only it reads; what nothing feeds, what it alone feeds."""
    model, example = built("mlp")
    with torch.no_grad():
        model[4].weight[:, 3] = 0.0
        model[2].weight[:, 5] = 0.0
        model[2].weight[3, 5] = 1.0
        model[0].weight[1] = 0.0
        model[2].weight[7] = 0.0
        model[2].weight[7, 1] = 1.0
    inputs = torch.randn(SAMPLES, 7)
    small, record = cbs.shrink(model, example)
    assert np.flatnonzero(~record.keep["0"]).tolist() == [1, 5]
    assert np.flatnonzero(~record.keep["2"]).tolist() == [3, 7]
    assert relative(output(model, inputs), output(small, inputs)) < 1e-5


def test_a_zero_scale_takes_its_channel_along() -> None:
    model, example = built("depthwise")
    with torch.no_grad():
        model[1].weight[2] = 0.0
        model[4].weight[5] = 0.0
    model = model.eval()
    _, record = cbs.shrink(model, example)
    # The constants behind the scales pass a convolution that pads with zeros, or one that reads everything.
    assert not record.keep["0"][5]
    assert np.flatnonzero(~record.keep["0"]).tolist() in ([5], [2, 5])


def test_leftovers_below_a_threshold_count_as_zero() -> None:
    model, example = built("mlp")
    with torch.no_grad():
        model[2].weight[:, 4] = 1e-6
    assert cbs.shrink(model, example)[1].keep["0"].all()
    assert np.flatnonzero(~cbs.shrink(model, example, threshold=1e-5)[1].keep["0"]).tolist() == [4]


def test_an_axis_is_never_empty() -> None:
    model, example = built("mlp")
    with torch.no_grad():
        model[2].weight.zero_()
    small, record = cbs.shrink(model, example)
    inputs = torch.randn(SAMPLES, 7)
    assert record.keep["0"].sum() == 1
    assert relative(output(model, inputs), output(small, inputs)) < 1e-5


class Stated(nn.Module):
    """States the width of its hidden layer in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(self.one(x).view(-1, 6))
        return y


def test_a_size_in_the_code_is_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.ReLU(), Stated())
    before = copy.deepcopy(model.state_dict())
    keep = {"1.one": np.array([True] * 5 + [False])}
    with pytest.raises(StructureError, match=r"1(\.two)? raised RuntimeError"):
        cbs.shrink(model, torch.randn(3, 4), keep=keep)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


def test_a_size_among_the_attributes_is_changed() -> None:
    torch.manual_seed(0)
    model = Packed().eval()
    model.n_heads = 6
    keep = {"qkv": np.array([True, False, True, True, True, True])}
    small, _ = cbs.shrink(model, torch.randn(2, 7, 24), keep=keep)
    assert (small.n_heads, model.n_heads) == (5, 6)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"9": np.ones(3, dtype=bool)}, "'9', of which there are no groups"),
        ({"4": np.ones(3, dtype=bool)}, r"it reaches the output of the network"),
        ({"0": np.ones(3, dtype=bool)}, r"keep\['0'\]: bool of shape \(3,\) for 12 groups"),
        ({"0": np.ones(12)}, r"keep\['0'\]: float64"),
        ({"0": np.zeros(12, dtype=bool)}, "no group is kept"),
        ([1], "a list"),
    ],
)
def test_masks_that_do_not_fit_are_refused(keep: Any, message: str) -> None:
    model, example = built("mlp")
    with pytest.raises(ArgumentError, match=message):
        cbs.shrink(model, example, keep=keep)


class Drawn(nn.Module):
    """A network drawn at random: convolutions of many kinds, with additions, and a classifier."""

    def __init__(self, kinds: list[str], width: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.parts = nn.ModuleList()
        for kind in kinds:
            groups = {"depthwise": width, "grouped": 2}.get(kind, 1)
            wide = width + 3
            if kind == "bottleneck":
                inside = nn.Conv2d(width, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, width, 1)
                self.parts.append(nn.Sequential(*inside))
            elif kind == "transposed":
                self.parts.append(nn.ConvTranspose2d(width, width, 3, padding=1))
            else:
                self.parts.append(nn.Conv2d(width, width, 3, padding=1, groups=groups))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for kind, part in zip(self.kinds, self.parts, strict=True):
            x = x + part(x) if kind in ("bottleneck", "residual") else part(torch.relu(x))
        y: Tensor = self.head(torch.relu(self.norm(x)).mean((2, 3)))
        return y


KINDS = ("plain", "depthwise", "grouped", "bottleneck", "residual", "transposed")


def require_agreement(kinds: list[str], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = randomised(Drawn(kinds, width))
    inputs = torch.randn(SAMPLES, 3, 5, 5)
    structure = cbs.groups(model, inputs[:2])
    keep = random_keep(structure, seed)
    small, record = cbs.shrink(model, inputs[:2], keep=keep)
    with masking(model, structure, keep):
        assert relative(output(model, inputs), output(small, inputs)) < 1e-5
    assert record.parameters[1] < record.parameters[0]


ARCHITECTURES = (
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.sampled_from([4, 6, 8]),
    st.integers(0, 2**16),
)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(*ARCHITECTURES)
def test_networks_of_any_architecture(kinds: list[str], width: int, seed: int) -> None:
    require_agreement(kinds, width, seed)


@pytest.mark.slow
@settings(max_examples=50, deadline=None, derandomize=True)
@given(*ARCHITECTURES)
def test_networks_of_any_architecture_at_length(kinds: list[str], width: int, seed: int) -> None:
    require_agreement(kinds, width, seed)


def test_masks_of_single_weights_lose_no_output() -> None:
    torch.manual_seed(1)
    model = randomised(Residual())
    with torch.no_grad():
        for entry in model.parameters():
            if entry.ndim == 4:
                entry.mul_(torch.rand_like(entry) < 0.02)
    inputs = torch.randn(SAMPLES, 3, 10, 10)
    small, record = cbs.shrink(model, inputs[:2])
    assert record.parameters[1] < record.parameters[0]
    assert relative(output(model, inputs), output(small, inputs)) < 1e-5
