"""Pruning in stages: exact counts, no step worse than its alternatives, runs that resume bit for bit."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher, Fisher, SketchedFisher
from cbs_opt.curvature.layer_inputs import input_moments, matched_term
from cbs_opt.errors import RunMismatchError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Certify, Recipe, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import GreedyOBS, SwapSearch
from cbs_opt.report.files import load_report, save_report
from cbs_opt.report.record import PruneReport
from cbs_opt.stages.model import StageModel
from cbs_opt.stages.state import StageResult
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

pytestmark = pytest.mark.usefixtures("without_pictures")

N = 72
ELIGIBLE = ("0.weight", "3.weight")
BASE = Recipe(curvature=EmpiricalFisher(samples=20), select="obs")
DAMPINGS = (0.1, 1.0, 10.0)
SCALES = (0.5, 1.0)
STAGES = Stages(count=3, updates=2, final_updates=2)


def run(
    model: nn.Module,
    train: Any = None,
    *,
    dampings: Sequence[Any] = DAMPINGS,
    updates: Sequence[Any] = tuple(Update(scale=scale) for scale in SCALES),
    plan: Stages = STAGES,
    **options: Any,
) -> PruneReport:
    """Prune in stages; fields of recipe and stages may stand beside the arguments of `prune`."""
    names = [name for name in options if name in Recipe.__dataclass_fields__]
    base = replace(BASE, **{name: options.pop(name) for name in names})
    names = [name for name in options if name in Stages.__dataclass_fields__]
    plan = replace(plan, **{name: options.pop(name) for name in names})
    recipes = Recipe.grid(base, damping=dampings, update=updates)
    options = {"sparsity": 0.75, "recipe": recipes, "stages": plan, "progress": False} | options
    return prune(model, data() if train is None else train, **options)


def zeros(model: nn.Module) -> int:
    return sum(int((model.state_dict()[name] == 0.0).sum()) for name in ELIGIBLE)


@pytest.mark.parametrize("method", ["magnitude", "obs", "swap_search"])
def test_one_stage_without_further_updates_selects_as_the_one_shot_run(method: str) -> None:
    recipe = Recipe(
        curvature=EmpiricalFisher(samples=60),
        select=method,
        damping=0.1,
        layer_inputs=0.0,
        update=None,
    )
    options: dict[str, Any] = {"sparsity": 0.6, "recipe": recipe, "progress": False}
    once = prune(network(), data(), **options)
    staged = prune(network(), data(), stages=Stages(updates=1, final_updates=0), **options)
    assert once.stages == ()
    assert len(staged.stages) == 1
    assert all(keep.equal(staged.masks[name]) for name, keep in once.masks.items())


def test_one_stage_has_the_updates_of_one() -> None:
    report = prune(network(), data(), sparsity=0.6, recipe=BASE, stages=1, progress=False)
    assert {record.stage for record in report.stages} == {0, 1}


BY_LAYER = {"0.*": 0.5, "3.*": 0.9}


@pytest.mark.parametrize(
    ("partition", "budget"),
    [
        *(("global", "global"), ("layer", "uniform"), ("row", BY_LAYER), (7, "global")),
        pytest.param("layer", "global", marks=pytest.mark.slow),
        pytest.param("layer", BY_LAYER, marks=pytest.mark.slow),
        pytest.param("row", "global", marks=pytest.mark.slow),
        pytest.param("row", "uniform", marks=pytest.mark.slow),
        pytest.param(7, "uniform", marks=pytest.mark.slow),
        pytest.param(7, BY_LAYER, marks=pytest.mark.slow),
    ],
)
def test_counts_are_exact_at_every_stage(partition: str | int, budget: Any) -> None:
    model = network()
    before = snapshot(model)
    seen: list[int] = []

    def on_stage(result: StageResult) -> None:
        pruned = sum(int((~keep).sum()) for keep in result.keep.values())
        seen.append(pruned)
        assert all(record.n_prune == pruned for record in result.records[-1:])
        assert_untouched(model, before)

    schedule = (0.2, 0.5, 0.75)
    if isinstance(budget, dict):
        schedule = (0.2, 0.5, 46 / 72)
    weights = Weights(blocks=partition, budget=budget)
    report = run(model, weights=weights, schedule=schedule, sparsity=schedule[-1], on_stage=on_stage)
    wanted = [round(share * N) for share in schedule]
    if isinstance(budget, dict):
        assert seen == sorted(seen)
        assert seen[-1] == 24 + 22 == report.n_prune == zeros(model)
    else:
        assert seen == [*wanted, wanted[-1]]
        assert report.n_prune == wanted[-1] == zeros(model)
    for name in ELIGIBLE:
        assert bool((model.state_dict()[name][~report.masks[name]] == 0.0).all())
    for name, tensor in before.items():
        if name not in ELIGIBLE:
            assert tensor.equal(model.state_dict()[name])


EMPIRICAL, SKETCHED = EmpiricalFisher(samples=20), SketchedFisher(samples=20)
METHODS = ("magnitude", "obd", "obs", "swap_search")
EACH_ONCE = [
    *(("magnitude", EMPIRICAL, None), ("obd", SKETCHED, 1.0), ("obs", EMPIRICAL, 1.0)),
    ("swap_search", SKETCHED, None),
]
CROSSED = [
    case for case in itertools.product(METHODS, (EMPIRICAL, SKETCHED), (None, 1.0)) if case not in EACH_ONCE
]


@pytest.mark.parametrize(
    ("method", "curvature", "layer_inputs"),
    [*EACH_ONCE, *(pytest.param(*case, marks=pytest.mark.slow) for case in CROSSED)],
)
def test_a_step_is_never_worse_than_its_alternatives(
    method: str, curvature: Fisher, layer_inputs: float | None
) -> None:
    report = run(network(), select=method, curvature=curvature, layer_inputs=layer_inputs)
    assert len(report.stages) >= 7
    for record in report.stages:
        if record.accepted:
            assert record.best_rejected is None or record.loss <= record.best_rejected
        else:
            assert record.best_rejected is not None
            assert record.loss == record.loss_before <= record.best_rejected
        if record.update > 0:
            assert record.accepted == (record.loss < record.loss_before)
    frame = report.stages_frame()
    assert list(frame["samples"]) == sorted(frame["samples"])
    assert frame["n_prune"].is_monotonic_increasing


def test_stages_lower_the_training_loss_that_one_stage_leaves() -> None:
    x, y = data(200)
    once, staged = network(), network()
    run(once, (x, y), stages=None)
    run(staged, (x, y), curvature=EmpiricalFisher(samples=200))
    losses = [evaluate(model, (x, y), cross_entropy).loss for model in (once, staged)]
    assert losses[1] < losses[0]


def test_the_last_network_of_on_stage_is_what_is_written() -> None:
    model, outputs = network(), []
    x = data()[0]

    def on_stage(result: StageResult) -> None:
        assert result.stages == 4
        outputs.append(result.network(x).detach().clone())

    run(model, on_stage=on_stage)
    assert len(outputs) == 4
    assert outputs[-1].equal(model(x))


def test_updates_are_made_where_a_selection_alone_costs_too_much() -> None:
    model, train = network(), data()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    plan = Stages(count=2, updates=1, final_updates=0)
    shares = (0.0, 1.0)
    runs = [
        run(copy.deepcopy(model), train, plan=plan, sparsity=0.5, updates=[Update()], update_above=share)
        for share in shares
    ]
    compared, never = (report.stages for report in runs)
    assert all(record.update_scale == 0.0 and record.tried == 1 for record in never)
    assert all(record.update_scale == 1.0 and record.tried == 6 for record in compared)
    assert [record.sparsity for record in compared] == [record.sparsity for record in never]
    assert compared[-1].loss < never[-1].loss


def test_without_update_kept_weights_stay() -> None:
    model = network()
    before = snapshot(model)
    report = run(model, updates=(None,), plan=Stages(count=3, updates=1, final_updates=0))
    for name in ELIGIBLE:
        keep = report.masks[name]
        assert model.state_dict()[name][keep].equal(before[name][keep])
    assert zeros(model) == round(0.75 * N)


class Stop(Exception):
    """Ends a run from within."""


class SeededLoader:
    """Batches that change from pass to pass, the same ones for the same pass."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = data()
        generator = torch.Generator().manual_seed(self.epoch)
        noise = 0.1 * torch.randn(x.shape, generator=generator)
        order = torch.randperm(len(x), generator=generator)
        yield from zip((x + noise)[order].split(16), y[order].split(16), strict=True)


@pytest.mark.parametrize("loader", [False, True])
def test_a_run_that_is_killed_between_any_two_stages_ends_the_same(tmp_path: Path, loader: bool) -> None:
    def source() -> Any:
        return SeededLoader() if loader else data()

    straight = network()
    whole = run(straight, source())
    # After the first stage, the last one, and the updates at the end.
    for last in (0, 2, 3):
        directory = tmp_path / str(last)
        model = network()
        before = snapshot(model)

        def on_stage(result: StageResult, last: int = last) -> None:
            if result.stage == last:
                raise Stop

        with pytest.raises(Stop):
            run(model, source(), run_dir=directory, on_stage=on_stage)
        assert_untouched(model, before)
        told: list[int] = []
        resumed = run(
            model, source(), run_dir=directory, on_stage=lambda result, told=told: told.append(result.stage)
        )
        assert told == [0, 1, 2, 3]
        for name, tensor in straight.state_dict().items():
            assert tensor.equal(model.state_dict()[name]), (last, name)
        table, expected = (r.stages_frame().drop(columns="seconds") for r in (resumed, whole))
        assert table.equals(expected)


def test_an_interruption_within_a_stage_leaves_the_network_and_the_stages_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cbs_opt.stages import staged as stages

    model = network()
    before = snapshot(model)
    real, calls = stages.mean_gradient, []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(stages, "mean_gradient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, run_dir=tmp_path, gradient=True)
    assert_untouched(model, before)
    (done,) = tmp_path.glob("stage_*")
    assert done.name == "stage_0001.npz"
    assert all("_s0001" in path.name for path in tmp_path.glob("*.npz") if path != done)
    monkeypatch.undo()
    run(model, run_dir=tmp_path, gradient=True)
    other = network()
    run(other, gradient=True)
    assert model[0].weight.equal(other[0].weight)  # type: ignore[index, union-attr]


def test_a_finished_run_is_read_again_without_work(tmp_path: Path) -> None:
    first, second = network(), network()
    run(first, run_dir=tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    stages: list[int] = []
    run(second, run_dir=tmp_path, on_stage=lambda result: stages.append(result.stage))
    assert stages == [0, 1, 2, 3]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    assert first[0].weight.equal(second[0].weight)  # type: ignore[index, union-attr]


def test_another_run_is_refused(tmp_path: Path) -> None:
    run(network(), run_dir=tmp_path)
    for change in (
        {"seed": 1},
        {"dampings": [0.5]},
        {"final_updates": 3},
        {"loss_fn": nn.functional.nll_loss},
    ):
        with pytest.raises(RunMismatchError):
            run(network(), run_dir=tmp_path, **change)
    with pytest.raises(RunMismatchError, match="network"):
        run(network(1), run_dir=tmp_path)
    x, y = data()
    with pytest.raises(RunMismatchError, match="data"):
        run(network(), (x + 1.0, y), run_dir=tmp_path)


@pytest.mark.parametrize("damaged", [1, 2, 4])
def test_a_damaged_stage_is_made_again(
    damaged: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = network(), network()
    run(first, run_dir=tmp_path)
    path = tmp_path / f"stage_{damaged:04d}.npz"
    path.write_bytes(path.read_bytes()[:-40])
    stages: list[int] = []
    run(second, run_dir=tmp_path, on_stage=lambda result: stages.append(result.stage))
    assert path.name in caplog.text
    assert stages == [0, 1, 2, 3]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert one.equal(other)


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.write_text("")
    with pytest.raises(RunMismatchError, match="file"):
        run(network(), run_dir=tmp_path)


def test_the_table_of_stages_survives_saving(tmp_path: Path) -> None:
    report = run(network())
    save_report(report, tmp_path / "saved")
    assert load_report(tmp_path / "saved").stages == report.stages


def test_the_last_stage_ends_when_nothing_improves() -> None:
    report = run(network(), dampings=[1e-8], updates=[Update(scale=1e12)], final_updates=50)
    final = [record for record in report.stages if record.stage == 3]
    assert len(final) < 50
    assert not final[-1].accepted
    assert not final[-2].accepted


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (lambda: {"stages": 0}, "stages"),
        (lambda: {"stages": True}, "stages"),
        (lambda: {"stages": "two"}, "stages"),
        (lambda: {"plan": Stages(count=0)}, "stages.count"),
        (lambda: {"plan": Stages(count=2.0)}, "stages.count"),
        (lambda: {"update_above": 1.5}, "stages.update_above"),
        (lambda: {"schedule": "steps"}, "stages.schedule"),
        (lambda: {"schedule": 0.5}, "stages.schedule"),
        (lambda: {"schedule": (0.5, "half", 0.75)}, "stages.schedule"),
        (lambda: {"schedule": (0.5, 0.4, 0.75)}, "stages.schedule"),
        (lambda: {"schedule": (0.5, 0.75)}, "stages.schedule"),
        (lambda: {"schedule": (0.5, 0.6, 0.7)}, "stages.schedule"),
        (lambda: {"start": 0.8}, "stages.start"),
        (lambda: {"start": 1.0}, "stages.start"),
        (lambda: {"plan": Stages(updates=0)}, "stages.updates"),
        (lambda: {"final_updates": -1}, "stages.final_updates"),
        (lambda: {"gradient_samples": 0}, "stages.gradient_samples"),
        (lambda: {"on_stage": 7}, "stages.on_stage"),
        (lambda: {"updates": [Update(kind="independent")]}, "recipe.update"),
        (lambda: {"updates": [None]}, "recipe.update"),
        (lambda: {"dampings": [0.1, absolute(0.1)]}, "recipe.damping"),
        (lambda: {"certify": True}, "certify"),
        (lambda: {"certify": Certify(time_limit=1.0)}, "certify"),
        (lambda: {"recipe": Recipe.grid(layer_inputs=[0.1, 1.0])}, "recipe.layer_inputs"),
        (lambda: {"resources": Resources(row_memory=1 << 20)}, "resources.row_memory"),
        (lambda: {"curvature": rows()}, "recipe.curvature"),
        (lambda: {"weights": Weights(budget={"5.*": 0.5}, blocks="layer")}, "weights.budget"),
        (lambda: {"curvature": EmpiricalFisher(samples=5, per_row=6)}, "curvature.per_row"),
        (lambda: {"select": SwapSearch(start="nowhere")}, "select.start"),
    ],
)
def test_what_makes_no_sense_is_refused(options: Callable[[], dict[str, Any]], argument: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(ArgumentError) as caught:
        run(model, **options())
    assert caught.value.argument == argument
    assert caught.value.found
    assert caught.value.remedy
    assert_untouched(model, before)


def rows() -> Any:
    """Gradient rows that were computed before."""
    model = network()
    partition = Partition.from_model(model, blocks="global")
    return gradient_rows(
        model, data(), cross_entropy, partition, curvature=EmpiricalFisher(samples=20), progress=False
    )


@pytest.mark.parametrize("select", ["obs", "magnitude"])
def test_no_data_is_refused(select: str) -> None:
    recipe = Recipe(select=select, update=None)
    with pytest.raises(ArgumentError, match="data"):
        prune(network(), None, sparsity=0.75, recipe=recipe, stages=Stages(updates=1, final_updates=0))
    with pytest.raises(ArgumentError, match="data"):
        prune(network(), None, sparsity=0.75, recipe=BASE, stages=STAGES)


@pytest.mark.parametrize("damping", [0.5, absolute(0.05)])
def test_a_damping_of_the_selection_may_be_in_other_units(damping: Any) -> None:
    """Absolute ones are those of relative ones times the mean diagonal, which the first stage has."""
    plan = Stages(updates=1, final_updates=0)
    options: dict[str, Any] = {"plan": plan, "layer_inputs": 0.0, "updates": [None], "dampings": [damping]}
    reports = [run(network(), selection_damping=value, **options) for value in (1e-9, absolute(1e9), 1e-9)]
    small, large, again = (report.masks["0.weight"] for report in reports)
    assert small.equal(again)
    assert not small.equal(large)


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (6, 6)])
def test_the_spectrum_inverts(shape: tuple[int, int]) -> None:
    rows = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = RowsHessian(rows).prepared()
    for damping in (1e-3, 1.0, 50.0):
        dense = rows.T @ rows + damping * torch.eye(shape[1], dtype=torch.float64)
        (factor,) = spectrum.factored([damping])
        torch.testing.assert_close(factor.inverse_diagonal(), torch.linalg.inv(dense).diagonal())
        block = FisherBlock(
            name="b", weights=torch.ones(shape[1]), hessian=RowsHessian(rows), damping=damping
        )
        torch.testing.assert_close(block.inverse_diagonal(), factor.inverse_diagonal())
        right = torch.ones(shape[1], dtype=torch.float64)
        torch.testing.assert_close(factor.solve(right), torch.linalg.solve(dense, right))


@pytest.mark.parametrize("partition", ["global", "layer"])
def test_the_model_minimises_what_it_states(partition: str) -> None:
    """At the minimum of the model no direction goes down; fewer weights are the model of those alone."""
    model = network(dtype=torch.float64)
    parts = Partition.from_model(model, blocks=partition)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(N, generator=generator) < 0.6
    kept = int(keep.sum())
    rows = torch.randn(10, kept, dtype=torch.float64, generator=generator)
    weights = parts.flatten(model)[keep]
    gradient = torch.randn(kept, dtype=torch.float64, generator=generator)
    quadratic = StageModel(parts, keep, rows)
    everything_stays = torch.ones(kept, dtype=torch.bool)
    target = quadratic.updates(weights, gradient, everything_stays, [0.3])[0]
    hessian = torch.zeros(kept, kept, dtype=torch.float64)
    start = 0
    for block in quadratic.blocks(weights, None, 0.3):
        place = slice(start, start + block.n)
        part = rows[:, place]
        hessian[place, place] = part.T @ part + 0.3 * torch.eye(block.n, dtype=torch.float64)
        start += block.n
    torch.testing.assert_close(hessian @ (target - weights), -gradient)
    fewer = keep.clone()
    fewer[keep.nonzero().squeeze(1)[::3]] = False
    torch.testing.assert_close(quadratic.restricted(fewer).rows, rows[:, fewer[keep]])
    assert quadratic.unit == pytest.approx(float(rows.square().sum() / kept))


@pytest.mark.parametrize("m", [9, 90])
def test_the_channel_term_is_the_metric_of_the_trust_region(m: int) -> None:
    """The minimum of the model with a channel term solves ``(R^T R + d (C / unit + share I)) x = -g``."""
    model = network(dtype=torch.float64)
    parts = Partition.from_model(model, blocks="global")
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(N, generator=generator) < 0.7
    kept = int(keep.sum())
    everything = torch.randn(m, N, dtype=torch.float64, generator=generator)
    moments = input_moments(model, data(dtype=torch.float64), parts, samples=30)
    channels = matched_term(moments, parts, everything.square().sum(0)).restricted(keep)
    quadratic = StageModel(parts, keep, everything[:, keep], channels)
    weights = parts.flatten(model)[keep]
    gradient = torch.randn(kept, dtype=torch.float64, generator=generator)
    everything_stays = torch.ones(kept, dtype=torch.bool)
    identity = torch.eye(kept, dtype=torch.float64)
    metric = channels.dense() / quadratic.unit + 0.01 * identity
    rows = everything[:, keep]
    for damping in (0.1, 2.0):
        target = quadratic.updates(weights, gradient, everything_stays, [damping])[0]
        hessian = rows.T @ rows + damping * metric
        shifted = hessian + damping * 0.99 * identity
        torch.testing.assert_close(shifted @ (target - weights), -gradient)
        (block,) = quadratic.around_minimum(weights, gradient, damping, factorised=True)
        torch.testing.assert_close(block.weights, target)
        torch.testing.assert_close(block.inverse_diagonal(), torch.linalg.inv(hessian).diagonal())
        pruned = torch.rand(kept, generator=generator) < 0.3
        moved = quadratic.updates(weights, gradient, ~pruned, [damping])[0]
        assert bool((moved[pruned] == 0.0).all())
        residual = hessian @ (moved - weights) + gradient
        torch.testing.assert_close(residual[~pruned], torch.zeros_like(residual[~pruned]))
        (plain,) = quadratic.around_minimum(weights, None, damping, factorised=False)
        torch.testing.assert_close(plain.hessian.dense() + plain.damping * torch.eye(kept), hessian)


def test_what_stages_do_by_default() -> None:
    model, other = network(), network()
    common: dict[str, Any] = {
        "sparsity": 0.6,
        "stages": Stages(count=2, updates=1, final_updates=1),
        "progress": False,
    }
    few = Recipe(curvature=EmpiricalFisher(samples=30))
    report = prune(model, data(), recipe=few, **common)
    named = replace(
        few,
        select=GreedyOBS(program="joint", drops=3),
        gradient=False,
        layer_inputs=1.0,
        damping=0.1,
        update=Update(kind="cbs", scale=1.0),
        weights=Weights(blocks="global"),
    )
    again = prune(other, data(), recipe=named, **common)
    assert report.method == "greedy_obs"
    assert all(value.equal(other.state_dict()[name]) for name, value in model.state_dict().items())
    assert again.request == report.request
    assert report.request is not None
    assert report.request.recipes == (named,)
