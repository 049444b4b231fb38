"""ADMM: projections are nearest points, weights end on levels, units that go leave no trace."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt
from experiments.comparators.admm import (
    Admm,
    Splitting,
    admm,
    best_step,
    largest_rows,
    on_levels,
    purified,
)
from experiments.comparators.subjects import copied
from experiments.comparators.units import (
    CHAINS,
    Units,
    all_kept,
    count_kept,
    remaining,
    unit_masks,
    unused_removed,
)
from experiments.networks import NETWORKS
from formulations.errors import ArgumentError
from tests.experiments.comparators.tiny import Tiny, tiny_network, tiny_subject

CHAIN = (
    Units(made_by="conv.weight", vectors=("norm.weight", "norm.bias"), read_by="fc1.weight", each=16),
    Units(made_by="fc1.weight", vectors=("fc1.bias",), read_by="fc2.weight"),
)
WEIGHTS = ("conv.weight", "fc1.weight", "fc2.weight")


def method(**fields: Any) -> Admm:
    few = {"share": 0.5, "rate": 0.05, "samples": 480, "retraining": 320, "quantising": 160, "batch_size": 16}
    return Admm(**(few | fields))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_projection_on_rows_is_the_nearest_of_all_choices(count: int) -> None:
    values = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(count))
    found = largest_rows(values, count)
    distances = []
    for rows in itertools.combinations(range(5), count):
        other = torch.zeros_like(values)
        other[list(rows)] = values[list(rows)]
        distances.append(float((values - other).norm()))
    assert int(found.flatten(1).any(1).sum()) == count
    assert float((values - found).norm()) == pytest.approx(min(distances))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_values_go_to_the_nearest_level_and_the_step_is_the_best_of_those_tried(bits: int) -> None:
    values = torch.randn(300, generator=torch.Generator().manual_seed(bits))
    step = best_step(values, bits)
    last = 2 ** (bits - 1) - 1
    levels = step * torch.arange(-last, last + 1)
    found = on_levels(values, step, bits)
    nearest = (values[:, None] - levels).abs().amin(1)
    torch.testing.assert_close((values - found).abs(), nearest)
    assert bool(torch.isin(found, levels).all())
    assert on_levels(torch.zeros(3), step, bits).eq(0.0).all()
    error = (values - found).square().sum()
    for other in (0.9 * step, 1.1 * step, float(values.abs().max()) / last):
        assert error <= 1.02 * (values - on_levels(values, other, bits)).square().sum()


def test_weights_that_are_all_zero_have_a_step() -> None:
    assert on_levels(torch.zeros(4), best_step(torch.zeros(4), 8), 8).equal(torch.zeros(4))


def test_on_a_quadratic_the_splitting_comes_to_a_point_of_the_set() -> None:
    target = torch.tensor([[3.0, 1.0], [0.2, 0.4], [-2.0, 1.5]])
    weight = nn.Parameter(torch.zeros(3, 2))
    splitting = Splitting({"w": weight}, lambda _, values: largest_rows(values, 2), method(rho=0.1))
    for _ in range(40):
        for _ in range(30):
            (gradient,) = torch.autograd.grad(
                0.5 * (weight - target).square().sum() + splitting.penalty(), weight
            )
            with torch.no_grad():
                weight -= 0.5 * gradient
        splitting.update()
    torch.testing.assert_close(weight.detach(), largest_rows(target, 2), atol=1e-3, rtol=0.0)
    assert splitting.distance() < 1e-3


def test_units_that_are_masked_can_be_removed_without_a_trace() -> None:
    model = tiny_network(3).model
    nn.init.normal_(model.get_parameter("norm.bias"))
    kept = all_kept(model, CHAIN)
    kept["conv.weight"][[0, 4]] = False
    kept["fc1.weight"][[1, 2, 7]] = False
    cbs_opt.apply_masks(model, unit_masks(model, CHAIN, kept))
    assert remaining(model, CHAIN, kept, WEIGHTS) == 4 * 9 + 5 * 4 * 16 + 3 * 5
    small = Tiny().eval()
    small.conv, small.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4).eval()
    small.fc1, small.fc2 = nn.Linear(64, 5), nn.Linear(5, 3)
    filters, neurons = kept["conv.weight"], kept["fc1.weight"]
    pixels = filters.repeat_interleave(16)
    state = model.state_dict()
    with torch.no_grad():
        small.conv.weight.copy_(state["conv.weight"][filters])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(small.norm, name).copy_(state[f"norm.{name}"][filters])
        small.fc1.weight.copy_(state["fc1.weight"][neurons][:, pixels])
        small.fc1.bias.copy_(state["fc1.bias"][neurons])
        small.fc2.weight.copy_(state["fc2.weight"][:, neurons])
        small.fc2.bias.copy_(state["fc2.bias"])
        x = torch.randn(9, 1, 6, 6)
        torch.testing.assert_close(small(x), model(x))


def test_unused_paths_are_found_from_both_ends_and_leave_the_output_alone() -> None:
    model = tiny_network(2).model
    nn.init.normal_(model.get_parameter("norm.bias"))
    with torch.no_grad():
        model.get_parameter("fc2.weight")[:, [0, 3]] = 0.0  # nothing reads neurons 0 and 3
        others = [1, 2, 4, 5, 6, 7]
        model.get_parameter("fc1.weight")[others, 16:32] = 0.0  # only they read filter 1
        for name in ("conv.weight", "norm.weight", "norm.bias"):
            model.get_parameter(name)[5] = 0.0  # filter 5 is always zero
    x = torch.randn(9, 1, 6, 6)
    before = model(x).detach()
    kept = unused_removed(model, CHAIN, all_kept(model, CHAIN))
    assert (~kept["fc1.weight"]).nonzero().flatten().tolist() == [0, 3]
    assert (~kept["conv.weight"]).nonzero().flatten().tolist() == [1, 5]
    cbs_opt.apply_masks(model, unit_masks(model, CHAIN, kept))
    torch.testing.assert_close(model(x).detach(), before)


def test_a_layer_keeps_one_unit() -> None:
    model = tiny_network().model
    nn.init.zeros_(model.get_parameter("fc2.weight"))
    kept = unused_removed(model, CHAIN, all_kept(model, CHAIN))
    assert [int(keep.sum()) for keep in kept.values()] == [6, 1]
    assert count_kept(8, 0.01) == 1
    assert [count_kept(50, share) for share in (0.02, 0.1, 0.35, 1.0)] == [1, 5, 18, 50]


def test_purification_removes_what_the_loss_does_not_miss() -> None:
    subject = tiny_subject()
    model = subject.network.model
    with torch.no_grad():
        for name in ("conv.weight", "norm.weight", "norm.bias"):
            model.get_parameter(name)[[1, 2]] *= 1e-6
    kept = purified(subject, CHAIN, all_kept(model, CHAIN), 1e-5)
    assert not kept["conv.weight"][[1, 2]].any()
    nothing = purified(tiny_subject(), CHAIN, all_kept(model, CHAIN), 1e9)
    assert all(int(keep.sum()) == 1 for keep in nothing.values())


def test_purification_looks_at_no_more_images_than_it_is_told_to() -> None:
    subject = tiny_subject()
    chain, kept = CHAIN, all_kept(subject.network.model, CHAIN)
    x, y = subject.held_out
    x[7:] = torch.nan  # No loss over all of them has a value that a tolerance allows.
    few = purified(copied(subject), chain, kept, 0.05, judges=7)
    alone = purified(replace(copied(subject), held_out=(x[:7], y[:7])), chain, kept, 0.05)
    assert all(few[name].equal(alone[name]) for name in kept)
    assert not all(keep.all() for keep in few.values())
    with pytest.raises(ArgumentError, match=r"method\.judges"):
        method(judges=0)


def test_the_whole_way_ends_on_levels_with_few_units_and_little_lost() -> None:
    dense = tiny_subject()
    subject = copied(dense)
    outcome = admm(subject, CHAIN, method(bits=4))
    model = subject.network.model
    stages = {stage.name: stage for stage in outcome.stages}
    assert [stage.weights for stage in outcome.stages] == sorted(
        (stage.weights for stage in outcome.stages), reverse=True
    )
    assert stages["rows removed"].weights == 3 * 9 + 4 * 3 * 16 + 3 * 4
    assert int(outcome.kept["conv.weight"].sum()) <= 3
    assert stages["on levels"].accuracy > 90.0
    assert outcome.samples == 480 + 320 + 160
    masks = unit_masks(model, CHAIN, outcome.kept)
    for name, keep in masks.items():
        assert not bool(model.get_parameter(name)[~keep].any())
    for name in WEIGHTS:
        ratio = model.get_parameter(name).detach() / outcome.steps[name]
        torch.testing.assert_close(ratio, ratio.round(), atol=1e-4, rtol=0.0)
        assert float(ratio.abs().max()) <= 7.001


def test_the_chains_of_our_networks_fit_them() -> None:
    for name, spec in NETWORKS.items():
        model = spec.build()
        kept = all_kept(model, CHAINS[name])
        for keep in kept.values():
            keep[0] = False
        masks = unit_masks(model, CHAINS[name], kept)
        assert all(masks[key].shape == model.get_parameter(key).shape for key in masks)
        for units in CHAINS[name]:
            assert len(kept[units.made_by]) * units.each == model.get_parameter(units.read_by).shape[1]


@pytest.mark.parametrize(
    ("field", "value"), [("share", 0.0), ("share", 1.5), ("bits", 1), ("growth", 0.5), ("updates", 0)]
)
def test_bad_settings_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"method\.{field}"):
        method(**{field: value})


def test_the_penalty_is_that_of_the_augmented_lagrangian() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    splitting = Splitting({"w": weight}, lambda _, values: largest_rows(values, 1), method(rho=0.2))
    splitting.update()
    gap: Tensor = weight - splitting.nearest["w"] + splitting.multipliers["w"]
    (gradient,) = torch.autograd.grad(splitting.penalty(), weight)
    torch.testing.assert_close(gradient, splitting.rho * gap.detach())
    assert splitting.rho == pytest.approx(0.3)
