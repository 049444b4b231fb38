"""Gradients of single samples, of groups of samples and of class probabilities."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp, vmap
from torch.nn.functional import cross_entropy

from cbs_opt.errors import LossError, PerSampleGradientError, TrainingModeError
from cbs_opt.network.data import (
    Batch,
    Inputs,
    device_of,
    forward,
    map_tensors,
    parts,
    structure,
    tensors_of,
)
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.objective import Objective, check_labels, class_count, logits_of
from cbs_opt.network.partition import Partition
from cbs_opt.network.state import require_usable
from cbs_opt.network.trial import as_parameters, lent
from formulations.errors import UnsupportedProblemError

Gradients = dict[str, Tensor]
"""Gradients by parameter name; leading axes count samples or classes."""
REASON = 200
"""Letters of torch's reasons that are logged."""
PROBED = 4
"""Samples that a forward pass is measured with."""
Seeds = tuple[Tensor, Tensor | None, float]
"""What is differentiated, its cotangent (None for a scalar), and a factor."""
Target = Callable[[Any, Batch, slice], Seeds | None]
"""Of the output for some samples of a batch, with their place in it: what is differentiated, if anything."""

Signs = Callable[[torch.Size], Tensor]
"""Of the shape of a sample's outputs: as many signs for every sample of a batch, (B, *shape)."""


class NetworkFunction:
    """A network as a function of the partition's parameters; every other tensor is held fixed.

    Neither parameters nor their `.grad` are written. `parameters` are those at which gradients are taken:
    detached views of the network's own, or of flat `weights` (n,). Losses are those of `objective`.
    """

    def __init__(
        self, model: nn.Module, partition: Partition, objective: Objective, weights: Tensor | None = None
    ) -> None:
        self._model = model = unwrapped(model)
        self.objective = objective
        # One that requires grad would tie a graph to every result.
        detached = {name: parameter.detach() for name, parameter in model.named_parameters()}
        owned = partition.tensors(model)
        self.parameters: Gradients = {name: detached.pop(name) for name in owned}
        self._fixed = detached
        # Leaves of the network itself cost no call of `functional_call`.
        plain = all(tensor.requires_grad and not tensor._backward_hooks for tensor in owned.values())
        self._leaves: Gradients | None = dict(owned) if plain and weights is None else None
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

    def settle(self, batch: Batch) -> None:
        """Find out how the loss of a batch is made up, see `Objective.settle`."""
        self.objective.settle(self._model, self.run, batch)

    def run(self, inputs: Inputs) -> Any:
        """Return the output of the network."""
        return self._called(self.parameters, inputs)

    def weights(self, batch: Batch) -> Tensor | None:
        """Return how much each sample counts, (B,); None where all count as 1."""
        return self.objective.weights(batch, self.run)

    def own_tensors(self) -> list[Tensor]:
        """Parameters and buffers of the network, detached."""
        return [*self.parameters.values(), *self._fixed.values(), *self._model.buffers()]

    def differentiated(self, batch: Batch, chunk: int, *targets: Target) -> list[Gradients]:
        """Return the gradient of each target, added up over chunks of a batch: one forward pass a chunk."""
        totals: list[Gradients] = [{} for _ in targets]
        for start in range(0, batch.size, chunk):
            where = slice(start, min(start + chunk, batch.size))
            part = batch if where == slice(0, batch.size) else batch.take(where)
            self._at_leaves(partial(self._add_all, totals, part, where, targets))
        for total in totals:
            for name, value in self.parameters.items():
                total.setdefault(name, torch.zeros_like(value))
        return totals

    def mean_loss(self, batch: Batch, weights: Tensor | None) -> Target:
        """Return the target whose gradient is that of the loss of `batch`, whose samples have `weights`."""
        shares = None if weights is None else weights / weights.sum()

        def target(output: Any, part: Batch, where: slice) -> Seeds | None:
            share = part.size / batch.size if shares is None else float(shares[where].sum())
            if share == 0.0 or math.isnan(share):
                return None
            return self.objective.loss(output, part), None, share

        return target

    def drawn_loss(self, uniforms: Tensor, weights: Tensor | None) -> Target:
        """Return the target of cross-entropy at labels that the network draws, by `uniforms` (B,)."""
        shares = None if weights is None else weights / weights.sum()

        def target(output: Any, part: Batch, where: slice) -> Seeds | None:
            logits = require_logits(output)
            labels = _drawn(logits.detach(), uniforms[where])
            if shares is None:
                return cross_entropy(logits, labels), None, part.size / len(uniforms)
            losses = cross_entropy(logits, labels, reduction="none")
            return losses, shares[where].to(losses), 1.0

        return target

    def sketch(self, batch: Batch, signs: Signs, weights: Tensor | None) -> Target:
        """Return the target ``sum_b J_b^T L_b e_b / sqrt(B)`` for `signs` e.

        ``L_b L_b^T`` is the Hessian of a sample's loss in its outputs, see `Objective.sketch`, so that with
        independent signs the outer product of the sum with itself is the Gauss-Newton matrix averaged over
        the batch, in expectation; of samples times their `weights`.
        """

        def target(output: Any, part: Batch, where: slice) -> Seeds:
            logits = require_logits(output)
            draws = signs(logits.shape[1:])[where].to(logits)
            shares = None if weights is None else weights[where]
            seeds = self.objective.sketch(logits.detach(), part, draws, shares)
            return logits, seeds, 1.0 / math.sqrt(batch.size)

        return target

    def sample_gradients(self, batch: Batch, drawn: Tensor | None = None) -> Gradients:
        """Return the gradient of the loss of every sample, (B, *shape) by name.

        The loss is that of the objective, or cross-entropy at `drawn` labels (B,).
        """

        def loss(parameters: Gradients, tensors: Sequence[Tensor], label: Tensor | None) -> Tensor:
            alone = _alone(batch, tensors)
            output = self.objective.as_row(self._called(parameters, alone.inputs))
            if label is not None:
                return cross_entropy(require_logits(output), label.unsqueeze(0))
            return self.objective.loss(output, alone)

        def one_by_one() -> Gradients:
            singles = []
            for number, part in enumerate(parts(batch, 1)):
                target = self.mean_loss(part, None) if drawn is None else _at_label(drawn[number])
                singles += self.differentiated(part, 1, target)
            return {name: torch.stack([single[name] for single in singles]) for name in self.parameters}

        in_dims = (None, 0, None if drawn is None else 0)
        per_sample = vmap(grad(loss), in_dims=in_dims)
        return self._vectorized(lambda: per_sample(self.parameters, _flat(batch), drawn), one_by_one)

    def class_gradients(self, batch: Batch, classes: slice) -> Gradients:
        """Return ``sqrt(p_c) grad log p_c`` of every sample and class, (B, C, *shape) by name.

        `p` is the softmax of the output. The derivative of ``log p_c`` in the logits is
        ``e_c - p``, so that one forward pass and one backward pass a class suffice.
        """

        def seeds_of(logits: Tensor) -> Tensor:
            probability = torch.softmax(logits, dim=0)
            identity = torch.eye(logits.shape[0], dtype=logits.dtype, device=logits.device)
            return (probability.sqrt().unsqueeze(1) * (identity - probability))[classes]

        def rows(parameters: Gradients, tensors: Sequence[Tensor]) -> Gradients:
            def logits_at(theta: Gradients) -> Tensor:
                output = self.objective.as_row(self._called(theta, _alone(batch, tensors).inputs))
                return require_logits(output).squeeze(0)

            logits, pull, *_ = vjp(logits_at, parameters)
            return vmap(lambda seed: pull(seed)[0])(seeds_of(logits))  # type: ignore[no-any-return]

        def one_by_one() -> Gradients:
            def target_of(number: int) -> Target:
                def target(output: Any, part: Batch, where: slice) -> Seeds | None:
                    logits = require_logits(output)
                    return logits, seeds_of(logits[0].detach())[number : number + 1], 1.0

                return target

            targets = [target_of(number) for number in range(classes.stop - classes.start)]
            rows = [self.differentiated(part, 1, *targets) for part in parts(batch, 1)]
            return {
                name: torch.stack([torch.stack([row[name] for row in sample]) for sample in rows])
                for name in self.parameters
            }

        per_sample = vmap(rows, in_dims=(None, 0))
        return self._vectorized(lambda: per_sample(self.parameters, _flat(batch)), one_by_one)

    def sampled_labels(self, batch: Batch, uniforms: Tensor) -> Tensor:
        """Return labels drawn from the network's softmax by `uniforms` (B,)."""
        with torch.no_grad():
            return _drawn(require_logits(self.objective.output(self.run, batch)), uniforms)

    def _called(self, parameters: Gradients, inputs: Inputs) -> Any:
        return lent(self._model, {**self._fixed, **parameters}, lambda: forward(self._model, inputs))

    def _at_leaves(self, act: Callable[[Gradients], None]) -> None:
        """Call `act` with leaves of a new graph, which the network has meanwhile."""
        if self._leaves is not None:
            act(self._leaves)
            return
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        lent(self._model, {**self._fixed, **leaves}, lambda: act(leaves))

    def _add_all(
        self,
        totals: Sequence[Gradients],
        part: Batch,
        where: slice,
        targets: Sequence[Target],
        leaves: Gradients,
    ) -> None:
        """Add the gradient of every target for some samples to its total."""
        with torch.enable_grad():
            output = self.objective.output(partial(forward, self._model), part)
            for number, target in enumerate(targets):
                seeds = target(output, part, where)
                if seeds is not None:
                    _add(totals[number], leaves, seeds, retain=number + 1 < len(targets))

    def _vectorized(self, compute: Callable[[], Gradients], one_by_one: Callable[[], Gradients]) -> Gradients:
        """Return what `compute` returns, by `torch.func`; where it cannot, now and later `one_by_one`."""
        if not self.objective.vectorized:
            return one_by_one()
        try:
            # What is differentiated outside of it, such as a teacher in the loss, has no part in this.
            with torch.no_grad():
                return compute()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            began = time.perf_counter()
            gradients = one_by_one()
            seconds = time.perf_counter() - began
            self.objective.vectorized = False
            reason = textwrap.shorten(str(error), REASON)
            text = "samples are differentiated one by one (%d in %.2g s); torch.func cannot take several: %s"
            self.objective.say("loop", text, len(next(iter(gradients.values()))), seconds, reason)
            return gradients


def require_evaluation_mode(model: nn.Module) -> None:
    """Raise `TrainingModeError` if samples influence one another or chance the output.

    Dropout in training mode, and batch normalisation in training mode or without running
    statistics, have no gradient of a single sample. Training mode elsewhere is harmless. Raise
    `ArgumentError` for a network that cannot be differentiated at all, see `require_usable`.
    """
    require_usable(model)
    for name, module in model.named_modules():
        if _is_unsettled(module):
            found = f"{_named(name, module)} is in training mode"
            raise TrainingModeError("model", found, "call model.eval() first")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            found = f"{_named(name, module)} has no running statistics: samples influence one another"
            raise TrainingModeError("model", found, "train it with track_running_stats=True")


def _named(path: str, module: nn.Module) -> str:
    return f"module {path} ({type(module).__name__})" if path else f"the network ({type(module).__name__})"


def probe(function: NetworkFunction, batch: Batch) -> tuple[int | None, int, int]:
    """Return the number of classes (None unless a classifier), and bytes saved for the backward pass.

    Those of one sample, and those by which another sample adds to it; of a loss that looks at whole batches,
    which may not be cut, both are shares of the batch. The loss is taken as well. Raises `LabelRangeError`
    for a label outside the outputs.
    """
    if function.objective.in_batches:
        whole, classes = _saved(function, batch)
        share = max(1, whole // batch.size)
        return classes, share, share
    one, classes = _saved(function, batch.take(slice(1)))
    samples = min(batch.size, PROBED)
    several = one if samples == 1 else _saved(function, batch.take(slice(samples)))[0]
    return classes, one, one if samples == 1 else max(1, (several - one) // (samples - 1))


def require_classifier(classes: int | None, curvature: str) -> int:
    """Return the number of classes, or raise `UnsupportedProblemError` for other networks."""
    if classes is None:
        found = f"{curvature!r} for a network whose outputs are not (B, C >= 2) with integer labels (B,)"
        raise UnsupportedProblemError("curvature", found, "use EmpiricalFisher")
    return classes


def require_logits(output: Any) -> Tensor:
    """Return the tensor with the logits of an output, or raise `UnsupportedProblemError`."""
    logits = logits_of(output)
    if logits is None:
        found = f"needs logits, but the network returns {structure(output)}"
        raise UnsupportedProblemError("curvature", found, "use EmpiricalFisher")
    return logits


def _saved(function: NetworkFunction, batch: Batch) -> tuple[int, int | None]:
    """Return the bytes that a forward pass saves beside the network's own, and the number of classes."""
    held = {tensor.untyped_storage().data_ptr() for tensor in function.own_tensors()}
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    # A view would count the whole data set.
    inputs, labels = map_tensors(torch.clone, (batch.inputs, batch.labels))
    classes: list[int | None] = []

    def target(output: Any, part: Batch, where: slice) -> Seeds | None:
        classes.append(class_count(output, part.labels))
        if classes[0] is not None:
            check_labels(part.labels, classes[0], ignored=function.objective.ignored)
        _require_graph(function.objective.loss(output, part))
        return None

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        function.differentiated(Batch(inputs=inputs, labels=labels), batch.size, target)
    return sum(saved.values()), classes[0]


def _add(total: Gradients, leaves: Gradients, seeds: Seeds, *, retain: bool) -> None:
    """Add the gradient of a target to `total`."""
    value, cotangent, factor = seeds
    _require_graph(value)
    if cotangent is not None:
        # A scalar has the same gradients; to check the shape of a cotangent, torch would import sympy: 1.5 s.
        value = (value * cotangent).sum()
    try:
        gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=retain, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        remedy = "use operations that torch can differentiate"
        raise PerSampleGradientError("model, loss_fn", f"no backward pass ({error})", remedy) from error
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is None:
            continue
        if name in total:
            total[name].add_(gradient, alpha=factor)
        else:
            total[name] = gradient if factor == 1.0 else gradient * factor


def _require_graph(value: Tensor) -> None:
    """Raise `LossError` for a value that no weight has a part in."""
    if not value.requires_grad:
        found = "the loss does not depend on the weights"
        remedy = "compute it from output without detaching it, and let the network run without torch.no_grad"
        raise LossError("model, loss_fn", found, remedy)


def _at_label(label: Tensor) -> Target:
    def target(output: Any, part: Batch, where: slice) -> Seeds | None:
        return cross_entropy(require_logits(output), label.unsqueeze(0)), None, 1.0

    return target


def _drawn(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return labels (B,) drawn from the softmax of `logits` by inverting its distribution at `uniforms`."""
    cumulative = torch.softmax(logits.double(), dim=1).cumsum(dim=1)
    draws = uniforms.to(cumulative).unsqueeze(1) * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, draws, right=True).squeeze(1)
    return labels.clamp_(max=logits.shape[1] - 1)


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


def _flat(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch as vmap is to have them, which takes a fifth longer by channels last."""
    return [tensor.contiguous() for tensor in tensors_of((batch.inputs, batch.labels))]


def _alone(batch: Batch, tensors: Sequence[Tensor]) -> Batch:
    """Return one sample in the form of `batch`, of its `tensors` without an axis of samples."""
    each = iter(tensors)
    inputs, labels = map_tensors(lambda _: next(each).unsqueeze(0), (batch.inputs, batch.labels))
    return Batch(inputs=inputs, labels=labels)
