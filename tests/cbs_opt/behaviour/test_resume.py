"""Runs in a directory: stopped anywhere they end the same, another run is refused, damage is made good."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher
from cbs_opt.errors import NetworkChangedError, RunInUseError, RunMismatchError
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Certify, FineTuning, Recipe, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import OBD, OBS, Exact, Magnitude, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.runs import folder as run_store
from cbs_opt.runs.folder import LOCK_FILE, RunStore
from cbs_opt.system import threads
from cbs_opt.system.resources import Resources
from formulations.files import PARTIAL
from tests.cbs_opt import small_network
from tests.cbs_opt.small_network import assert_untouched, snapshot

FEW = EmpiricalFisher(samples=24)
BASE: dict[str, Any] = {
    "sparsity": 0.6,
    "recipe": Recipe(curvature=FEW),
    "resources": Resources(chunk_memory=20_000),
    "progress": False,
}
BLOCKS = Weights(blocks="row")


def grid(dampings: Sequence[float], *, scales: Sequence[float] = (1.0,), **fields: Any) -> dict[str, Any]:
    """Recipes with dampings that are added as they are."""
    base = Recipe(**{"curvature": FEW} | fields)
    updates = [Update(scale=scale) for scale in scales]
    return {"recipe": Recipe.grid(base, damping=list(map(absolute, dampings)), update=updates)}


CASES: dict[str, dict[str, Any]] = {
    "selection": grid((1e-3, 1e-1), scales=(0.5, 1.0), select=SwapSearch(program="selection", repeats=2)),
    "joint": {
        "recipe": Recipe.grid(
            Recipe(curvature=FEW, select=SwapSearch(), weights=Weights(blocks="layer")),
            layer_inputs=[0.3, 1.0],
            damping=[0.1, 1.0],
        )
    },
    "blocks": grid((1e-2, 1e-1), select=Exact(), weights=BLOCKS),
    "certified": {**grid((0.1,), weights=BLOCKS), "certify": True},
    "exact_fisher": grid((0.01,), curvature=ExactFisher(samples=24), gradient=True),
    "sketched": grid((0.01,), curvature=SketchedFisher(samples=24, per_row=2), select=OBS()),
    "labels": grid((0.01, 0.1), curvature=MonteCarloFisher(samples=24), select=OBD()),
    "one_network": {"recipe": Recipe(curvature=FEW, select=Magnitude(), update=None)},
    "fixed_damping": grid(
        (1e-3, 1e-1, 1.0), select=SwapSearch(program="selection"), selection_damping=absolute(0.01)
    ),
    "stages": {
        "recipe": Recipe.grid(Recipe(curvature=FEW, select=OBS()), damping=[0.1, 1.0]),
        "stages": Stages(count=3, final_updates=1),
    },
    "statistics between": {
        **grid((0.1,), select=OBS(), recalibrate=True),
        "stages": Stages(count=2, fine_tuning=FineTuning(samples=40, batch_size=4, rest=True)),
    },
    "stages with inputs": {**grid((0.1, 1.0), select=SwapSearch(), layer_inputs=1.0), "stages": 2},
}


def network(seed: int = 0) -> nn.Module:
    """In double precision, which shows every bit of the computations within."""
    return small_network.network(seed, torch.float64)


def data(samples: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    return small_network.data(samples, torch.float64)


class Stop(Exception):
    """Ends a run from within."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every result is written as soon as it is there."""
    monkeypatch.setattr(run_store, "SAVE_EVERY", 0.0)


def run(model: nn.Module, **options: Any) -> PruneReport:
    return prune(model, data(), **(BASE | {"evaluate": data(20)} | options))


def result(model: nn.Module, report: PruneReport) -> tuple[dict[str, Any], str]:
    """What must be the same, whatever happened on the way."""
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, told(report)


def told(report: PruneReport) -> str:
    """The report without times and memory."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            left_out = ("seconds", "peak_memory_bytes", "certificate_seconds")
            return {key: timeless(entry) for key, entry in value.items() if key not in left_out}
        return [timeless(entry) for entry in value] if isinstance(value, list) else value

    masks = {name: keep.tolist() for name, keep in report.masks.items()}
    return json.dumps([timeless(report.to_dict()), masks])


def stop_at(patch: pytest.MonkeyPatch, write: int, *, before: bool) -> list[str]:
    """Raise before or after that piece is written, counted from 0; gives the names of those written."""
    written: list[str] = []
    keep = RunStore.keep

    def stopping(self: RunStore, name: str, *args: Any, **options: Any) -> None:
        if before and len(written) == write:
            raise Stop
        keep(self, name, *args, **options)
        written.append(name)
        if not before and len(written) == write + 1:
            raise Stop

    patch.setattr(RunStore, "keep", stopping)
    return written


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_at_any_write_ends_the_same(case: str, step: int, tmp_path: Path) -> None:
    options = CASES[case]
    straight = network()
    expected = result(straight, run(straight, **options))
    for write in itertools.count(step=step):
        directory = tmp_path / str(write)
        model = network()
        before = snapshot(model)
        with pytest.MonkeyPatch.context() as patch:
            written = stop_at(patch, write, before=write % 2 == 0)
            try:
                run(model, run_dir=directory, **options)
            except Stop:
                assert_untouched(model, before)
            else:
                break
        report = run(model, run_dir=directory, **options)
        assert result(model, report) == expected, written
    assert "result" in written
    assert write >= 1
    assert result(model, run(network(), run_dir=directory, **options))[1] == expected[1]


def test_no_work_is_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is written once, however often the run is stopped."""
    names: list[str] = []
    keep = RunStore.keep

    def noting(self: RunStore, name: str, *args: Any, **options: Any) -> None:
        keep(self, name, *args, **options)
        names.append(name)
        raise Stop

    monkeypatch.setattr(RunStore, "keep", noting)
    for _ in range(100):
        try:
            run(network(), run_dir=tmp_path, **CASES["joint"])
        except Stop:
            continue
        break
    assert len(names) == len(set(names))
    assert len([name for name in names if name.startswith("rows")]) >= 3
    assert names[-1] == "result"


def test_a_finished_run_returns_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = network(), network()
    expected = result(first, run(first, run_dir=tmp_path, **CASES["certified"]))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"run.json", "run.lock", "result.npz", "report.json", "certificates"}
    monkeypatch.setattr("cbs_opt.oneshot.gradient_rows", None)
    report = run(second, run_dir=tmp_path, **CASES["certified"])
    assert result(second, report) == expected
    assert len(report.certificates) == len(report.blocks)


def test_the_blocks_of_certificates_are_written_again(tmp_path: Path) -> None:
    """A run is finished only when the data of the blocks that the caller wants are there."""
    options = {**CASES["certified"], "run_dir": tmp_path / "run"}
    first, second = network(), network()
    expected = result(first, run(first, **options | {"certify": Certify(block_dir=tmp_path / "a")}))
    again = run(second, **options | {"certify": Certify(block_dir=tmp_path / "b")})
    assert result(second, again) == expected
    files = [sorted((path.name, path.read_bytes()) for path in (tmp_path / name).iterdir()) for name in "ab"]
    assert files[0] == files[1]


SPOILS: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda b: b[:-7],
    "empty": lambda b: b"",
    "changed": lambda b: b[:50] + b"x" + b[51:],
}


@pytest.mark.parametrize(("case", "last"), [("joint", "cut"), ("certified", "empty"), ("stages", "changed")])
def test_damaged_pieces_are_made_again(case: str, last: str, tmp_path: Path) -> None:
    """Pieces of a run in every way; the files of its end in one, another for each case."""
    options = CASES[case]
    model = network()
    expected = result(model, run(model, **options))
    for number, (name, spoil) in enumerate(SPOILS.items()):
        directory = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, 9, before=False)
            with pytest.raises(Stop):
                run(network(), run_dir=directory, **options)
        pieces = list(directory.glob("*.npz"))
        assert pieces
        for path in pieces:
            path.write_bytes(spoil(path.read_bytes()))
        model = network()
        assert result(model, run(model, run_dir=directory, **options)) == expected
        for path in (directory / "result.npz", directory / "report.json") if name == last else ():
            path.write_bytes(spoil(path.read_bytes()))
            model = network()
            assert result(model, run(model, run_dir=directory, **options)) == expected


def changed(**fields: Any) -> dict[str, Any]:
    return {"recipe": [replace(recipe, **fields) for recipe in CASES["selection"]["recipe"]]}


CHANGES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "seed": (lambda: {"seed": 1}, r"request.seed \(0 -> 1\)"),
    "sparsity": (lambda: {"sparsity": 0.5}, r"request.sparsity \(0.6 -> 0.5\)"),
    "damping": (lambda: changed(damping=0.5), r"request.recipe"),
    "loss": (lambda: {"loss_fn": nn.functional.nll_loss}, r"loss_fn \(null -> \"nll_loss\"\)"),
    "memory": (
        lambda: {"resources": Resources(chunk_memory=50_000)},
        r"chunk_memory \(20000 -> 50000\)",
    ),
    "target": (
        lambda: changed(weights=Weights(target="0.weight")),
        r"pruned.3.weight \(\[3, 8\] -> null\)",
    ),
    "held out": (lambda: {"evaluate": data(21)}, r"evaluate \("),
    "stages": (lambda: {"stages": 2, **changed(damping=0.5)}, r"request.stages"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_is_refused_with_the_difference(change: str, tmp_path: Path) -> None:
    run(network(), run_dir=tmp_path, **CASES["selection"])
    make, message = CHANGES[change]
    with pytest.raises(RunMismatchError, match=message):
        run(network(), run_dir=tmp_path, **(CASES["selection"] | make()))


def test_another_network_data_or_thread_count_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "SMALL_WORK", -1)  # Small runs take one thread, whatever the process has.
    options = CASES["selection"]
    run(network(), run_dir=tmp_path, **options)
    model = network()
    model.get_buffer("1.running_mean").add_(1.0)
    with pytest.raises(RunMismatchError, match=r"tensors.1.running_mean"):
        run(model, run_dir=tmp_path, **options)
    x, y = data()
    with pytest.raises(RunMismatchError, match=r"another data \("):
        prune(network(), (x, y.flip(0)), run_dir=tmp_path, **{**BASE, **options})
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(count + 1)
        with pytest.raises(RunMismatchError, match=rf"threads \({count} -> {count + 1}\)"):
            run(network(), run_dir=tmp_path, **options)
    finally:
        torch.set_num_threads(count)
    parts = Partition.from_model(network(), blocks="global")
    rows = gradient_rows(
        network(), data(), nn.functional.cross_entropy, parts, curvature=EmpiricalFisher(samples=24)
    )
    with pytest.raises(RunMismatchError, match="curvature"):
        run(network(), run_dir=tmp_path, **changed(curvature=rows, layer_inputs=1.0))


def test_rows_of_other_samples_are_refused(tmp_path: Path) -> None:
    """The comparison samples are the first ones: that the others are the same is seen when they are read."""
    options = {**BASE, **changed(choice_samples=8), "run_dir": tmp_path}
    x, y = data()
    batches = list(zip(x.split(8), y.split(8), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 5, before=False)
        with pytest.raises(Stop):
            prune(network(), batches, **options)
    model = network()
    before = snapshot(model)
    with pytest.raises(RunMismatchError, match=r"the first \d+ samples"):
        prune(model, [batches[0], batches[2], batches[1]], **options)
    assert_untouched(model, before)
    again, straight = network(), network()
    prune(again, batches, **options)
    prune(straight, batches, **{**options, "run_dir": None})
    assert again[0].weight.equal(straight[0].weight)  # type: ignore[index, union-attr]


def test_a_second_run_in_the_directory_is_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / LOCK_FILE):
        model = network()
        before = snapshot(model)
        with pytest.raises(RunInUseError, match="another run is using it"):
            run(model, run_dir=tmp_path)
        assert_untouched(model, before)
    run(network(), run_dir=tmp_path)


def hold(directory: Path, ready: Any) -> None:
    with RunStore(directory, {}):
        ready.send(None)
        time.sleep(20.0)


def test_a_kill_ends_the_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path, there))
    process.start()
    here.recv()
    try:
        with pytest.raises(RunInUseError):
            RunStore(tmp_path, {})
        process.kill()
        process.join()
        with RunStore(tmp_path, {}), pytest.raises(RunInUseError):
            RunStore(tmp_path, {})
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("case", ["selection", "stages"])
def test_a_full_disk_ends_the_run_and_space_goes_on(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any write: the error is that of the system, the network is as it was, nothing is half written."""
    options = CASES[case]
    straight = network()
    expected = result(straight, run(straight, **options))
    real = os.fsync
    for call in (0, 1, 3, 6):
        directory, calls = tmp_path / str(call), itertools.count()

        def full(handle: int, call: int = call, calls: Any = calls) -> None:
            if next(calls) == call:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(handle)

        model = network()
        before = snapshot(model)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                run(model, run_dir=directory, **options)
        assert_untouched(model, before)
        assert not list(directory.glob(".*"))
        assert result(model, run(model, run_dir=directory, **options)) == expected


@pytest.mark.parametrize("place", ["read-only", "file"])
def test_a_directory_that_cannot_be_written_is_named(place: str, tmp_path: Path) -> None:
    directory = tmp_path / "runs"
    if place == "file":
        directory.write_text("")
    else:
        directory.mkdir(mode=0o555)
        if os.access(directory, os.W_OK):
            pytest.skip("this user may write anywhere")
    model = network()
    before = snapshot(model)
    with pytest.raises((OSError, RunMismatchError), match="runs"):
        run(model, run_dir=directory)
    assert_untouched(model, before)


def test_what_a_killed_write_left_is_removed_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".settings.user.yaml").write_text("mine")
    with monkeypatch.context() as patch:
        # A kill leaves the file that was being written, for nothing is run after it.
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception, match="killed"):
            run(network(), run_dir=tmp_path)
    assert list(tmp_path.glob(f".*{PARTIAL}"))
    run(network(), run_dir=tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [".settings.user.yaml"]


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "rows_0000.npz"
    mine.write_bytes(b"mine")
    model = network()
    before = snapshot(model)
    with pytest.raises(RunMismatchError, match=r"holds rows_0000.npz, but no run"):
        run(model, run_dir=tmp_path)
    assert_untouched(model, before)
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("case", ["selection", "joint", "stages"])
def test_ctrl_c_leaves_the_network_and_a_run_that_goes_on(case: str, tmp_path: Path) -> None:
    options = CASES[case]
    straight = network()
    expected = result(straight, run(straight, **options))
    began = time.perf_counter()
    run(network(), run_dir=tmp_path / "timed", **options)
    duration = time.perf_counter() - began
    generator = torch.Generator().manual_seed(len(case))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = network()
    before = snapshot(model)
    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(6):
            signal.setitimer(
                signal.ITIMER_REAL, max(1e-3, float(torch.rand((), generator=generator)) * duration)
            )
            try:
                report = run(model, run_dir=tmp_path / "run", **options)
            except KeyboardInterrupt:
                assert_untouched(model, before)
            else:
                signal.setitimer(signal.ITIMER_REAL, 0.0)
                assert result(model, report) == expected
                model = network()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
    assert result(model, run(model, run_dir=tmp_path / "run", **options)) == expected


def test_a_network_that_changes_in_a_callback_is_found_out(tmp_path: Path) -> None:
    """What the stages before have found stays good."""
    model = network()
    halving = replace(CASES["stages"]["stages"], on_stage=lambda _: model.half())
    with pytest.raises(NetworkChangedError, match=r"dtype of .* went from"):
        run(model, run_dir=tmp_path, **CASES["stages"] | {"stages": halving})
    model, straight = network(), network()
    assert result(model, run(model, run_dir=tmp_path, **CASES["stages"])) == result(
        straight, run(straight, **CASES["stages"])
    )
