"""Have what a method compiles ready before any clock starts: the one place that all commands go through."""

from __future__ import annotations

from functools import cache

from formulations import preparation
from formulations.preparation import BOUND, SWAP_SEARCH, make_ready_named
from formulations.problem import PROGRAMS
from formulations.solvers import BRIDGES

DENSE = "cbs_opt.select.selection_program.dense"
SCAN = "cbs_opt.select.selection_program.pair_search"
JOINT_SEARCH = (*SWAP_SEARCH["joint"], *BOUND["joint"])
KERNELS = {
    ("swap_search", "selection"): (f"{DENSE}:_swap_one_block", f"{DENSE}:_swap_blocks", f"{SCAN}:_scan_rows"),
    ("swap_search", "joint"): JOINT_SEARCH,
    ("greedy_obs", "joint"): JOINT_SEARCH,
    ("iterative_hard_threshold", "joint"): JOINT_SEARCH,
}
"""Kernels of the searches on the blocks of a network by method and program, as "module:name"."""


@cache
def prepare(method: str, program: str) -> None:
    """Compile what `method` needs on `program`, or load it, so that none of it counts in its times.

    A saliency and a method of another package compile nothing of ours, the name of a solver stands for what
    any solver needs, a first set of weights.

    Compiles once an installation, half a minute at most, which a warning says; loads in some tenths of a
    second in every other process; costs nothing after that. `formulations` does the same for its methods when
    they are called directly.
    """
    solver = method.partition(":")[0] in (*BRIDGES, "pyomo")
    names = preparation.kernel_names("greedy_obs" if solver else method, program)
    make_ready_named((*names, *KERNELS.get((method, program), ())), method, program)


def prepare_all() -> None:
    """Have every method ready for both programs, on counts and in cells."""
    for program in PROGRAMS:
        for method in (*preparation.KERNELS, *(name for name, _ in KERNELS)):
            prepare(method, program)
        for method in preparation.KERNELS:
            preparation.prepare(method, program, cells=True)
