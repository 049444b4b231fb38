"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof."""

from importlib.metadata import version

from cbs_opt.curvature.fisher import GradientRows, fisher_blocks, gradient_rows
from cbs_opt.curvature.rows import StoredRows, streamed_rows
from cbs_opt.execution.blocks import solve_blocks
from cbs_opt.network.batchnorm import recalibrate_batchnorm
from cbs_opt.network.masks import apply_masks, load_masks, save_masks
from cbs_opt.network.partition import Partition
from cbs_opt.plan.prune_plan import PrunePlan
from cbs_opt.planning import plan
from cbs_opt.pruning import prune
from cbs_opt.report.files import load_report, save_report
from cbs_opt.report.record import PruneReport
from cbs_opt.select.methods import available_methods
from cbs_opt.solving import compare, solve
from formulations import BlockProblem, BlockSolution, CbsError, Termination, verify
from formulations.relaxations import lower_bound
from formulations.solvers import available_solvers

__version__ = version("cbs-opt")

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
    "load_report",
    "lower_bound",
    "plan",
    "prune",
    "recalibrate_batchnorm",
    "save_masks",
    "save_report",
    "solve",
    "solve_blocks",
    "streamed_rows",
    "verify",
]
