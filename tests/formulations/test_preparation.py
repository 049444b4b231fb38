"""Compilation is outside every clock: kernels are ready before a method starts, and stay as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from numba.core import event

from experiments.benchmarks.first_call import first_call
from formulations import Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.compiled import REAL, compiled, entry, make_ready
from formulations.enumeration import enumerate_optimum
from formulations.incumbents import greedy, swap_search
from formulations.outer_approximation import outer_approximation
from formulations.preparation import KERNELS, kernel_names, prepare
from formulations.problem import PROGRAMS
from formulations.relaxations import lower_bound
from formulations.support import NofM
from tests.formulations.blocks import KINDS, block

METHODS = {
    "greedy_obs": greedy,
    "swap_search": swap_search,
    "enumeration": enumerate_optimum,
    "lower_bound": lower_bound,
    "outer_approximation": outer_approximation,
    "branch_and_bound": branch_and_bound,
}
LATE = 5.0
"""Seconds that the first exact solve may take longer than the second."""


class Compilations(event.Listener):
    """Names of the kernels that were compiled while it listened."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, event: event.Event) -> None:
        self.names.append(event.data["dispatcher"].py_func.__qualname__)

    def on_end(self, event: event.Event) -> None:
        pass


@contextmanager
def compilations() -> Iterator[list[str]]:
    with event.install_listener("numba:compile", Compilations()) as listener:
        yield listener.names


def kernel():
    """A kernel whose source has no file, so that there is no folder to keep it in."""

    def halved(x):
        return 0.5 * x

    halved.__code__ = halved.__code__.replace(co_filename="<no file>")
    return entry(REAL)(compiled(halved))


def test_every_method_with_kernels_is_tested():
    assert set(METHODS) == set(KERNELS)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_compiled_after_preparation(method, program):
    prepare(method, program)
    with compilations() as names:
        for kind in KINDS:
            METHODS[method](block(kind, 8, 4, seed=1), program, limits=Limits(time_limit=60.0))
    assert not names


def named(method, program):
    return [name.split(":") for name in kernel_names(method, program)]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_compiled_for_cells_after_preparation(method, program):
    prepare(method, program, cells=True)
    kernels = [getattr(import_module(module), name) for module, name in named(method, program)]
    ready = [len(kernel.overloads) for kernel in kernels]
    with compilations() as names:
        for kind in KINDS:
            problem = replace(block(kind, 8, 4, seed=1), support=NofM(2, 4))
            METHODS[method](problem, program, limits=Limits(time_limit=60.0))
    assert not names
    # Nor are there kernels of other types, which an earlier run of this installation may have left on disk.
    assert [len(kernel.overloads) for kernel in kernels] == ready


@pytest.mark.parametrize("program", PROGRAMS)
def test_large_blocks_compile_nothing_more(program):
    prepare("branch_and_bound", program)
    with compilations() as names:
        lower_bound(block("wide", 300, 150, seed=0), program, limits=Limits(iteration_limit=3))
        branch_and_bound(block("random", 60, 30, seed=0), program, limits=Limits(node_limit=3))
    assert not names


@pytest.mark.parametrize("program", PROGRAMS)
def test_scalars_of_numpy_are_numbers(program):
    problem = block("random", 12, 6, seed=0)
    limits = Limits(rel_gap=np.float32(1e-4), time_limit=np.float64(60.0), seed=np.int64(0))
    prepare("branch_and_bound", program)
    with compilations() as names:
        solution = branch_and_bound(problem, program, limits=limits)
    assert not names
    assert type(limits.rel_gap) is float
    assert type(limits.seed) is int
    assert solution.proved
    json.dumps([solution.bound, solution.rel_gap])


def test_preparation_says_once_that_it_compiles(caplog):
    halved = kernel()
    make_ready([halved], "halves")
    make_ready([halved], "halves")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiling halves" in caplog.text


def test_without_a_folder_kernels_work_and_the_message_says_so(caplog):
    halved = kernel()
    make_ready([halved], "halves")
    assert halved(3.0) == 1.5
    assert "in every process" in caplog.text


def test_a_full_disk_costs_the_kept_kernel_only(caplog):
    halved = kernel()
    compile_once, failures = halved.compile, []

    def fail_to_save(types):
        compile_once(types)
        failures.append(OSError(28, "No space left on device"))
        raise failures[-1]

    halved.compile = fail_to_save
    make_ready([halved], "halves")
    assert len(failures) == 1
    assert halved(3.0) == 1.5
    assert "cannot be kept on disk" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_first_solve_after_an_installation_is_as_fast_as_the_second(program, tmp_path):
    fresh = first_call("digits_64_s50", program, 5.0, tmp_path)
    assert fresh.proved
    assert fresh.first <= fresh.second + LATE
    assert fresh.messages.count("compiling") == 1
    again = first_call("digits_64_s50", program, 5.0, tmp_path)
    assert not again.messages
    assert again.wait <= LATE
