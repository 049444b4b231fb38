"""`pruned`: a copy is pruned as the network would have been, and the network stays as it was."""

from __future__ import annotations

import threading

import pytest
import torch

from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.pruning import prune, pruned
from cbs_opt.recipe.records import Recipe
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

RECIPE = Recipe(curvature=EmpiricalFisher(samples=24))


def test_a_copy_is_pruned_to_the_same_bits() -> None:
    model, other = network(), network()
    before = snapshot(model)
    small, report = pruned(model, data(), sparsity=0.5, recipe=RECIPE)
    assert_untouched(model, before)
    prune(other, data(), sparsity=0.5, recipe=RECIPE)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), other.parameters(), strict=True))
    mine = {parameter.data_ptr() for parameter in model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in small.parameters()}
    zeros = sum(int((parameter == 0).sum()) for parameter in small.parameters())
    assert zeros == report.n_prune


def test_a_network_that_cannot_be_copied_is_refused_at_once() -> None:
    model = network()
    model.lock = threading.Lock()
    with pytest.raises(ArgumentError, match=r"model: it cannot be copied .*use prune"):
        pruned(model, None, sparsity=0.5)
