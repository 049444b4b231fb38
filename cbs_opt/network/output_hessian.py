"""The curvature of a loss in the outputs of a network, in closed form.

A loss of the form ``l(z) = c (A(z) - t . z) + const`` for every sample, or every position of one, has the
gradient ``c (mu(z) - t)`` with ``mu = grad A``, and the Hessian ``c dmu/dz``, whatever the targets t are:

    cross-entropy              A = logsumexp(z)     mu = softmax(z)    Hessian c (diag(p) - p p^T)
    squared error              A = z^2 / 2          mu = z             Hessian c
    binary, of logits          A = softplus(z)      mu = sigmoid(z)    Hessian c p (1 - p)

It is recognised by first derivatives alone, ``g(z) - g(0) = c (mu(z) - mu(0))`` for all z, so that a loss
need not be differentiated twice. Class weights, ignored labels and the reduction all end in the scales c.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cbs_opt.network.data import Labels, LossFunction, map_tensors
from formulations.errors import CbsError

Form = Literal["softmax", "squared", "logistic"]
Slope = Callable[[Tensor, Labels], Tensor]
"""The gradient of the loss of a batch in the outputs, at outputs and labels."""

EXACT = 2e-5
"""Relative error up to which a form is taken, in float64; a loss may round inside."""
SPREAD = 4.0
"""Standard deviation of the outputs that a form is tried at: residuals and logits of every size."""
TRIES = 2
"""Random outputs that a form is tried at, besides those of the network."""
SEED = 0


@dataclass(frozen=True, kw_only=True)
class OutputHessian:
    """A form of Hessian in the outputs (B, ...); `axis` is that of the classes, of "softmax"."""

    form: Form
    axis: int = 1

    def mean(self, outputs: Tensor) -> Tensor:
        """Return ``mu(z)`` at outputs z, of the same shape."""
        if self.form == "softmax":
            return torch.softmax(outputs, dim=self.axis)
        return torch.sigmoid(outputs) if self.form == "logistic" else outputs

    def factor(self, outputs: Tensor, draws: Tensor) -> Tensor:
        """Return ``L e`` at outputs z, for ``L L^T = dmu/dz`` and `draws` e, all of the same shape.

        For softmax ``L = (I - p 1^T) diag(sqrt(p))``.
        """
        if self.form == "squared":
            return draws
        probability = self.mean(outputs)
        if self.form == "logistic":
            return (probability * (1.0 - probability)).sqrt() * draws
        roots = probability.sqrt() * draws
        return roots - probability * roots.sum(dim=self.axis, keepdim=True)

    def scales(self, slope: Slope, outputs: Tensor, labels: Labels) -> Tensor:
        """Return c of a batch for every output, or (size 1 along `axis`) for every softmax.

        It takes two first derivatives, at outputs where ``mu`` differs by a good half or more.
        """
        origin, away = torch.zeros_like(outputs), torch.full_like(outputs, 2.0)
        if self.form == "softmax":
            away = torch.zeros_like(outputs)
            away.select(self.axis, 0).fill_(math.log(3.0 * outputs.shape[self.axis]))
        change = slope(away, labels) - slope(origin, labels)
        expected = self.mean(away) - self.mean(origin)
        if self.form != "softmax":
            return change / expected
        return change.narrow(self.axis, 0, 1) / expected.narrow(self.axis, 0, 1)


def form_of(
    loss: Callable[[Tensor, Labels], Tensor], outputs: Tensor, labels: Labels
) -> OutputHessian | None:
    """Return the form that fits the loss of a few outputs (B, ...); None if none does.

    `loss` is called on the CPU, where outputs that it does not take raise and do nothing worse.
    """
    outputs, labels = map_tensors(lambda x: x.detach().cpu(), (outputs, labels))
    slope = functools.partial(slope_of, loss)
    for dtype in dict.fromkeys((torch.float64, outputs.dtype)):
        z, y = map_tensors(lambda x, to=dtype: x.to(to) if x.is_floating_point() else x, (outputs, labels))
        try:
            return next((form for form in _forms(outputs) if _fits(form, slope, z, y)), None)
        except (CbsError, RuntimeError, TypeError):  # it takes another dtype, or no such outputs
            continue
    return None


def slope_of(loss: LossFunction, outputs: Tensor, labels: Labels) -> Tensor:
    """Return the gradient of ``loss(outputs, labels)`` in the outputs."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf.clone(), labels), leaf)  # a loss may write to its argument
    return slope


def on_cpu(loss: Any) -> Any:
    """Return a loss function with its own tensors, such as class weights, on the CPU, if they show."""
    if isinstance(loss, nn.Module):
        return deepcopy(loss).cpu()
    if isinstance(loss, functools.partial):
        arguments, keywords = map_tensors(lambda x: x.cpu(), (loss.args, loss.keywords))
        return functools.partial(on_cpu(loss.func), *arguments, **keywords)
    return loss


def _forms(outputs: Tensor) -> list[OutputHessian]:
    axes = dict.fromkeys(axis for axis in (1, outputs.ndim - 1) if 0 < axis < outputs.ndim)
    classes = [OutputHessian(form="softmax", axis=axis) for axis in axes if outputs.shape[axis] > 1]
    return [*classes, OutputHessian(form="squared"), OutputHessian(form="logistic")]


def _fits(form: OutputHessian, slope: Slope, outputs: Tensor, labels: Labels) -> bool:
    scales = form.scales(slope, outputs, labels)
    largest = float(scales.max())
    if not 0.0 < largest < math.inf or float(scales.min()) < -EXACT * largest:
        return False
    generator = torch.Generator().manual_seed(SEED)
    noise = [torch.randn(outputs.shape, generator=generator, dtype=torch.float64) for _ in range(TRIES)]
    most = max(EXACT, math.sqrt(torch.finfo(outputs.dtype).eps))
    origin = torch.zeros_like(outputs)
    start = slope(origin, labels)
    for z in (outputs, *(SPREAD * draw.to(outputs) for draw in noise)):
        expected = scales * (form.mean(z) - form.mean(origin))
        error = (slope(z, labels) - start - expected).norm()
        if not bool(error <= most * expected.norm()):
            return False
    return True
