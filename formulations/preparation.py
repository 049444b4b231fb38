"""Which kernels a method uses, so that all are compiled before its clock starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module

from formulations.compiled import make_ready
from formulations.problem import BlockProblem
from formulations.support import Cells

SWAPS = "formulations.swap_kernels"
REDUCTION = "formulations.reduction"
ENUMERATION = "formulations.enumeration"
SPLIT = "formulations.relaxations.diagonal_split"
NORM = "formulations.relaxations.support_norm"
JOINT_BOUND = "formulations.relaxations.perspective_kernels"
CLUSTERS = "formulations.relaxations.cluster_kernels"
SELECTION_BOUND = "formulations.relaxations.capped_simplex_kernels"
JOINT_NODES = "formulations.branch_and_bound.joint"
SELECTION_NODES = "formulations.branch_and_bound.selection"

GREEDY = {"joint": (f"{SWAPS}:prune_joint",), "selection": (f"{SWAPS}:prune_selection",)}
SWAP_SEARCH = {
    "joint": (*GREEDY["joint"], f"{SWAPS}:sweep", f"{SWAPS}:swap_joint"),
    "selection": (*GREEDY["selection"], f"{SWAPS}:swap_selection"),
}
BOUND = {
    "joint": (
        f"{REDUCTION}:reduce_joint",
        f"{SPLIT}:barrier_step",
        f"{NORM}:held_sum",
        f"{NORM}:shrink_support",
        f"{NORM}:largest_sum",
        f"{NORM}:prox_support_norm",
        f"{JOINT_BOUND}:begin_perspective",
        f"{JOINT_BOUND}:advance_perspective",
        f"{JOINT_BOUND}:invert_perspective",
        f"{JOINT_BOUND}:split_slopes",
        f"{CLUSTERS}:mix_clusters",
        f"{CLUSTERS}:join_barrier",
    ),
    "selection": (
        f"{REDUCTION}:reduce_selection",
        f"{SPLIT}:barrier_step",
        f"{SELECTION_BOUND}:project_simplices",
        f"{SELECTION_BOUND}:shift_slopes",
        f"{SELECTION_BOUND}:smallest_sum",
        f"{SELECTION_BOUND}:begin_simplex",
        f"{SELECTION_BOUND}:advance_simplex",
        f"{SELECTION_BOUND}:invert_simplex",
    ),
}
NODES = {
    "joint": (f"{JOINT_NODES}:evaluate_joint", f"{JOINT_NODES}:improve_joint"),
    "selection": (f"{SELECTION_NODES}:evaluate_selection", f"{SELECTION_NODES}:improve_selection"),
}
KERNELS: Mapping[str, tuple[Mapping[str, tuple[str, ...]], ...]] = {
    "greedy_obs": (GREEDY,),
    "swap_search": (SWAP_SEARCH,),
    "enumeration": (
        {"joint": (f"{ENUMERATION}:_advance_joint",), "selection": (f"{ENUMERATION}:_advance_selection",)},
    ),
    "lower_bound": (SWAP_SEARCH, BOUND),
    "outer_approximation": (SWAP_SEARCH, BOUND),
    "branch_and_bound": (SWAP_SEARCH, BOUND, NODES),
}
"""Kernels of a method by program, as "module:name"."""


@cache
def prepare(method: str, program: str, cells: bool = False) -> None:
    """Have the kernels of a method ready, so that no compilation falls into its time limit.

    Parameters
    ----------
    method : str
        A method of this package, or "greedy_obs" for what only needs a first set, as the bridges to
        solvers do. Another name has no kernels here.
    program : {"selection", "joint"}
    cells : bool
        Whether for a support that keeps so many in each of several cells.

    Notes
    -----
    Compiles once an installation, which a warning says; loads in some tenths of a second in every
    other process; costs nothing after that.
    """
    make_ready_named(kernel_names(method, program), method, program, cells)


def prepare_for(problem: BlockProblem, method: str, program: str) -> None:
    """Have the kernels of a method ready for the support of a block."""
    prepare(method, program, isinstance(problem.sets.kept(problem.n), Cells))


def kernel_names(method: str, program: str) -> list[str]:
    """Return the kernels of a method of this package as "module:name"; none for other names."""
    return [name for group in KERNELS.get(method, ()) for name in group.get(program, ())]


def make_ready_named(names: Iterable[str], method: str, program: str, cells: bool = False) -> None:
    """Import kernels by "module:name" and have them ready for `method`."""
    kernels = []
    for name in names:
        module, _, kernel = name.partition(":")
        kernels.append(getattr(import_module(module), kernel))
    make_ready(kernels, f"the kernels of {method} ({program}{', in cells' if cells else ''})", cells)
