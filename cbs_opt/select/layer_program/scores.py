"""Sets by a score of every weight alone, with no update: magnitude and Wanda."""

from __future__ import annotations

import torch
from torch import Tensor

from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution


def by_magnitude(program: LayerProgram) -> LayerSolution:
    """Return each row's largest weights, as they are."""
    return _kept(program, program.weights.abs())


def by_wanda(program: LayerProgram) -> LayerSolution:
    """Return each row's largest ``|w_j| ||x_j||``, as they are.

    ``||x_j||`` is the norm of input j over the tokens, the root of the diagonal of the Gram matrix, damping
    apart. Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language
    models" (ICLR 2024).
    """
    hessian = program.hessian
    norms = (hessian.values.diagonal() - hessian.damping).clamp_min(0.0).sqrt()
    return _kept(program, program.weights.abs() * norms.to(program.weights.dtype))


def _kept(program: LayerProgram, scores: Tensor) -> LayerSolution:
    keep = program.support.best(scores)
    weights = torch.where(keep, program.weights, 0.0)
    return LayerSolution(keep=keep, weights=weights, losses=program.losses(weights))
