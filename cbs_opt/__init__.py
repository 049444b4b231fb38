"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof.

A name is imported when it is first used: ``import cbs_opt`` alone loads neither torch nor a solver.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbs_opt.curvature.fisher import GradientRows, fisher_blocks, gradient_rows
    from cbs_opt.curvature.rows import StoredRows, streamed_rows
    from cbs_opt.execution.blocks import solve_blocks
    from cbs_opt.network.batchnorm import recalibrate_batchnorm
    from cbs_opt.network.masks import apply_masks, load_masks, save_masks
    from cbs_opt.network.partition import Partition
    from cbs_opt.plan.prune_plan import PrunePlan
    from cbs_opt.planning import plan
    from cbs_opt.pruning import prune
    from cbs_opt.report.record import PruneReport
    from cbs_opt.select.methods import available_methods
    from cbs_opt.solving import compare, solve
    from formulations.errors import CbsError
    from formulations.loss import verify
    from formulations.problem import BlockProblem
    from formulations.relaxations.bounds import lower_bound
    from formulations.solution import BlockSolution, Termination
    from formulations.solvers import available_solvers

    __version__: str

_MODULES = {
    "cbs_opt.curvature.fisher": ("GradientRows", "fisher_blocks", "gradient_rows"),
    "cbs_opt.curvature.rows": ("StoredRows", "streamed_rows"),
    "cbs_opt.execution.blocks": ("solve_blocks",),
    "cbs_opt.network.batchnorm": ("recalibrate_batchnorm",),
    "cbs_opt.network.masks": ("apply_masks", "load_masks", "save_masks"),
    "cbs_opt.network.partition": ("Partition",),
    "cbs_opt.plan.prune_plan": ("PrunePlan",),
    "cbs_opt.planning": ("plan",),
    "cbs_opt.pruning": ("prune",),
    "cbs_opt.report.record": ("PruneReport",),
    "cbs_opt.select.methods": ("available_methods",),
    "cbs_opt.solving": ("compare", "solve"),
    "formulations.errors": ("CbsError",),
    "formulations.loss": ("verify",),
    "formulations.problem": ("BlockProblem",),
    "formulations.relaxations.bounds": ("lower_bound",),
    "formulations.solution": ("BlockSolution", "Termination"),
    "formulations.solvers": ("available_solvers",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "GradientRows",
    "Partition",
    "PrunePlan",
    "PruneReport",
    "StoredRows",
    "Termination",
    "__version__",
    "apply_masks",
    "available_methods",
    "available_solvers",
    "compare",
    "fisher_blocks",
    "gradient_rows",
    "load_masks",
    "lower_bound",
    "plan",
    "prune",
    "recalibrate_batchnorm",
    "save_masks",
    "solve",
    "solve_blocks",
    "streamed_rows",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("cbs-opt")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    if "cbs_opt.plan" in sys.modules and name != "plan":
        # The folder `cbs_opt.plan` takes the place of the function; this goes when the folder goes.
        globals()["plan"] = import_module("cbs_opt.planning").plan
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
