"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof."""

from importlib.metadata import version

from cbs_opt.curvature.fisher import fisher_blocks, gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.execution.blocks import solve_blocks
from cbs_opt.network.batchnorm import recalibrate_batchnorm
from cbs_opt.network.masks import apply_masks, load_masks, save_masks
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import plan, prune
from cbs_opt.report.files import load_report, save_report
from cbs_opt.report.record import PruneReport
from cbs_opt.run_size import RunSize
from cbs_opt.select.methods import available_methods
from cbs_opt.solving import compare, solve
from cbs_opt.system.resources import Resources
from formulations import BlockProblem, BlockSolution, CbsError, Termination, verify
from formulations.relaxations import lower_bound
from formulations.solvers import available_solvers

__version__ = version("cbs-opt")

__all__ = [
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "EmpiricalFisher",
    "ExactFisher",
    "MonteCarloFisher",
    "Partition",
    "PruneReport",
    "Resources",
    "Rows",
    "RunSize",
    "SketchedFisher",
    "Termination",
    "__version__",
    "apply_masks",
    "available_methods",
    "available_solvers",
    "compare",
    "fisher_blocks",
    "gradient_rows",
    "load_masks",
    "load_report",
    "lower_bound",
    "plan",
    "prune",
    "recalibrate_batchnorm",
    "save_masks",
    "save_report",
    "solve",
    "solve_blocks",
    "verify",
]
