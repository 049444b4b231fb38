"""Corrupt every kind of file that the packages read, thousands of times, and see what the readers do.

    python -m tests.stress.fuzz_files --count 10000

A reader must refuse a corrupted file with a `CbsError`, or give back exactly what was written (the bytes
that changed then carried nothing). A journal may also give fewer rows, each as written: a torn end is
what a crash leaves. Anything else is a crash, or wrong data accepted. Exit code 1 if there is any of
either. Case `N` of seed `S` is the same in every run: ``--only N --seed S`` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cbs_opt import CbsError, load_masks, load_report, prune, save_masks, save_report
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.network.masks import load_mask_metadata
from cbs_opt.recipe.records import Recipe
from cbs_opt.runs.folder import RUN_FILE, RunStore
from cbs_opt.stages.state import stored_stages
from cbs_opt.study.expansion import Plan
from cbs_opt.study.results import DATABASE, Journal, read_plan, read_rows
from formulations.errors import InstanceFormatError
from formulations.files import checksum
from formulations.instances import read_instance, read_solution, write_instance, write_solution
from formulations.problem import BlockProblem
from formulations.relaxations import lower_bound
from tests.stress.file_mutations import (
    BLIND,
    Mutation,
    Payload,
    database_changed,
    json_changed,
    safetensors_changed,
    zip_changed,
)

SLOWEST = 20.0
"""Seconds after which reading a file of a few kilobytes counts as a hang."""


TOLD = "told.json"


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of file: how to write one into a folder, how to read it, how to break its format.

    `read` gives the content as a list of strings, equal if and only if the content is; `partial` says
    that a part of the list is no error.
    """

    name: str
    file: str
    write: Callable[[Path], object]
    read: Callable[[Path], list[str]]
    clever: Mutation
    partial: bool = False


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one corrupted file: "refused", "same", "part", "wrong" or "crash"."""

    number: int
    target: str
    mutation: str
    result: str
    note: str


def targets() -> list[Target]:
    """Every kind of file that the packages write and read."""
    return [
        Target(name="block", file="b.npz", write=_write_block, read=_read_block, clever=zip_changed),
        Target(name="solution", file="s.npz", write=_write_solution, read=_read_solution, clever=zip_changed),
        Target(
            name="masks",
            file="m.safetensors",
            write=_write_masks,
            read=_read_masks,
            clever=safetensors_changed,
        ),
        Target(
            name="report", file="report.json", write=_write_report, read=_read_report, clever=json_changed
        ),
        Target(name="study plan", file=DATABASE, write=_write_plan, read=_read_plan, clever=database_changed),
        Target(
            name="study journal",
            file=DATABASE,
            write=_write_journal,
            read=_read_journal,
            clever=database_changed,
            partial=True,
        ),
        Target(
            name="stage", file="stage_0001.npz", write=_write_stages, read=_read_stages, clever=zip_changed
        ),
        Target(name="piece", file="rows_0000.npz", write=_write_piece, read=_read_piece, clever=zip_changed),
        Target(name="stages", file=RUN_FILE, write=_write_stages, read=_read_stages, clever=json_changed),
    ]


def fuzz(count: int, seed: int = 0, *, only: int | None = None, progress: bool = True) -> Iterator[Outcome]:
    """Corrupt and read `count` files, or the one with number `only`."""
    numbers = range(count) if only is None else [only]
    with tempfile.TemporaryDirectory() as home:
        Payload.trace = Path(home) / "unpickled"
        kinds = targets()
        contents = [_original(kind, Path(home)) for kind in kinds]
        for number in tqdm(numbers, disable=None if progress else True, unit="file"):
            kind, (folder, original, expected) = (each[number % len(kinds)] for each in (kinds, contents))
            generator = np.random.default_rng([seed, number])
            mutation = kind.clever if generator.random() < 0.4 else BLIND[int(generator.integers(len(BLIND)))]
            corrupted = mutation(original, generator)
            if corrupted != original:
                (folder / kind.file).write_bytes(corrupted)
                result, note = judge(kind, folder, expected)
                yield Outcome(
                    number=number, target=kind.name, mutation=mutation.__name__, result=result, note=note
                )


def judge(kind: Target, folder: Path, expected: Sequence[str]) -> tuple[str, str]:
    """What the reader of `kind` makes of the file in `folder`, and the error if there is one."""
    began = time.monotonic()
    try:
        found = kind.read(folder)
    except CbsError as error:
        result, note = "refused", str(error)
    except Exception as error:
        # Any other exception is what the fuzzer looks for.
        result, note = "crash", f"{type(error).__name__}: {error}"
    else:
        note = ""
        if found == list(expected):
            result = "same"
        else:
            known = Counter(expected)
            result = "part" if kind.partial and not Counter(found) - known else "wrong"
    if Payload.trace.exists():
        Payload.trace.unlink()
        result, note = "crash", "a pickle was run"
    if time.monotonic() - began > SLOWEST:
        result, note = "crash", f"took {time.monotonic() - began:.0f} s"
    return result, note


def _original(kind: Target, home: Path) -> tuple[Path, bytes, list[str]]:
    folder = home / kind.name
    folder.mkdir()
    kind.write(folder)
    return folder, (folder / kind.file).read_bytes(), kind.read(folder)


def _block() -> BlockProblem:
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(7, 9))
    return BlockProblem(
        weights=generator.normal(size=9),
        rows=rows,
        gradient=rows.mean(axis=0),
        damping=0.01,
        n_prune=4,
        name="b",
    )


def _write_block(folder: Path) -> None:
    write_instance(folder / "b.npz", _block(), {"layer": "fc", "seeds": [0, 1]})


def _read_block(folder: Path) -> list[str]:
    problem, metadata = read_instance(folder / "b.npz", max_bytes=2**28)
    return [problem.fingerprint(), problem.name, json.dumps(metadata)]


def _write_solution(folder: Path) -> None:
    write_solution(folder / "s.npz", _block(), lower_bound(_block(), "joint"))


def _read_solution(folder: Path) -> list[str]:
    solution = read_solution(folder / "s.npz", max_bytes=2**28)
    names = [field.name for field in fields(solution) if field.name not in ("keep", "weights", "certificate")]
    arrays = {name: getattr(solution, name) for name in ("keep", "weights")}
    bound = None if solution.certificate is None else solution.certificate.lower_bound(_block())
    return [checksum({}, arrays), repr(bound), *(repr(getattr(solution, name)) for name in names)]


def _write_masks(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(shape, generator=generator) > 0.5 for name, shape in (("a", (3, 4)), ("b", (5,)))
    }
    save_masks(folder / "m.safetensors", masks, metadata={"method": "none"})


def _read_masks(folder: Path) -> list[str]:
    path = folder / "m.safetensors"
    masks = {name: keep.numpy() for name, keep in load_masks(path).items()}
    return [checksum(load_mask_metadata(path), masks)]


FEW = Recipe(curvature=EmpiricalFisher(samples=20))


def _write_report(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    data = torch.randn(30, 4), torch.arange(30) % 3
    report = prune(model, data, sparsity=0.5, loss_fn=cross_entropy, recipe=FEW, progress=False)
    save_report(report, folder)


def _read_report(folder: Path) -> list[str]:
    return [json.dumps(load_report(folder).to_dict())]


def _write_stages(folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    data = torch.randn(30, 4), torch.arange(30) % 3
    prune(
        model,
        data,
        sparsity=0.5,
        recipe=FEW,
        stages=2,
        loss_fn=cross_entropy,
        run_dir=folder,
        progress=False,
    )
    # What a run that resumes compares with, kept apart from what is corrupted.
    (folder / TOLD).write_bytes((folder / RUN_FILE).read_bytes())


def _read_stages(folder: Path) -> list[str]:
    with RunStore(folder, json.loads((folder / TOLD).read_text())) as store:
        state = next(stored_stages(store, torch.device("cpu")), None)
    if state is None:
        raise InstanceFormatError("path", "a stage that is not believed", "make it again")
    arrays = {"weights": state.weights.numpy(), "keep": state.keep.numpy()}
    numbers = (state.damping, state.update_damping, state.passes, state.samples)
    return [checksum({}, arrays), repr(numbers), repr(state.records)]


def _write_piece(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    with RunStore(folder, {"format": "fuzz"}) as store:
        store.keep(
            "rows_0000", {"first": 0, "samples": 4}, {"rows": rows, "sum": rows.sum(0)}, compress=False
        )


def _read_piece(folder: Path) -> list[str]:
    with RunStore(folder, {"format": "fuzz"}) as store:
        piece = store.recall("rows_0000")
    if piece is None:
        # To the run it is as if the piece were not there: it makes it again.
        raise InstanceFormatError("path", "a piece that is not believed", "make it again")
    header, arrays = piece
    return [json.dumps(header, sort_keys=True), checksum({}, arrays)]


def _write_plan(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.write_plan("fuzz", "a study", Plan(runs=(), left_out=("greedy_obs: not for this program",)))


def _read_plan(folder: Path) -> list[str]:
    return [json.dumps(read_plan(folder), sort_keys=True)]


def _write_journal(folder: Path) -> None:
    with Journal(folder) as journal:
        for number in range(5):
            journal.append({"run": f"{number:064x}", "objective": number / 7, "status": "optimal"})


def _read_journal(folder: Path) -> list[str]:
    return [json.dumps(row, sort_keys=True) for row in read_rows(folder).values()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer and print a table; 1 if anything crashed or was wrongly accepted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000, help="corrupted files (default 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case to repeat")
    given = parser.parse_args(arguments)
    # Every damaged piece of a run is worth a line where it happens by itself.
    logging.getLogger("cbs_opt").setLevel(logging.ERROR)
    counts: Counter[tuple[str, str]] = Counter()
    bad: list[Outcome] = []
    for outcome in fuzz(given.count, given.seed, only=given.only):
        counts[outcome.target, outcome.result] += 1
        if outcome.result in ("crash", "wrong"):
            bad.append(outcome)
    results = ("refused", "same", "part", "wrong", "crash")
    lines = [f"{'file':15}" + "".join(f"{result:>9}" for result in results)]
    for name in sorted({target for target, _ in counts}):
        lines.append(f"{name:15}" + "".join(f"{counts[name, result]:9d}" for result in results))
    lines += [f"{o.result} {o.target} case {o.number} ({o.mutation}): {o.note[:300]}" for o in bad[:50]]
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
