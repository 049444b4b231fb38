"""Gradients of single samples, of groups of samples and of class probabilities, by `torch.func`."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap

from cbs_opt.errors import PerSampleGradientError, TrainingModeError
from cbs_opt.network.data import (
    Batch,
    Inputs,
    LossFunction,
    call_arguments,
    check_labels,
    check_loss,
    class_count,
    device_of,
    map_tensors,
)
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import as_parameters
from formulations.errors import ArgumentError, UnsupportedProblemError

Gradients = dict[str, Tensor]
"""Gradients by parameter name; leading axes count samples or classes."""


class NetworkFunction:
    """A network as a function of the partition's parameters; every other tensor is held fixed.

    Neither parameters nor their `.grad` are written. `parameters` are those at which gradients are taken:
    detached views of the network's own, or of flat `weights` (n,).
    """

    def __init__(
        self, model: nn.Module, partition: Partition, loss_fn: LossFunction, weights: Tensor | None = None
    ) -> None:
        self._model = model
        if not callable(loss_fn):
            raise ArgumentError("loss_fn", f"{loss_fn!r}", "pass a function of output and labels")
        self._loss_fn = loss_fn
        # One that requires grad would tie a graph to every result.
        detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.parameters: Gradients = {name: detached.pop(name) for name in partition.tensors(model)}
        self._fixed = detached
        if weights is not None:
            self.parameters = as_parameters(model, partition, weights)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return device_of(self._model)

    @property
    def dtype(self) -> torch.dtype:
        """That of gradients: that of the weights, float32 at least."""
        dtypes = (tensor.dtype for tensor in self.parameters.values())
        return reduce(torch.promote_types, dtypes, torch.float32)

    def output(self, parameters: Gradients, inputs: Inputs) -> Any:
        args, kwargs = call_arguments(inputs)
        return functional_call(self._model, {**self._fixed, **parameters}, args, kwargs)

    def loss_of(self, output: Any, labels: Tensor) -> Tensor:
        """Return the mean loss of a batch whose output is known."""
        return check_loss(self._loss_fn(output, labels))

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers of the network, detached."""
        return [*self.parameters.values(), *self._fixed.values(), *self._model.buffers()]

    def leaves(self) -> Gradients:
        """Return the parameters as leaves of a new graph."""
        return {name: value.detach().requires_grad_() for name, value in self.parameters.items()}

    def with_loss(self, loss_fn: LossFunction) -> NetworkFunction:
        """Return the same network under another loss."""
        other = copy(self)
        other._loss_fn = loss_fn
        return other

    def mean_gradient(self, batch: Batch, chunk: int) -> Gradients:
        """Return the gradient of the mean loss of `batch`, `chunk` samples in a backward pass."""

        def loss(leaves: Gradients, part: Batch, start: int) -> tuple[Tensor, Tensor | None, float]:
            loss = self.loss_of(self.output(leaves, part.inputs), part.labels)
            return loss, None, part.size / batch.size

        return self._added_up(batch, chunk, loss)

    def sketched_gradient(self, batch: Batch, signs: Tensor, chunk: int) -> Gradients:
        """Return ``sum_b J_b^T L_b e_b / sqrt(B)`` for `signs` e (B, C), `chunk` samples at a time.

        ``L = (I - p 1^T) diag(sqrt(p))`` factors the Hessian ``diag(p) - p p^T`` of cross-entropy in
        the logits, so that with independent signs the outer product of the sum with itself is the
        Gauss-Newton matrix averaged over the batch, in expectation. One backward pass a chunk.
        """

        def sketch(leaves: Gradients, part: Batch, start: int) -> tuple[Tensor, Tensor | None, float]:
            logits: Tensor = self.output(leaves, part.inputs)
            probability = torch.softmax(logits.detach(), dim=1)
            draws = probability.sqrt() * signs[start : start + chunk].to(probability)
            seeds = draws - probability * draws.sum(dim=1, keepdim=True)
            return logits, seeds, 1.0 / math.sqrt(batch.size)

        return self._added_up(batch, chunk, sketch)

    def _added_up(
        self,
        batch: Batch,
        chunk: int,
        forward: Callable[[Gradients, Batch, int], tuple[Tensor, Tensor | None, float]],
    ) -> Gradients:
        """Add up the gradients of what `forward` returns for each chunk: output, its seeds, and a factor."""
        leaves = self.leaves()
        total: Gradients = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        for start in range(0, batch.size, chunk):
            with torch.enable_grad():
                output, seeds, factor = forward(leaves, batch.take(slice(start, start + chunk)), start)
                gradients = torch.autograd.grad(output, list(leaves.values()), seeds, allow_unused=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    total[name].add_(gradient, alpha=factor)
        return total

    def sample_gradients(self, batch: Batch) -> Gradients:
        """Gradient of the loss of every sample, (B, *shape) by name."""

        def loss(parameters: Gradients, x: Inputs, y: Tensor) -> Tensor:
            return self.loss_of(self.output(parameters, _alone(x)), y.unsqueeze(0))

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
        return _explained(lambda: per_sample(self.parameters, batch.inputs, batch.labels))

    def class_gradients(self, batch: Batch, classes: slice) -> Gradients:
        """``sqrt(p_c) grad log p_c`` of every sample and class, (B, C, *shape) by name.

        `p` is the softmax of the output. The derivative of ``log p_c`` in the logits is
        ``e_c - p``, so that one forward pass and one backward pass a class suffice.
        """

        def rows(parameters: Gradients, x: Inputs) -> Gradients:
            logits, pull, *_ = vjp(lambda theta: self.output(theta, _alone(x)).squeeze(0), parameters)
            probability = torch.softmax(logits, dim=0)
            identity = torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device)
            seeds = probability.sqrt().unsqueeze(1) * (identity - probability)
            return vmap(lambda seed: pull(seed)[0])(seeds[classes])  # type: ignore[no-any-return]

        per_sample = vmap(rows, in_dims=(None, 0))
        return _explained(lambda: per_sample(self.parameters, batch.inputs))


def require_evaluation_mode(model: nn.Module) -> None:
    """Raise `TrainingModeError` if samples influence one another or chance the output.

    Dropout in training mode, and batch normalisation in training mode or without running
    statistics, have no gradient of a single sample. Training mode elsewhere is harmless.
    """
    for name, module in model.named_modules():
        if _is_unsettled(module):
            found = f"{name or 'the network'} ({type(module).__name__}) is in training mode"
            raise TrainingModeError("model", found, "call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            found = f"{name} ({type(module).__name__}) has no running statistics"
            raise TrainingModeError("model", found, "train it with track_running_stats=True")


def probe(function: NetworkFunction, sample: Batch) -> tuple[int | None, int]:
    """Run one sample: the number of classes (None unless a classifier) and bytes saved for backward.

    Raises `LabelRangeError` for a label outside the outputs, `ArgumentError` for a loss that is no scalar.
    """
    held = {tensor.untyped_storage().data_ptr() for tensor in function.own_tensors()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        output = function.output(function.leaves(), sample.inputs)
        classes = class_count(output, sample.labels)
        if classes is not None:
            check_labels(sample.labels, classes)
        function.loss_of(output, sample.labels)
    return classes, sum(saved.values())


def sampled_labels(function: NetworkFunction, batch: Batch, uniforms: Tensor) -> Tensor:
    """Labels drawn from the network's softmax by inverting its distribution at `uniforms`, (B,)."""
    with torch.no_grad():
        output = function.output(function.parameters, batch.inputs)
    cumulative = torch.softmax(output.double(), dim=1).cumsum(dim=1)
    draws = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, draws, right=True).squeeze(1)
    return labels.clamp_(max=output.shape[1] - 1)


def require_classifier(classes: int | None, curvature: str) -> int:
    """Return the number of classes, or raise `UnsupportedProblemError` for other networks."""
    if classes is None:
        found = f"{curvature!r} for a network whose outputs are not (B, C >= 2) with integer labels (B,)"
        raise UnsupportedProblemError("curvature", found, "use EmpiricalFisher")
    return classes


def _is_unsettled(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0.0
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return module.dropout > 0.0
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _alone(inputs: Inputs) -> Inputs:
    return map_tensors(lambda x: x.unsqueeze(0), inputs)


def _explained(compute: Callable[[], Gradients]) -> Gradients:
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        found = f"torch.func cannot differentiate one sample at a time ({error})"
        remedy = "pass a curvature with vectorize=False if the network runs by itself"
        raise PerSampleGradientError("model, loss_fn", found, remedy) from error
