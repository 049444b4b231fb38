"""One run inside a worker: prepare, solve, check, and say in plain values what happened."""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from cbs_opt import solving
from cbs_opt.select.preparation import prepare
from cbs_opt.study.errors import INVALID, OUT_OF_MEMORY, REFUSED, UNAVAILABLE
from cbs_opt.study.expansion import Run
from cbs_opt.system import memory
from cbs_opt.system.plain import plain
from cbs_opt.system.versions import machine, versions
from formulations.errors import CbsError, InstanceFormatError, SolverUnavailableError
from formulations.instances import load_library
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, Termination, TracePoint
from formulations.verification import verify

logger = logging.getLogger(__name__)

WARM_UP_BLOCK = "digits_12_s50"
SOLVER_WARM_UP = 2.0
"""Seconds for a solver to be imported and to build and start a model; there is nothing of ours to compile."""
BLOCKS_KEPT = 2
LONGEST_TRACE = 200
LONGEST_NOTE = 500


class RunSolver:
    """Solves runs one after another, and knows which methods are compiled and imported already."""

    def __init__(self) -> None:
        self._warm: set[tuple[str, str, str]] = set()
        self._blocks: dict[tuple[str, str], BlockProblem] = {}

    def warm_up(self, run: Run) -> None:
        """Solve a small block once for each method, so that imports and compilation are not timed."""
        foreign = run.kind == "solver"
        # Options may lead our methods through code that is not compiled yet.
        what = (run.method, run.program, "" if foreign else repr(run.options))
        if what in self._warm:
            return
        self._warm.add(what)
        # Not the run's own limit: a solve that stops early has not compiled all that it needs.
        seconds = min(run.limits.warm_up, SOLVER_WARM_UP) if foreign else run.limits.warm_up
        try:
            _solve(load_library(WARM_UP_BLOCK)[0], run, seconds)
        except Exception as error:
            # The timed run meets the same, and its row says so.
            logger.info("warm-up of %s: %s", run.method, error)

    def load(self, run: Run) -> None:
        """Read the block before the clock starts; `answer` repeats and reports a failure."""
        try:
            self._block(run)
        except Exception as error:
            logger.info("%s: %s", run.recipe.name, error)

    def _block(self, run: Run) -> BlockProblem:
        """Return the block of a run; the last few are kept, since runs come block by block."""
        what = (run.recipe.name, run.block)
        if what not in self._blocks:
            problem = run.recipe.load()
            if problem.fingerprint() != run.block:
                found = f"{run.recipe.name}: its data changed after the study began"
                raise InstanceFormatError("instances", found, "start the study again")
            while len(self._blocks) >= BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[what] = problem
        return self._blocks[what]

    def answer(self, run: Run) -> dict[str, Any]:
        """Solve and check; the columns of a row that are known after the run."""
        outcome: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
        memory.reset_peak()
        cpu, began = _processor_seconds(), time.perf_counter()
        try:
            problem = self._block(run)
            prepare(run.method, run.program)
            cpu, began = _processor_seconds(), time.perf_counter()
            solution = _solve(problem, run, run.limits.time_limit)
        except MemoryError:
            outcome |= {"status": OUT_OF_MEMORY, "note": "an allocation failed at the memory limit"}
        except SolverUnavailableError as error:
            outcome |= {"status": UNAVAILABLE, "note": str(error)}
        except CbsError as error:
            outcome |= {"status": REFUSED, "note": str(error)}
        except Exception as error:
            logger.exception("%s on %s", run.method, run.recipe.name)
            outcome |= {"status": Termination.ERROR.value, "note": f"{type(error).__name__}: {error}"}
        else:
            outcome |= {"seconds": time.perf_counter() - began, "cpu_seconds": _processor_seconds() - cpu}
            outcome |= _checked(problem, run, solution)
        outcome.setdefault("seconds", time.perf_counter() - began)
        outcome.setdefault("cpu_seconds", _processor_seconds() - cpu)
        outcome["note"] = str(outcome.get("note", ""))[:LONGEST_NOTE]
        return {**outcome, "peak_memory": memory.peak(), "versions": versions(), "machine": machine()}


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _solve(problem: BlockProblem, run: Run, time_limit: float) -> BlockSolution:
    names = ("rel_gap", "node_limit", "iteration_limit", "threads")
    limits = {"time_limit": time_limit, **{name: getattr(run.limits, name) for name in names}}
    return solving.solve(problem, run.method, program=run.program, seed=run.seed, **limits, **run.options)


def _checked(problem: BlockProblem, run: Run, solution: Any) -> dict[str, Any]:
    """Return what a solution says, its objective recomputed; `INVALID` if it contradicts itself."""
    if not isinstance(solution, BlockSolution):
        return {"status": INVALID, "note": f"returned a {type(solution).__name__}, not a BlockSolution"}
    checked = verify(problem, solution)
    wrong = list(checked.notes) if checked.wrong else []
    if solution.program != run.program:
        wrong.append(f"it solved program {solution.program!r}")
    stats = solution.stats
    columns: dict[str, Any] = {
        **{"nodes": stats.nodes, "iterations": stats.iterations, "extra": plain(stats.extra)},
        **{"certified_bound": _number(checked.bound), "trace": _trace(solution.trace)},
    }
    if wrong:
        return {"status": INVALID, "note": "; ".join(wrong), **columns}
    return {
        **{"status": solution.termination.value, "note": stats.message, **columns},
        "limit": None if solution.limit is None else solution.limit.value,
        "objective": _number(checked.objective),
        "bound": _number(solution.bound),
        "gap": None if solution.bound is None else _number(solution.gap),
        "proved": solution.proved,
    }


def _trace(points: Sequence[TracePoint]) -> list[dict[str, Any]]:
    """Return at most `LONGEST_TRACE` points, evenly chosen, the last one among them."""
    count = min(len(points), LONGEST_TRACE)
    chosen = [points[round((i + 1) * len(points) / count) - 1] for i in range(count)]
    return [asdict(p) | {"objective": _number(p.objective), "bound": _number(p.bound)} for p in chosen]


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
