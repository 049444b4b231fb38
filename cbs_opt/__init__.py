"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof."""

from importlib.metadata import version

from cbs_opt.batchnorm import recalibrate_batchnorm
from cbs_opt.block_executor import solve_blocks
from cbs_opt.blocks import Partition
from cbs_opt.curvature import GradientRows, fisher_blocks, gradient_rows
from cbs_opt.masks import apply_masks, load_masks, save_masks
from cbs_opt.methods import available_methods
from cbs_opt.planning import plan
from cbs_opt.prune_plan import PrunePlan
from cbs_opt.pruning import prune
from cbs_opt.report import PruneReport
from cbs_opt.solving import compare, solve
from cbs_opt.stored_rows import StoredRows, streamed_rows
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
