"""A rival for blocks beyond Gurobi's size-limited licence: single-tree outer approximation.

The licence limits models with products to 200 variables, but a model of linear cuts on n binaries may
have 2000. Planes of `formulations.cut_planes` are added as lazy constraints at every set that Gurobi
proposes and, at the root node, at fractional points.

Sources: Quesada and Grossmann (1992); Bertsimas and Van Parys (2020).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from formulations import BlockProblem, BlockSolution, Limits
from formulations.cut_planes import Cut, CutSource, cut_sources
from formulations.incumbents import swap_search
from formulations.milp import DUAL_TOLERANCE
from formulations.models.scaling import ScaledBlock, scale_block
from formulations.problem import BoolArray, FloatArray
from formulations.relaxations import lower_bound
from formulations.solution import Limit
from formulations.solvers.conclusion import CONSTANT_ERROR, Outcome, conclude, known_set

METHOD = "gurobi_lazy_cuts"
ROOT_ROUNDS = 100
"""Most fractional points of the root node that get a plane."""


def gurobi_lazy_cuts(
    problem: BlockProblem,
    program: str,
    *,
    limits: Limits,
    incumbent: BlockSolution | None = None,
) -> BlockSolution:
    """Solve a program with one Gurobi tree and lazy planes; needs gurobipy and ``0 < n_prune < n``.

    It gets the swap search's set, and the certified bound and the diagonal split of the root
    relaxation, as our own branch and bound does.
    """
    import gurobipy

    began = time.perf_counter()
    start = swap_search(problem, program, limits=limits, incumbent=incumbent)
    root = lower_bound(problem, program, limits=limits, incumbent=start)
    known = known_set(problem, program, METHOD, limits, root)
    assert known.keep is not None
    assert known.objective is not None
    assert root.bound is not None
    block = scale_block(problem)
    planes = _Planes(
        sources=cut_sources(problem, block, program, root.certificate),
        unit=known.objective / block.objective_scale,
        bound=root.bound / block.objective_scale,
    )
    with gurobipy.Env(params={"OutputFlag": 0}) as env, gurobipy.Model(env=env) as model:
        chosen = list(model.addVars(problem.n, vtype="B").values())
        value = model.addVar(lb=planes.bound / planes.unit, obj=1.0)
        # The set has the right size.
        model.addConstr(gurobipy.quicksum(chosen) == planes.sources[0].count)
        first = known.keep if planes.sources[0].one_means_kept else ~known.keep
        for variable, one in zip(chosen, first, strict=True):
            variable.Start = float(one)
        for cut in planes.at(first.astype(np.float64)):
            model.addConstr(planes.row(gurobipy, cut, chosen, value))
        _configure(model, limits, began)
        model.optimize(_separator(gurobipy, planes, chosen, value))
        return _concluded(model, problem, known, limits, began, planes, chosen, block)


@dataclass
class _Planes:
    """Where planes come from, and their size so far (units of `ScaledBlock`)."""

    sources: list[CutSource]
    unit: float
    bound: float
    largest: float = 0.0
    root_rounds: int = 0

    def at(self, point: FloatArray) -> list[Cut]:
        """One plane a source, tight at `point`."""
        cuts = [source.cut(point, self.bound) for source in self.sources]
        for cut in cuts:
            size = abs(cut.constant) + self.sources[0].count * float(np.abs(cut.slopes).max())
            self.largest = max(self.largest, size)
        return cuts

    def row(self, gurobipy: Any, cut: Cut, chosen: list[Any], value: Any) -> Any:
        """Every set pays at least what the plane says: ``t - slopes.x >= constant``."""
        slopes = gurobipy.LinExpr((cut.slopes / self.unit).tolist(), chosen)
        return value - slopes >= cut.constant / self.unit


def _configure(model: Any, limits: Limits, began: float) -> None:
    settings = {
        "LazyConstraints": 1,
        "MIPGap": limits.rel_gap,
        "MIPGapAbs": 0.0,
        "Threads": limits.threads,
        "Seed": limits.seed,
        "OptimalityTol": DUAL_TOLERANCE,
        "FeasibilityTol": DUAL_TOLERANCE,
        "IntFeasTol": DUAL_TOLERANCE,
    }
    if limits.time_limit is not None:
        settings["TimeLimit"] = max(limits.time_limit - (time.perf_counter() - began), 1e-3)
    for name, setting in settings.items():
        model.setParam(name, setting)


def _separator(gurobipy: Any, planes: _Planes, chosen: list[Any], value: Any) -> Any:
    codes = gurobipy.GRB.Callback

    def separate(model: Any, where: int) -> None:
        if where == codes.MIPSOL:
            point = np.round(model.cbGetSolution(chosen))
        elif (
            where == codes.MIPNODE
            and planes.root_rounds < ROOT_ROUNDS
            and model.cbGet(codes.MIPNODE_NODCNT) == 0
            and model.cbGet(codes.MIPNODE_STATUS) == gurobipy.GRB.OPTIMAL
        ):
            planes.root_rounds += 1
            point = np.clip(model.cbGetNodeRel(chosen), 0.0, 1.0)
        else:
            return
        for cut in planes.at(point):
            model.cbLazy(planes.row(gurobipy, cut, chosen, value))

    return separate


def _concluded(
    model: Any,
    problem: BlockProblem,
    known: BlockSolution,
    limits: Limits,
    began: float,
    planes: _Planes,
    chosen: list[Any],
    block: ScaledBlock,
) -> BlockSolution:
    codes = import_module("gurobipy").GRB.Status
    candidates: list[BoolArray] = []
    if model.SolCount:
        ones = np.array([variable.X for variable in chosen]) > 0.5
        candidates.append(ones if planes.sources[0].one_means_kept else ~ones)
    error = planes.unit * DUAL_TOLERANCE * (problem.n + 1.0) + CONSTANT_ERROR * planes.largest
    bound = max(float(model.ObjBound) * planes.unit - error, planes.bound)
    return conclude(
        problem,
        known,
        limits,
        began,
        Outcome(
            candidates=candidates,
            bound=bound * block.objective_scale,
            slack=error * block.objective_scale,
            finished=model.Status == codes.OPTIMAL,
            limit=Limit.TIME if model.Status == codes.TIME_LIMIT else None,
            failure="" if model.Status in (codes.OPTIMAL, codes.TIME_LIMIT) else f"status {model.Status}",
            stats={"nodes": int(model.NodeCount), "iterations": planes.root_rounds},
        ),
    )
