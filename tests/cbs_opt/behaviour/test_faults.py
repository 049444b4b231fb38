"""Full disks, read-only folders, two writers, Ctrl-C at any moment, networks that change half way."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cbs_opt import CbsError, load_masks, load_report, prune, save_masks, save_report
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.errors import NetworkChangedError
from cbs_opt.recipe.records import Recipe, absolute
from cbs_opt.report.files import ReportFormatError
from formulations.incumbents import greedy
from formulations.instances import export_model, read_instance, read_solution, write_instance, write_solution
from tests.cbs_opt.reports import made_report
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot
from tests.formulations.blocks import block

pytestmark = pytest.mark.usefixtures("without_pictures")

ROOT = Path(__file__).parents[3]
CALLS = (
    (tempfile, "mkstemp"),
    (os, "fdopen"),
    (os, "write"),
    (os, "fsync"),
    (os, "chmod"),
    (os, "replace"),
)
"""What the packages write with."""


@contextmanager
def failing_at(call: int, error: BaseException) -> Iterator[list[str]]:
    """Raise `error` at one of the calls of `CALLS`, counted from 0; gives the names of those made."""
    made: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, counted(getattr(module, name), made, call, error))
        yield made


def counted(
    function: Callable[..., Any], made: list[str], call: int, error: BaseException
) -> Callable[..., Any]:
    def count(*args: Any, **kwargs: Any) -> Any:
        made.append(function.__name__)
        if len(made) - 1 == call:
            raise error
        return function(*args, **kwargs)

    return count


@dataclass(frozen=True)
class Writer:
    """One way to write; `write` takes the number of a version, `read` gives it back."""

    write: Callable[[Path, int], object]
    read: Callable[[Path], int]
    torn: tuple[type[Exception], ...] = ()
    """What reading may raise after a failed write of several files."""


def keep_first(version: int) -> dict[str, torch.Tensor]:
    return {"w": torch.arange(5) < version}


def report_folder(folder: Path, version: int) -> None:
    save_report(made_report(seed=version), folder / "run")


def solution_file(folder: Path, version: int) -> None:
    problem = block("random", 6, version, seed=0)
    write_solution(folder / "s", problem, greedy(problem, "joint"))


def export(folder: Path, version: int) -> None:
    export_model(block("random", 6, version, seed=0), "joint_big_m", folder / "x", "lp")


@functools.cache
def exported(version: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), version)
        return (Path(folder) / "x").read_bytes()


WRITERS = {
    "block": Writer(
        lambda folder, version: write_instance(folder / "b", block("random", 6, version, seed=0)),
        lambda folder: read_instance(folder / "b")[0].n_prune,
    ),
    "solution": Writer(solution_file, lambda folder: int(read_solution(folder / "s").pruned.size)),
    "masks": Writer(
        lambda folder, version: save_masks(folder / "m", keep_first(version)),
        lambda folder: int(load_masks(folder / "m")["w"].sum()),
    ),
    "model": Writer(
        export,
        lambda folder: [exported(1), exported(2)].index((folder / "x").read_bytes()) + 1,
    ),
    "report": Writer(
        report_folder, lambda folder: load_report(folder / "run").seed, torn=(ReportFormatError,)
    ),
}


def read_back(writer: Writer, folder: Path) -> int | None:
    """The version there; None where reading says that the files are not complete."""
    try:
        return writer.read(folder)
    except writer.torn:
        return None


def few(samples: int) -> Recipe:
    return Recipe(curvature=EmpiricalFisher(samples=samples))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# A report draws its pictures every time.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind == "report" else kind for kind in WRITERS]
)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_fault_at_any_call_leaves_the_old_file_or_the_new(kind, error, tmp_path):
    writer = WRITERS[kind]
    writer.write(tmp_path, 1)
    before = files(tmp_path)
    for call in itertools.count():
        with failing_at(call, error) as made:
            try:
                writer.write(tmp_path, 2)
            except type(error):
                pass
            else:
                break
        assert len(made) == call + 1, "nothing is written after a fault"
        assert read_back(writer, tmp_path) in (1, 2, None)
        assert files(tmp_path) <= before
        writer.write(tmp_path, 1)
        assert writer.read(tmp_path) == 1
    assert call >= 2
    assert writer.read(tmp_path) == 2


@pytest.mark.parametrize("kind", WRITERS)
def test_a_disk_that_takes_only_some_bytes(kind, tmp_path):
    writer = WRITERS[kind]
    writer.write(tmp_path, 1)
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            writer.write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_back(writer, tmp_path) in (1, None)
    assert files(tmp_path) <= before


@pytest.mark.parametrize("kind", ["block", "solution", "masks", "model"])
@pytest.mark.parametrize("place", ["absent", "file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(kind, place, tmp_path):
    folder = tmp_path / "folder"
    if place == "file":
        folder.write_text("")
    if place == "read-only":
        folder.mkdir(mode=0o555)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
    with pytest.raises(OSError, match="folder"):
        WRITERS[kind].write(folder, 1)
    assert files(tmp_path) <= {"folder"}


WRITE_FOREVER = """
import sys
from pathlib import Path
from tests.formulations.blocks import block
from formulations.instances import write_instance
path, version = Path(sys.argv[1]), int(sys.argv[2])
problem = block("random", 6, version, seed=0)
print("ready", flush=True)
while True:
    write_instance(path, problem)
"""


@pytest.mark.slow
def test_two_processes_that_write_one_file(tmp_path):
    path = tmp_path / "b.npz"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(path), str(version)], cwd=ROOT, stdout=subprocess.PIPE
        )
        for version in (2, 4)
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
        until = time.monotonic() + 3.0
        seen = set()
        while time.monotonic() < until:
            if path.exists():
                seen.add(read_instance(path)[0].n_prune)
        assert seen == {2, 4}
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert read_instance(path)[0].n_prune in (2, 4)


# A signal that comes during garbage collection ends in a callback of hypothesis, where Python drops it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("moment", range(12))
def test_ctrl_c_at_any_moment_leaves_the_network_whole(moment):
    """Untouched if the signal came before the weights were written, else wholly pruned."""
    recipes = Recipe.grid(few(30), damping=[absolute(1e-3), absolute(1e-2)])
    options: dict[str, Any] = {"sparsity": 0.5, "recipe": recipes, "progress": False}
    finished = network()
    began = time.perf_counter()
    prune(finished, data(), **options)
    duration = time.perf_counter() - began
    model = network()
    before = snapshot(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, interrupt)
    share = (moment + np.random.default_rng(moment).random()) / 12
    signal.setitimer(signal.ITIMER_REAL, max(1e-4, share * duration))
    try:
        prune(model, data(), **options)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
    assert torch.is_grad_enabled()
    if any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()):
        before = snapshot(finished)
    assert_untouched(model, before)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_gradients_are_recorded_though_a_signal_comes_while_no_grad_ends(count, monkeypatch):
    model, train = network(), data()
    ends, times = torch.no_grad.__exit__, itertools.count()

    def interrupted(self: torch.no_grad, *given: Any) -> None:
        if next(times) == count:
            raise KeyboardInterrupt
        ends(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(torch.no_grad, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(model, train, sparsity=0.5, recipe="fast", progress=False)
    recorded = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert recorded


class Saboteur:
    """Data that do something to the network when the batch number `at` is read."""

    def __init__(self, act: Callable[[], object], at: int) -> None:
        self._act = act
        self._at = at
        self._read = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        x, y = data()
        for start in range(0, 60, 10):
            self._read += 1
            if self._read == self._at:
                self._act()
            yield x[start : start + 10], y[start : start + 10]


def grown(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(torch.zeros(9, 6))


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.5)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "double": (nn.Module.double, "the dtype of .* went from torch.float32 to torch.float64"),
    "half": (nn.Module.half, "the dtype of .* went from torch.float32 to torch.float16"),
    "device": (lambda model: model.to("meta"), "the device of .* went from cpu to meta"),
    "shape": (grown, "the shape of 0.weight went from"),
    "values": (moved, "values of 0.weight changed"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("at", [2, 5, 8, 12])
def test_a_network_that_changes_half_way_is_found_out(kind, at):
    act, message = CHANGES[kind]
    model = network()
    source = Saboteur(lambda: act(model), at)
    recipes = Recipe.grid(few(40), damping=[absolute(1e-3), absolute(1e-2)])
    with pytest.raises(NetworkChangedError, match=message):
        prune(model, source, sparsity=0.5, recipe=recipes, evaluate=source, progress=False)
    assert not any((parameter == 0).any() for parameter in model.parameters() if kind == "values")


def test_data_that_break_off_leave_the_network_alone():
    model = network()
    before = snapshot(model)

    def fail() -> None:
        raise OSError("the share went away")

    with pytest.raises(CbsError, match="the share went away"):
        prune(model, Saboteur(fail, 3), sparsity=0.5, loss_fn=cross_entropy, recipe=few(40), progress=False)
    assert_untouched(model, before)


def test_a_stage_of_another_run_in_the_folder_is_not_taken_over(tmp_path, caplog):
    options: dict[str, Any] = {
        "sparsity": 0.5,
        "recipe": few(20),
        "stages": 2,
        "progress": False,
    }
    models = [network(seed) for seed in range(2)]
    for seed, model in enumerate(models):
        prune(model, data(), run_dir=tmp_path / str(seed), **options)
    first, other = (tmp_path / str(seed) / "stage_0001.npz" for seed in range(2))
    first.write_bytes(other.read_bytes())
    (tmp_path / "0" / "result.npz").unlink()
    again = network(0)
    prune(again, data(), run_dir=tmp_path / "0", **options)
    assert "of another run" in caplog.text
    for name, value in models[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
