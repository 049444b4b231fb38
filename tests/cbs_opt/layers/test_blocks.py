"""Blocks are found by themselves, named by a glob, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cbs_opt.errors import BlockListError, NoEligibleWeightsError, UnmatchedPatternError
from cbs_opt.layers.blocks import NOT_LINEAR, OUTSIDE, find_blocks
from tests.cbs_opt.layers.networks import WIDTH, Mixer, Network


def test_the_list_with_most_linear_weights_is_found_and_all_else_is_left_out_with_the_reason() -> None:
    network = Network()
    network.small = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    blocks, left_out = find_blocks(network)
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    names = [layer.name for layer in blocks[1].layers]
    assert names == ["layers.1.left.weight", "layers.1.right.weight", "layers.1.out.weight"]
    reasons = {entry.name: entry.reason for entry in left_out}
    assert reasons["head.weight"] == reasons["small.0.weight"] == OUTSIDE
    assert reasons["embedding.weight"] == "embedding"
    pruned = {layer.name for block in blocks for layer in block.layers}
    assert pruned | set(reasons) == {name for name, _ in network.named_parameters()}


def test_a_glob_names_blocks_that_need_not_be_alike() -> None:
    network = Network()
    network.layers[1] = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(
        BlockListError, match=r'layers are of several \(Linear, Mixer\); .*blocks="layers\.\*"'
    ):
        find_blocks(network)
    blocks, _ = find_blocks(network, "layers.*")
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert [layer.name for layer in blocks[1].layers] == ["layers.1.weight"]
    with pytest.raises(UnmatchedPatternError, match=r"'layer.*' matches no module"):
        find_blocks(network, "layer.*")


def test_blocks_of_one_class_are_found_though_their_layers_differ() -> None:
    network = Network()
    network.layers[0].right = nn.Linear(WIDTH, 2 * WIDTH)
    network.layers[2].left = nn.Sequential(nn.Linear(WIDTH, 4), nn.Linear(4, 2 * WIDTH))
    blocks, _ = find_blocks(network)
    assert [len(block.layers) for block in blocks] == [3, 3, 4]


def test_experts_in_a_block_are_part_of_it_however_many_there_are() -> None:
    class Experts(Mixer):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    blocks, _ = find_blocks(Network(block=Experts))
    assert [block.name for block in blocks] == ["layers.0", "layers.1", "layers.2"]
    assert len(blocks[0].layers) == 11


def test_a_network_without_a_list_is_refused() -> None:
    with pytest.raises(BlockListError, match="no list of blocks of one class; name the blocks by a glob"):
        find_blocks(nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))


def test_a_weight_in_two_blocks_is_refused_and_may_be_left_out() -> None:
    network = Network()
    network.layers[2].left.weight = network.layers[0].left.weight
    with pytest.raises(BlockListError, match=r"layers\.0\.left\.weight and layers\.2\.left\.weight are one"):
        find_blocks(network)
    blocks, _ = find_blocks(network, ignore="layers.0.left.weight")
    assert [len(block.layers) for block in blocks] == [2, 3, 2]


def test_nothing_left_to_prune_is_refused() -> None:
    with pytest.raises(NoEligibleWeightsError):
        find_blocks(Network(), ignore="layers.*")


def test_weights_in_blocks_that_are_no_linear_layer_are_listed() -> None:
    class Experts(Mixer):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.ones(2, 3, 4))

    _, left_out = find_blocks(Network(block=Experts))
    assert {e.reason for e in left_out if e.name.endswith("experts")} == {NOT_LINEAR}


def test_a_network_that_is_a_list_itself_is_named_in_words() -> None:
    with pytest.raises(
        BlockListError, match=r'the network itself are of several \(Linear, ReLU\); .*blocks="\*"'
    ):
        find_blocks(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
