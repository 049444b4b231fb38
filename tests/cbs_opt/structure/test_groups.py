"""Groups that belong together are found, and what cannot be taken out is named with the reason."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.errors import EmptyDataError, ForwardError
from formulations.errors import ArgumentError
from tests.cbs_opt.structure.networks import NETWORKS, built

EXPECTED = {
    "mlp": {"0": 12, "2": 9},
    "residual": {"stem": 6, "first.conv1": 6, "second.conv1": 10, "second.conv2": 10},
    "padded": {"stem": 6, "first.conv1": 6, "second.conv1": 10},
    "depthwise": {"0": 8, "6": 6, "11": 10},
    "grouped": {"0": 4, "5": 5},
    "transposed": {"0": 6, "2": 8, "5": 4},
    "mixed": {"a": 6, "b": 5, "c": 7, "squeeze": 4, "gated": 8},
    "shuffled": {"a": 2, "c": 6, "up": 4},
    "packed": {"qkv": 4, "out": 24},
    "transformer": {
        "layers.0.self_attn": 4,
        "layers.0.linear1": 40,
        "layers.1.self_attn": 4,
        "layers.1.linear1": 40,
    },
    "decoder": {"layers.0.self_attn": 4, "layers.0.multihead_attn": 4, "layers.0.linear1": 40},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_groups_of_a_network(name: str) -> None:
    model, example = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    structure = cbs.groups(model, example)
    assert {part.name: part.n_groups for part in structure.sets} == EXPECTED[name]
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    table = str(structure)
    assert all(part.name in table for part in structure.sets)


def test_channels_that_are_added_to_one_another_are_one_group() -> None:
    model, example = built("residual")
    stem = cbs.groups(model, example)["stem"]
    assert stem.layers("makes") == ["stem", "first.conv2"]
    assert stem.layers("reads") == ["first.conv1", "second.conv1", "second.downsample.0"]
    assert stem.layers("follows") == ["stem", "first.bn2"]


def test_a_flattened_channel_is_a_block_of_inputs() -> None:
    model, example = built("depthwise")
    (member,) = [entry for entry in cbs.groups(model, example)["6"].members if entry.name == "11.weight"]
    assert member.index.shape == (6, 18)
    assert np.array_equal(member.index[1], np.arange(18, 36))


def test_heads_are_slices_of_query_key_value_and_output() -> None:
    model, example = built("packed")
    heads = cbs.groups(model, example)["qkv"]
    assert heads.kind == "heads"
    made = next(entry for entry in heads.members if entry.name == "qkv.weight")
    assert made.index[1].tolist() == [*range(6, 12), *range(30, 36), *range(54, 60)]
    read = next(entry for entry in heads.members if entry.name == "out.weight")
    assert (read.axis, read.index[1].tolist()) == (1, list(range(6, 12)))


def test_sizes_of_a_group_are_what_the_network_loses_with_it() -> None:
    model, example = built("mlp")
    first = cbs.groups(model, example)["0"]
    assert first.parameters == 7 + 1 + 9
    assert first.flops == 2 * 2 * (7 + 9)


class Sorted(nn.Module):
    """Sorts what a layer gives, so that no output stays in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, -1).values


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (nn.LayerNorm(6), "is normalised over in 1"),
        (nn.Softmax(-1), "is under _softmax in 1"),
        (Sorted(), "passes sort, which cannot be followed, in 1"),
    ],
)
def test_what_mixes_channels_keeps_them_whole_and_is_named(middle: nn.Module, reason: str) -> None:
    structure = cbs.groups(nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 2)), torch.randn(3, 4))
    assert not structure.sets
    assert {entry.name: entry.reason for entry in structure.whole}["0"] == reason
    with pytest.raises(ArgumentError, match=reason):
        structure["0"]


def test_groups_that_reach_the_output_stay() -> None:
    structure = cbs.groups(nn.Linear(4, 6), torch.randn(3, 4))
    assert [(entry.outputs, entry.reason) for entry in structure.whole] == [
        (6, "reaches the output of the network")
    ]


class Twice(nn.Module):
    """Calls one layer twice, so that its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.shared, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.shared(self.shared(self.into(x))))


def test_a_module_that_is_called_twice_couples_its_inputs_with_its_outputs() -> None:
    (part,) = cbs.groups(Twice(), torch.randn(3, 3)).sets
    assert part.layers("makes") == ["into", "shared"]
    assert part.layers("reads") == ["shared", "out"]


def test_a_network_that_raises_is_told_with_its_module() -> None:
    model, _ = built("mlp")
    with pytest.raises(ForwardError, match="0 raised RuntimeError"):
        cbs.groups(model, torch.randn(2, 5))


def test_the_mode_of_a_network_is_kept() -> None:
    model, example = built("residual")
    model.train()
    before = model.state_dict()["first.bn1.running_mean"].clone()
    cbs.groups(model, example)
    assert all(module.training for module in model.modules())
    assert model.state_dict()["first.bn1.running_mean"].equal(before)


def test_an_example_of_no_sample_is_refused_by_name() -> None:
    model, example = built("mlp")
    assert isinstance(example, torch.Tensor)
    for call in (cbs.groups, cbs.measure_latency, partial(cbs.shrink, keep={})):
        with pytest.raises(EmptyDataError, match="example"):
            call(model, example[:0])
