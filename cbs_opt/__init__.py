"""cbs-opt: pruning neural networks by combinatorial optimisation, with proof."""

from importlib.metadata import version

from cbs_opt.batchnorm import recalibrate_batchnorm
from cbs_opt.curvature import fisher_blocks
from cbs_opt.masks import apply_masks, load_masks, save_masks
from cbs_opt.methods import available_methods
from cbs_opt.pruning import prune
from cbs_opt.report import PruneReport
from formulations import BlockProblem, BlockSolution, CbsError, Termination, verify

__version__ = version("cbs-opt")

__all__ = [
    "BlockProblem",
    "BlockSolution",
    "CbsError",
    "PruneReport",
    "Termination",
    "__version__",
    "apply_masks",
    "available_methods",
    "fisher_blocks",
    "load_masks",
    "prune",
    "recalibrate_batchnorm",
    "save_masks",
    "verify",
]
