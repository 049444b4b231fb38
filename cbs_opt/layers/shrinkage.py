"""How much a Gram matrix of few tokens is shrunk: by what layers lose on tokens that are set aside."""

from __future__ import annotations

import torch
from torch import Tensor

from cbs_opt.layers.gram import GramSum, shrunk
from cbs_opt.select.layer_program.exchanges import spread
from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram
from cbs_opt.select.layer_program.sparsegpt import by_sparsegpt
from cbs_opt.select.layer_program.support import LayerSupport, RowCounts, RowPattern

TIMES = (0.1, 0.25, 0.5, 1.0)
"""Of the share of Ledoit and Wolf. It has the least error of the matrix; for the layer's loss it is too much:
on inputs that nobody saw the best was .1 to .5 of it, and none at all is worse. The matrix of the tokens that
are not set aside wants more than that of all, so that more is not in question."""
ROWS = 64


def chosen_shrinkage(sums: GramSum, weights: Tensor, support: LayerSupport, damping: float) -> float:
    """Return the share of shrinkage at which rows lose least on the tokens that are set aside.

    Up to `ROWS` rows of `weights` (r, n) are pruned by SparseGPT for the Gram matrix of the other tokens,
    once for each share in question: O(n^3 + rows n^2) each.
    """
    fitted, held = sums.parted()
    rows = weights[spread(len(weights), ROWS, weights.device)]
    if not isinstance(support, RowPattern):
        support = RowCounts(round(support.total(*weights.shape) / max(1, len(weights))))
    unit = sums.ledoit_wolf()
    shares = sorted({min(1.0, times * unit) for times in TIMES})
    losses = []
    for share in shares:
        hessian = LayerHessian(shrunk(fitted, share), damping)
        program = LayerProgram(weights=rows, hessian=hessian, support=support)
        error = rows.double() - by_sparsegpt(program).weights.double()
        losses.append(float(((error @ held) * error).sum()))
    return shares[int(torch.tensor(losses).argmin())]
