"""SparseGPT: one sweep over the inputs in their order, each pruned weight made up for by those to come.

Source: Frantar, Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot" (ICML
2023). Row i of the upper Cholesky factor of ``H^-1`` has the OBS step of input i once all earlier ones are
settled, for every row of the weights, since all share H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution
from cbs_opt.select.layer_program.support import RowPattern

COLUMNS = 128
"""Inputs whose set is chosen at once, as in the paper."""


def by_sparsegpt(program: LayerProgram) -> LayerSolution:
    """Return the sets and weights of SparseGPT's sweep.

    Under a count, of rows or of the layer, the smallest ``w^2 / [H^-1]_ii`` of every `COLUMNS` inputs go over
    all rows together, as in the paper: the layer has as many zeros as it should, its rows differ. Under n:m
    each row chooses in each group as the sweep comes to it. O(r n^2).
    """
    support, n = program.support, program.hessian.n
    factor = program.hessian.elimination.to(program.weights.dtype)
    weights = program.weights.clone()
    keep = torch.ones_like(weights, dtype=torch.bool)
    group = support.pattern.m if isinstance(support, RowPattern) else 0
    width = group * max(1, COLUMNS // group) if group else COLUMNS
    share = support.total(program.rows, n) / n
    for start in range(0, n, width):
        stop = min(start + width, n)
        panel, chosen = weights[:, start:stop], keep[:, start:stop]
        errors = torch.zeros_like(panel)
        if not group:
            count = round(share * stop) - round(share * start)
            chosen.copy_(_largest(_saliency(panel, factor, start), count))
        for column in range(start, stop):
            at = column - start
            if group and column % group == 0:
                cell = slice(at, at + group)
                chosen[:, cell] = support.best(_saliency(panel[:, cell], factor, column))
            wrong = torch.where(chosen[:, at], 0.0, panel[:, at]) / factor[column, column]
            panel[:, at:] -= wrong.unsqueeze(1) * factor[column, column:stop]
            errors[:, at] = wrong
        weights[:, stop:] -= errors @ factor[start:stop, stop:]
    weights = torch.where(keep, weights, 0.0)
    return LayerSolution(keep=keep, weights=weights, losses=program.losses(weights))


def _saliency(columns: Tensor, factor: Tensor, first: int) -> Tensor:
    """Return twice what pruning each weight alone costs once the inputs before it are settled."""
    return (columns / factor.diagonal()[first : first + columns.shape[1]]).square()


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return where the largest `count` of all scores are, bool in their shape."""
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.view(-1)[scores.flatten().topk(count).indices] = True
    return keep
