"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof.

A name is imported when it is first used: ``import cbs_opt`` alone loads neither torch nor a solver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbs_opt.curvature.fisher import fisher_blocks, gradient_rows
    from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher
    from cbs_opt.curvature.rows import Rows
    from cbs_opt.curvature.run_size import RunSize
    from cbs_opt.execution.blocks import solve_blocks
    from cbs_opt.layers.certificates import RowSample, check_layers
    from cbs_opt.layers.divergence import Divergence
    from cbs_opt.layers.recipe import LayerRecipe
    from cbs_opt.layers.record import LayersReport
    from cbs_opt.layers.sequential import prune_layers
    from cbs_opt.network.batchnorm import recalibrate_batchnorm
    from cbs_opt.network.masks import apply_masks, load_masks, masked, save_masks
    from cbs_opt.network.partition import Partition
    from cbs_opt.pruning import plan, prune, pruned
    from cbs_opt.recipe.files import load_recipe, load_request, save_recipe
    from cbs_opt.recipe.named import Named, balanced, best, fast
    from cbs_opt.recipe.records import Certify, FineTuning, Recipe, Request, Stages, Update, Weights, absolute
    from cbs_opt.recipe.select import (
        OBD,
        OBS,
        Exact,
        GradientNorm,
        GreedyOBS,
        HardThreshold,
        LossPreservation,
        Magnitude,
        RandomizedMagnitude,
        SwapSearch,
    )
    from cbs_opt.report.files import load_report, save_report
    from cbs_opt.report.record import PruneReport
    from cbs_opt.select.layer_program.alternating import Alternating
    from cbs_opt.select.layer_program.exchanges import Exchanges
    from cbs_opt.select.methods import available_methods
    from cbs_opt.solving import compare, solve
    from cbs_opt.structure.attention import HeadAttention
    from cbs_opt.structure.groups import Structure, groups
    from cbs_opt.structure.latency import LatencyTable, measure_latency
    from cbs_opt.structure.pruning import GroupRecipe, GroupReport, prune_groups
    from cbs_opt.structure.removal import Shrinkage, resized, shrink
    from cbs_opt.structure.widths import Cost, Widths, choose_widths
    from cbs_opt.system.progress import Progress
    from cbs_opt.system.resources import Resources
    from formulations.errors import CbsError
    from formulations.problem import BlockProblem
    from formulations.relaxations.bounds import lower_bound
    from formulations.solution import BlockSolution, Termination
    from formulations.solvers import available_solvers
    from formulations.support import Count, Groups, NofM
    from formulations.verification import verify

    __version__: str

_MODULES = {
    "cbs_opt.curvature.fisher": ("fisher_blocks", "gradient_rows"),
    "cbs_opt.curvature.kinds": ("EmpiricalFisher", "ExactFisher", "MonteCarloFisher", "SketchedFisher"),
    "cbs_opt.curvature.rows": ("Rows",),
    "cbs_opt.curvature.run_size": ("RunSize",),
    "cbs_opt.execution.blocks": ("solve_blocks",),
    "cbs_opt.layers.certificates": ("RowSample", "check_layers"),
    "cbs_opt.layers.divergence": ("Divergence",),
    "cbs_opt.layers.recipe": ("LayerRecipe",),
    "cbs_opt.layers.record": ("LayersReport",),
    "cbs_opt.layers.sequential": ("prune_layers",),
    "cbs_opt.network.batchnorm": ("recalibrate_batchnorm",),
    "cbs_opt.network.masks": ("apply_masks", "load_masks", "masked", "save_masks"),
    "cbs_opt.network.partition": ("Partition",),
    "cbs_opt.pruning": ("plan", "prune", "pruned"),
    "cbs_opt.recipe.files": ("load_recipe", "load_request", "save_recipe"),
    "cbs_opt.recipe.named": ("Named", "balanced", "best", "fast"),
    "cbs_opt.recipe.records": (
        "Certify",
        "FineTuning",
        "Recipe",
        "Request",
        "Stages",
        "Update",
        "Weights",
        "absolute",
    ),
    "cbs_opt.recipe.select": (
        "Exact",
        "GradientNorm",
        "GreedyOBS",
        "HardThreshold",
        "LossPreservation",
        "Magnitude",
        "OBD",
        "OBS",
        "RandomizedMagnitude",
        "SwapSearch",
    ),
    "cbs_opt.report.files": ("load_report", "save_report"),
    "cbs_opt.report.record": ("PruneReport",),
    "cbs_opt.select.layer_program.alternating": ("Alternating",),
    "cbs_opt.select.layer_program.exchanges": ("Exchanges",),
    "cbs_opt.select.methods": ("available_methods",),
    "cbs_opt.solving": ("compare", "solve"),
    "cbs_opt.structure.attention": ("HeadAttention",),
    "cbs_opt.structure.groups": ("Structure", "groups"),
    "cbs_opt.structure.latency": ("LatencyTable", "measure_latency"),
    "cbs_opt.structure.pruning": ("GroupRecipe", "GroupReport", "prune_groups"),
    "cbs_opt.structure.removal": ("Shrinkage", "resized", "shrink"),
    "cbs_opt.structure.widths": ("Cost", "Widths", "choose_widths"),
    "cbs_opt.system.progress": ("Progress",),
    "cbs_opt.system.resources": ("Resources",),
    "formulations.errors": ("CbsError",),
    "formulations.problem": ("BlockProblem",),
    "formulations.relaxations.bounds": ("lower_bound",),
    "formulations.solution": ("BlockSolution", "Termination"),
    "formulations.solvers": ("available_solvers",),
    "formulations.support": ("Count", "Groups", "NofM"),
    "formulations.verification": ("verify",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "OBD",
    "OBS",
    "Alternating",
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "Certify",
    "Cost",
    "Count",
    "Divergence",
    "EmpiricalFisher",
    "Exact",
    "ExactFisher",
    "Exchanges",
    "FineTuning",
    "GradientNorm",
    "GreedyOBS",
    "GroupRecipe",
    "GroupReport",
    "Groups",
    "HardThreshold",
    "HeadAttention",
    "LatencyTable",
    "LayerRecipe",
    "LayersReport",
    "LossPreservation",
    "Magnitude",
    "MonteCarloFisher",
    "Named",
    "NofM",
    "Partition",
    "Progress",
    "PruneReport",
    "RandomizedMagnitude",
    "Recipe",
    "Request",
    "Resources",
    "RowSample",
    "Rows",
    "RunSize",
    "Shrinkage",
    "SketchedFisher",
    "Stages",
    "Structure",
    "SwapSearch",
    "Termination",
    "Update",
    "Weights",
    "Widths",
    "__version__",
    "absolute",
    "apply_masks",
    "available_methods",
    "available_solvers",
    "balanced",
    "best",
    "check_layers",
    "choose_widths",
    "compare",
    "fast",
    "fisher_blocks",
    "gradient_rows",
    "groups",
    "load_masks",
    "load_recipe",
    "load_report",
    "load_request",
    "lower_bound",
    "masked",
    "measure_latency",
    "plan",
    "prune",
    "prune_groups",
    "prune_layers",
    "pruned",
    "recalibrate_batchnorm",
    "resized",
    "save_masks",
    "save_recipe",
    "save_report",
    "shrink",
    "solve",
    "solve_blocks",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("cbs-opt")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
