"""Kill `prune` again and again at random moments, go on, and compare the results bit by bit.

    python -m tests.stress.random_kills --kills 200 --out random_kills.json

Every case first runs to its end without a directory, and once with one for its duration. Each trial then
starts the same run in a fresh directory, sends it SIGKILL after a random share of that duration, starts it
again in the same directory, perhaps kills it again, and lets it finish. The pruned network, the weights
in double precision and the report without its times must be those of the run that nothing disturbed.
Exit code 1 if one differs. Trial `N` of seed `S` draws the same moments in every run.

One process imports everything and forks each run (about 20 ms instead of the seconds that imports take),
so that most kills fall into work and not into imports.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

from cbs_opt import PruneReport, load_report, prune
from cbs_opt.cli import app
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.recipe.records import Recipe, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import OBS, Exact, SwapSearch
from cbs_opt.runs import folder as run_store
from cbs_opt.system.resources import Resources
from experiments.benchmarks import digits_network

SAVE_EVERY = 0.02
"""Seconds between pieces in these short runs, where a user's runs take 2."""
AGAIN = 0.4
"""How often a run that goes on is killed too."""
ANSWER, MODULES = "answer.json", "modules.json"
LONGEST = 900.0
"""Seconds after which a run counts as hung."""
TIMES = ("seconds", "certificate_seconds", "peak_memory_bytes")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to prune; `run` is given a scratch folder and, if it is to be resumable, its directory."""

    name: str
    run: Callable[[Path, Path | None], dict[str, str]]
    share: int = 5
    """Trials out of the sum over cases."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one trial.

    Attributes
    ----------
    case : str
    seed : int
    moments : tuple of float
        Shares of the undisturbed duration at which the run was killed.
    phases : tuple of str
        What was on disk last at each kill.
    same : bool
        Whether the result is that of the undisturbed run.
    note : str
        What differs.
    """

    case: str
    seed: int
    moments: tuple[float, ...]
    phases: tuple[str, ...]
    same: bool
    note: str = ""


def one_call(**options: Any) -> Callable[[Path, Path | None], dict[str, str]]:
    """`prune` on a small network of digits."""

    def run(folder: Path, run_dir: Path | None) -> dict[str, str]:
        model, train, test = digits_network.network(), digits_network.train(), digits_network.test()
        report = prune(model, train, evaluate=test, run_dir=run_dir, progress=False, **options)
        return answer(model.state_dict(), report, run_dir)

    return run


def command(*options: str) -> Callable[[Path, Path | None], dict[str, str]]:
    """`cbs-opt prune`, with ``--resume`` where the run is to be resumable."""

    def run(folder: Path, run_dir: Path | None) -> dict[str, str]:
        out = folder / "whole" if run_dir is None else run_dir
        file = folder / "digits.py"
        file.write_text("from experiments.benchmarks.digits_network import network, test, train\n")
        given = ["--model", f"{file}:network", "--data", f"{file}:train", "--evaluate", f"{file}:test"]
        given += ["--out", str(out), *options]
        given += [] if run_dir is None else ["--resume"]
        app(["prune", *given], standalone_mode=False)
        weights = safetensors.torch.load_file(out / "weights.safetensors")
        return answer(weights, load_report(out), None if run_dir is None else out / "state")

    return run


TEMPORARIES = Resources(chunk_memory=1 << 22)
"""So that the rows come in several pieces."""


def cases() -> list[Case]:
    """The ways to prune that are killed."""
    exact = Recipe(
        curvature=EmpiricalFisher(samples=200),
        layer_inputs=0.0,
        damping=0.5,
        select=Exact(),
        weights=Weights(target="2.weight", blocks="row"),
    )
    fields = ("curvature.samples=200", "weights.blocks=layer")
    return [
        Case(
            name="selection, swap search",
            run=one_call(
                sparsity=0.8,
                recipe=Recipe.grid(
                    Recipe(curvature=EmpiricalFisher(samples=300), select=SwapSearch(program="selection")),
                    damping=[absolute(1e-3), absolute(1e-2)],
                    update=[Update(scale=0.5), Update(scale=1.0)],
                ),
                resources=TEMPORARIES,
            ),
        ),
        Case(
            name="joint, layer inputs",
            run=one_call(
                sparsity=0.8,
                recipe=Recipe.grid(
                    Recipe(
                        curvature=EmpiricalFisher(samples=300),
                        layer_inputs=1.0,
                        weights=Weights(blocks="layer"),
                    ),
                    damping=[0.1, 1.0],
                ),
                resources=TEMPORARIES,
            ),
        ),
        Case(
            name="stages",
            run=one_call(
                sparsity=0.8,
                recipe=Recipe.grid(
                    Recipe(
                        curvature=EmpiricalFisher(samples=200),
                        layer_inputs=1.0,
                        select=OBS(program="selection"),
                    ),
                    damping=[0.1, 1.0],
                ),
                stages=Stages(count=3, final_updates=2),
                resources=TEMPORARIES,
            ),
        ),
        Case(
            name="certified rows",
            run=one_call(sparsity=0.7, recipe=exact, certify=True, resources=TEMPORARIES),
        ),
        Case(
            name="rows over two processes",
            run=one_call(sparsity=0.7, recipe=exact, resources=Resources(workers=2)),
            share=1,
        ),
        Case(
            name="cbs-opt prune --resume",
            run=command("--sparsity", "0.8", "--certify", *(part for f in fields for part in ("--set", f))),
        ),
    ]


def answer(weights: dict[str, torch.Tensor], report: PruneReport, run_dir: Path | None) -> dict[str, str]:
    """What must be the same in every run, as digests; `run_dir` adds the weights before they were rounded."""
    found = {
        "network": _digest(weights),
        "masks": _digest(dict(report.masks)),
        "report": hashlib.sha256(json.dumps(_timeless(report.to_dict())).encode()).hexdigest(),
    }
    if run_dir is not None:
        with np.load(run_dir / "result.npz") as arrays:
            found["double precision"] = hashlib.sha256(arrays["weights"].tobytes()).hexdigest()
    return found


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(entry) for key, entry in value.items() if key not in TIMES}
    return [_timeless(entry) for entry in value] if isinstance(value, list) else value


def forked(case: Case, folder: Path, run_dir: Path | None, kill_after: float | None = None) -> bool:
    """Run a case in a process of its own, killed after some seconds; whether it came to its end.

    Raises
    ------
    RuntimeError
        If the run failed or hung.
    """
    (folder / ANSWER).unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        _in_child(case, folder, run_dir)
    deadline = time.monotonic() + (LONGEST if kill_after is None else kill_after)
    status = None
    while status is None:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = code
        elif time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
        else:
            time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))
    _end_group(child)
    if status == 0:
        return True
    if kill_after is not None and os.WIFSIGNALED(status):
        return False
    raise RuntimeError(f"{case.name}: {(folder / 'error.txt').read_text() if status != 9 else 'hung'}")


def _in_child(case: Case, folder: Path, run_dir: Path | None) -> None:
    """Run the case, write its answer, and end the process whatever happens."""
    code = 1
    try:
        os.setsid()
        with (folder / "output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        run_store.SAVE_EVERY = SAVE_EVERY
        found = case.run(folder, run_dir)
        (folder / MODULES).write_text(json.dumps([name for name in sys.modules if "." in name]))
        (folder / ANSWER).write_text(json.dumps(found))
        code = 0
    except BaseException:
        # The parent reads what went wrong.
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _end_group(leader: int) -> None:
    """End worker processes that outlived a run that was killed."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def phase(run_dir: Path) -> str:
    """The kind of the last file in a directory."""
    state = run_dir / "state" if (run_dir / "state").is_dir() else run_dir
    files = [path for path in state.glob("*.npz")] if state.is_dir() else []
    if (run_dir / "weights.safetensors").exists():
        return "output"
    if not files:
        return "begun" if state.is_dir() else "nothing"
    return max(files, key=lambda path: path.stat().st_mtime_ns).name.partition("_")[0].removesuffix(".npz")


def tried(case: Case, home: Path, seed: int, whole: dict[str, str], duration: float) -> Trial:
    """Run a case, kill it, and go on until it ends; what it ends with."""
    generator = np.random.default_rng(seed)
    folder = home / f"trial_{seed}"
    folder.mkdir()
    run_dir = folder / "run"
    moments: list[float] = []
    phases: list[str] = []
    note = ""
    try:
        while not moments or generator.random() < AGAIN:
            share = float(generator.random())
            if forked(case, folder, run_dir, kill_after=share * duration):
                break
            moments.append(share)
            phases.append(phase(run_dir))
        else:
            forked(case, folder, run_dir)
        found = json.loads((folder / ANSWER).read_text())
        note = ", ".join(name for name in whole if found.get(name) != whole[name])
    except RuntimeError as error:
        note = str(error)
    shutil.rmtree(folder)
    return Trial(
        case=case.name, seed=seed, moments=tuple(moments), phases=tuple(phases), same=not note, note=note
    )


def kill_often(kills: int, seed: int = 0, *, chosen: Sequence[Case] | None = None) -> list[Trial]:
    """Trials of all cases in turn until so many kills have struck.

    Trials in which the run ended before it was killed count as trials, not as kills.
    """
    chosen = cases() if chosen is None else chosen
    rounds = range(max(case.share for case in chosen))
    turns = [case for number in rounds for case in chosen if number < case.share]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name, tqdm(total=kills, unit="kill", disable=None) as bar:
        home = Path(name)
        whole = {case.name: _undisturbed(case, home / str(number)) for number, case in enumerate(chosen)}
        struck = 0
        while struck < kills:
            case = turns[len(trials) % len(turns)]
            answer, duration = whole[case.name]
            trials.append(tried(case, home, seed * 100_003 + len(trials), answer, duration))
            struck += len(trials[-1].moments)
            bar.update(len(trials[-1].moments))
    return trials


def _undisturbed(case: Case, folder: Path) -> tuple[dict[str, str], float]:
    """What a case ends with, and how many seconds it takes with a directory."""
    folder.mkdir()
    forked(case, folder, None)
    plain = json.loads((folder / ANSWER).read_text())
    # What a run imports as it goes, the next ones find imported.
    for module in json.loads((folder / MODULES).read_text()):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    began = time.monotonic()
    forked(case, folder, folder / "timed")
    seconds = time.monotonic() - began
    kept = json.loads((folder / ANSWER).read_text())
    if any(kept[name] != plain[name] for name in plain):
        raise RuntimeError(f"{case.name}: a directory changes the result")
    return kept, seconds


def summary(trials: Sequence[Trial]) -> str:
    """A table: trials and kills by case, and what was on disk at the kills."""
    lines = [f"{'case':28}{'trials':>8}{'kills':>8}{'same':>8}"]
    for name in dict.fromkeys(trial.case for trial in trials):
        own = [trial for trial in trials if trial.case == name]
        kills = sum(len(trial.moments) for trial in own)
        lines.append(f"{name:28}{len(own):8}{kills:8}{sum(trial.same for trial in own):8}")
    kills = sum(len(trial.moments) for trial in trials)
    lines.append(f"{'all':28}{len(trials):8}{kills:8}{sum(trial.same for trial in trials):8}")
    found = Counter(phase for trial in trials for phase in trial.phases)
    lines.append("last on disk: " + ", ".join(f"{name} {count}" for name, count in found.most_common()))
    lines += [f"trial {trial.seed} of {trial.case}: {trial.note}" for trial in trials if not trial.same]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill runs and print a table; 1 if a result differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases()], help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file for all trials")
    given = parser.parse_args(arguments)
    chosen = [case for case in cases() if given.cases is None or case.name in given.cases]
    trials = kill_often(given.kills, given.seed, chosen=chosen)
    if given.out is not None:
        given.out.write_text(json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")
    sys.stdout.write(summary(trials) + "\n")
    return 0 if all(trial.same for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
