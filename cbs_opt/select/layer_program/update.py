"""The best new weights of every row for its set: conjugate gradients on all rows, or Cholesky a row."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution

FINAL_STEPS = 40
LEAST_STEP = 100.0
"""Times rounding of the loss of a row that a step has to lower it by: 1e-5 of it in single precision."""
BATCH_BYTES = 128 * 2**20
"""Memory of one matrix a row, for all rows that are taken together."""


def descend(program: LayerProgram, keep: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return weights after conjugate gradients on the kept ones, and the residual ``(w - u) H``, (r, n) each.

    Every row is a system of its own, preconditioned by the diagonal; all share each product with H. `weights`
    (r, n) are where to begin; what is not kept counts as 0. A row stops where a step along its gradient would
    lower the loss by little more than rounding. O(steps r n^2).
    Source: ALPS (Meng, Behdin, Wang, Mazumder, NeurIPS 2024), where it is the step after the set is found.
    """
    matrix, mask = program.matrix, keep.to(weights.dtype)
    diagonal = matrix.diagonal()
    weights = weights * mask
    error = program.weights - weights
    residual = error @ matrix
    least = LEAST_STEP * torch.finfo(weights.dtype).eps * (error * residual).sum(1, keepdim=True)
    inside = residual * mask
    scaled = inside / diagonal
    direction = scaled.clone()
    decrease = (inside * scaled).sum(1, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    for _ in range(steps):
        going = decrease > least
        if not bool(going.any()):
            break
        image = direction @ matrix
        curvature = (direction * image).sum(1, keepdim=True)
        length = going * decrease / curvature.clamp_min(tiny)
        weights.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1.0)
        torch.mul(residual, mask, out=inside)
        torch.div(inside, diagonal, out=scaled)
        before, decrease = decrease, (inside * scaled).sum(1, keepdim=True)
        direction.mul_(decrease / before.clamp_min(tiny)).add_(scaled)
    return weights, residual


def updated(program: LayerProgram, keep: Tensor, weights: Tensor, steps: int = FINAL_STEPS) -> LayerSolution:
    """Return a set (r, n) with its best new weights by `descend`, begun at `weights`."""
    weights, _ = descend(program, keep, weights, steps)
    weights = torch.where(keep.all(1, keepdim=True), program.weights, weights)
    return LayerSolution(keep=keep, weights=weights, losses=program.losses(weights))


def exact_update(program: LayerProgram, keep: Tensor) -> Tensor:
    """Return the best new weights (r, n) float64 of a set (r, n) by one Cholesky factorisation a row.

    O(r s^3) for s kept weights.
    """
    matrix = program.hessian.values
    target = program.weights.double() @ matrix
    weights = torch.zeros_like(target)
    for rows, kept in equal_rows(keep, 8):
        factor = torch.linalg.cholesky(matrix[kept.unsqueeze(2), kept.unsqueeze(1)])
        right = target[rows].gather(1, kept).unsqueeze(2)
        solved = torch.cholesky_solve(right, factor).squeeze(2)
        weights[rows] = weights[rows].scatter(1, kept, solved)
    return torch.where(keep.all(1, keepdim=True), program.weights.double(), weights)


def equal_rows(keep: Tensor, number_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows that keep as many weights, as (b,) int64, with the kept inputs of each, (b, s) int64.

    Together they have room for one (n, n) matrix of numbers each within `BATCH_BYTES`, or are one row.
    """
    together = max(1, BATCH_BYTES // (number_bytes * keep.shape[1] ** 2))
    counts = keep.sum(1)
    for count in sorted(set(counts.tolist())):
        for rows in (counts == count).nonzero().squeeze(1).split(together):
            yield rows, keep[rows].nonzero()[:, 1].view(len(rows), count)
