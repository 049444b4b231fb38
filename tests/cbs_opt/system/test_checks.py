"""Checks at the border: seeds have one range for all of them, and messages stay short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cbs_opt as cbs
from cbs_opt.curvature.layer_inputs import input_moments
from cbs_opt.demo import digits_network
from cbs_opt.network.partition import Partition
from cbs_opt.select.scores import randomized_magnitude
from cbs_opt.system.checks import RUN_SEEDS, one_of, seed_number
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import data, network

BORDERS: dict[str, Callable[[int], Any]] = {
    "fisher_blocks": lambda seed: cbs.fisher_blocks(
        network(), data(), loss_fn=None, seed=seed, progress=False
    ),
    "input_moments": lambda seed: input_moments(
        network(), data(), Partition.from_model(network()), samples=10, seed=seed
    ),
    "prune": lambda seed: cbs.prune(network(), data(), sparsity=0.5, seed=seed, progress=False),
    "prune_groups": lambda seed: cbs.prune_groups(network(), data(), keep=0.5, seed=seed),
    "LayerRecipe": lambda seed: cbs.LayerRecipe(seed=seed),
    "Divergence": lambda seed: cbs.Divergence(seed=seed),
    "RowSample": lambda seed: cbs.RowSample(seed=seed),
    "randomized_magnitude": lambda seed: randomized_magnitude(torch.ones(4), 2, seed=seed),
    "digits_network": lambda seed: digits_network(seed=seed),
}


@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_out_of_range_are_refused_by_name(border: str, seed: int) -> None:
    with pytest.raises(ArgumentError, match="seed"):
        BORDERS[border](seed)


def test_the_largest_seed_of_a_run_leaves_room_for_those_of_its_passes() -> None:
    largest = RUN_SEEDS - 1
    assert seed_number("seed", largest, below=RUN_SEEDS) == largest
    with pytest.raises(ArgumentError, match=f"below {RUN_SEEDS}"):
        cbs.prune(network(), data(), sparsity=0.5, seed=RUN_SEEDS, progress=False)
    assert cbs.prune(network(), data(), sparsity=0.5, seed=largest, progress=False).n_prune > 0


def test_messages_show_the_ends_of_long_values_and_name_the_choices() -> None:
    with pytest.raises(ArgumentError) as caught:
        one_of("recipe", "# a whole file\n" * 100, ["fast", "best"])
    message = str(caught.value)
    assert len(message) < 150
    assert message.startswith("recipe: '# a whole file")
    assert message.endswith("choose among fast, best")
