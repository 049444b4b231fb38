"""What loads what: the front, the command line and the methods load a library when they use it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cbs_opt
import formulations
from cbs_opt.cli.app import app

HEAVY = {
    "torch",
    "numba",
    "pandas",
    "pyarrow",
    "matplotlib",
    "sklearn",
    "pyomo",
    "highspy",
    "ortools",
    "pyscipopt",
    "gurobipy",
}
SOLVERS = {"pyomo", "highspy", "ortools", "pyscipopt", "gurobipy"}
COMMANDS = tuple(command.name for command in app.registered_commands)
OVERHEAD = 0.5
"""Processor seconds that `import cbs_opt` may take, and a message of the command."""


def loaded_by(code: str, libraries: set[str]) -> set[str]:
    """Libraries among `libraries` that a fresh process has loaded after `code`."""
    (loaded,) = loaded_after([code], libraries)
    return loaded


def loaded_after(steps: list[str], libraries: set[str]) -> list[set[str]]:
    """Libraries among `libraries` that one fresh process has loaded after each of `steps`."""
    report = f"print(*({libraries!r} & set(sys.modules)), file=sys.__stdout__)"
    script = "\n".join(["import sys", *(f"{step}\n{report}" for step in steps)])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()[-len(steps) :]]


def command(*words: str) -> str:
    """Code that runs `cbs-opt` with these words."""
    return (
        f"sys.argv = ['cbs-opt', *{words!r}]\n"
        "from cbs_opt.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint()"
    )


@pytest.mark.parametrize("package", ["cbs_opt", "formulations"])
def test_the_front_loads_nothing_heavy(package):
    assert not loaded_by(f"import {package}", HEAVY)


@pytest.fixture(scope="module")
def loaded_step_by_step() -> list[set[str]]:
    """What one fresh process has loaded of `HEAVY`: after solving, and after using names of the front."""
    solving = """
import numpy as np
from cbs_opt import BlockProblem, solve
block = BlockProblem(weights=np.ones(4), n_prune=2, rows=np.eye(4), damping=0.1)
solve(block, "branch_and_bound", program="joint")
"""
    names = ("prune", "Partition", "solve", "available_methods", "PruneReport")
    using = "\n".join(["import cbs_opt", *(f"cbs_opt.{name}" for name in names)])
    return loaded_after([solving, using], HEAVY)


def test_solving_loads_no_library_of_tables(loaded_step_by_step):
    solving, _ = loaded_step_by_step
    assert "numba" in solving
    assert not solving & (SOLVERS | {"pandas", "matplotlib", "sklearn"})


def test_names_of_the_front_load_no_solver(loaded_step_by_step):
    _, using = loaded_step_by_step
    assert "torch" in using
    assert not using & (SOLVERS | {"sklearn", "matplotlib"})


@pytest.mark.parametrize("package", [cbs_opt, formulations])
def test_the_front_names_what_it_has(package):
    assert set(package.__all__) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


MESSAGES = [
    ("--help",),
    ("--version",),
    ("unknown",),
    ("--unknown",),
    *((name, "--help") for name in COMMANDS),
    *((name, "--unknown") for name in COMMANDS),
    ("prune",),
    ("solve",),
    ("compare", "block"),
]


def test_messages_of_the_command_line_load_neither_torch_nor_numpy():
    code = "\n".join(command(*words) for words in MESSAGES)
    assert not loaded_by(code, HEAVY | {"numpy", "scipy"})


def processor_seconds(code: str) -> float:
    """Processor seconds of `code` in a fresh process, the start of Python not counted."""
    script = f"import sys, time\nbegan = time.process_time()\n{code}\nprint(time.process_time() - began)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "code",
    [
        "import cbs_opt",
        *(command(*words) for words in (("--help",), ("--version",), ("solve", "block", "--unknown"))),
    ],
    ids=["the front", "--help", "--version", "an unknown option"],
)
def test_the_front_and_messages_come_at_once(code):
    # The second time what was read from the disk is in memory.
    assert processor_seconds(code) <= OVERHEAD or processor_seconds(code) <= OVERHEAD
