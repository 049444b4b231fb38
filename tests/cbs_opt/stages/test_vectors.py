"""Biases and norms that move with the kept weights: which do, when, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cbs_opt as cbs
from cbs_opt.network.eligible import trainable_vectors
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.records import FineTuning, Recipe, Stages, Weights
from cbs_opt.report.record import PruneReport
from tests.cbs_opt.small_network import data, network, snapshot

VECTORS = ("0.bias", "1.weight", "1.bias", "3.bias")
BIASES = ("0.bias", "2.bias")


def without_norm(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The small network without its batch normalisation."""
    first, _, *others = network(dtype=dtype)
    return nn.Sequential(first, *others).eval()


def tuned(model: nn.Module, *, ignore: tuple[str, ...] = (), **options: Any) -> PruneReport:
    """Prune in two stages with fine-tuning of weights and vectors."""
    on_stage = options.pop("on_stage", None)
    plan = FineTuning(samples=400, batch_size=16, vectors=True, momentum_rates=(0.2,), **options)
    return cbs.prune(
        model,
        data(),
        sparsity=0.6,
        recipe=Recipe(layer_inputs=0.0, weights=Weights(ignore=ignore), recalibrate=plan.batch_statistics),
        stages=Stages(count=2, updates=1, final_updates=0, fine_tuning=plan, on_stage=on_stage),
        progress=False,
    )


def test_vectors_are_what_has_one_axis_and_is_free_to_move() -> None:
    model = network()
    left_out = Partition.from_model(model).left_out
    assert trainable_vectors(model, left_out) == VECTORS
    model.get_parameter("0.bias").requires_grad_(False)
    left_out = Partition.from_model(model, target="0.weight", ignore="1.*").left_out
    assert trainable_vectors(model, left_out) == ("3.bias",)


def test_a_wider_partition_has_the_weights_first_and_vectors_as_they_are() -> None:
    model = network()
    partition = Partition.from_model(model, blocks="global")
    wide = partition.widened(model, VECTORS)
    assert wide.n == partition.n + sum(model.get_parameter(name).numel() for name in VECTORS)
    flat = wide.flatten(model)
    assert flat[: partition.n].equal(partition.flatten(model))
    for name, part in wide.split(flat).items():
        assert part.equal(model.get_parameter(name))
    assert partition.widened(model, ()) == partition


@pytest.mark.parametrize("batches", [False, True])
def test_vectors_move_in_the_end_and_the_report_says_so(batches: bool) -> None:
    model, vectors = (network(), VECTORS) if batches else (without_norm(), BIASES)
    before = snapshot(model)
    seen = []

    def look(result: Any) -> None:
        seen.append(result.network.model.state_dict()[vectors[-1]].clone())
        assert all(before[name].equal(value) for name, value in model.state_dict().items())

    report = tuned(model, batch_statistics=batches, on_stage=look)
    after = model.state_dict()
    assert all(not after[name].equal(before[name]) for name in vectors)
    assert seen[-1].equal(after[vectors[-1]])
    zeros = sum(int((after[name] == 0.0).sum()) for name in report.masks)
    assert zeros == report.n_prune
    assert report.moved == vectors
    assert f"moved with the kept weights: {', '.join(vectors)}" in report.summary()
    assert PruneReport.from_dict(report.to_dict()).moved == vectors
    assert report.recalibrated is batches
    loss = evaluate(model, data(), nn.functional.cross_entropy).loss
    assert loss == pytest.approx(report.train_after.loss, rel=1e-5)


def test_vectors_stay_where_batch_normalisation_keeps_its_statistics() -> None:
    model = network()
    before = snapshot(model)
    report = tuned(model)
    assert report.moved == ()
    assert all(model.state_dict()[name].equal(before[name]) for name in VECTORS)
    assert any(record.rate_kind and record.accepted for record in report.stages)


def test_ignored_and_frozen_vectors_stay() -> None:
    model = network()
    model.get_parameter("3.bias").requires_grad_(False)
    before = snapshot(model)
    report = tuned(model, ignore=("1.*",), batch_statistics=True)
    after = model.state_dict()
    assert [name for name in VECTORS if not after[name].equal(before[name])] == ["0.bias"]
    assert report.moved == ("0.bias",)


def test_half_precision_goes_on_where_it_was_stopped(tmp_path: Any) -> None:
    def prune(model: nn.Module, **more: Any) -> PruneReport:
        plan = FineTuning(samples=200, batch_size=16, vectors=True)
        stages = Stages(count=2, updates=1, final_updates=0, fine_tuning=plan, **more)
        recipe = Recipe(layer_inputs=0.0)
        where = {"run_dir": tmp_path / "run", "progress": False}
        return cbs.prune(model, data(), sparsity=0.5, recipe=recipe, stages=stages, **where)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    model, again = without_norm(torch.bfloat16), without_norm(torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        prune(model, on_stage=stop)
    prune(model)
    assert not model.get_parameter("0.bias").equal(again.get_parameter("0.bias"))
    prune(again)
    assert all(again.state_dict()[name].equal(value) for name, value in model.state_dict().items())


def test_a_recipe_by_name_moves_them_unless_told_not_to() -> None:
    said = {}
    for vectors in (True, False):
        model = network()
        before = snapshot(model)
        recipe = cbs.best(samples=2_500, vectors=vectors)
        report = cbs.prune(model, data(800), sparsity=0.9, recipe=recipe, progress=False)
        moved = [name for name in VECTORS if not model.state_dict()[name].equal(before[name])]
        assert tuple(moved) == report.moved == (VECTORS if vectors else ())
        said[vectors] = " ".join(report.choices)
    assert "biases and norms with the weights" in said[True]
    assert "biases" not in said[False]
