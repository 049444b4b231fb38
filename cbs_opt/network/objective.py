"""The loss of a network on a data set: ``L = sum_i c_i l_i / sum_i c_i`` over its samples.

A loss function returns the loss of a batch. Most are means over samples (``c = 1``); with class weights, or
over tokens of which some are ignored, samples count differently, and a mean over batches would depend on how
the data are cut. `Objective` finds out once, on a few samples, which it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from cbs_opt.errors import ForwardError, LabelRangeError, LossError, RandomOutputError
from cbs_opt.network.data import (
    LABELS,
    Batch,
    Inputs,
    Labels,
    LossFunction,
    cut,
    map_tensors,
    structure,
    tensors_of,
)
from cbs_opt.network.known_outputs import KnownOutputs
from cbs_opt.network.output_hessian import Form, OutputHessian, form_of, on_cpu, slope_of
from formulations.errors import ArgumentError, CbsError

Run = Callable[[Inputs], Any]
"""A network at some weights: inputs to output."""
Kind = Literal["mean", "sum", "labels", "outputs", "batches"]

PEEKED = 16
"""Samples of the data, if there are as many, that some are chosen from to look at the loss with."""
HANDFUL = 4
"""Samples that a loss is looked at with."""
UNCUT_BATCH = 32
"""Samples in a batch, where a loss looks at whole ones and the caller has not cut the data."""
IGNORED = -100
"""The label that losses ignore, unless they say otherwise."""
CLOSE = 2e-5
"""Relative error of a form of the loss, on the same outputs, up to which it is taken."""
NEAR = 2e-3
"""The same where the network runs anew, and rounds otherwise for other numbers of samples."""
ROUNDINGS = 8
"""Units in the last place that outputs may differ by, in half precision more than `NEAR`."""
HESSIAN_NUMBERS = 1 << 22
"""Numbers in the outputs that the Hessian of a loss is looked at with, if more than one sample's."""
SAME_SCALE = 32
"""Units in the last place up to which a loss counts samples as their weights say."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelCount:
    """How much samples count by their labels: the number that is not ignored, or the sum of class weights.

    `shift`: leading labels of every sample that no output belongs to. `unit`: what is counted as 1.
    """

    ignored: int
    weight: Tensor | None
    shift: int
    unit: float

    @classmethod
    def of(cls, loss_fn: Any, labels: Labels, shift: int = 0) -> LabelCount | None:
        """Return how a loss function says that it counts labels of classes; None for other labels."""
        if not isinstance(labels, Tensor) or not _whole_numbers(labels) or labels.ndim < 1:
            return None
        options = getattr(loss_fn, "keywords", {})  # of functools.partial
        weight = options.get("weight", getattr(loss_fn, "weight", None))
        ignored = options.get("ignore_index", getattr(loss_fn, "ignore_index", IGNORED))
        usable = isinstance(weight, Tensor) and weight.ndim == 1
        unit = labels[0].numel() if not shift else labels[0, shift:].numel()
        return cls(
            ignored=int(ignored), weight=weight if usable else None, shift=shift, unit=float(max(1, unit))
        )

    def __call__(self, labels: Tensor) -> Tensor:
        """Return how much each sample counts, (B,) float64."""
        counted = labels[:, self.shift :] if self.shift else labels
        valid = (counted != self.ignored).double()
        if self.weight is not None:
            classes = counted.clamp(0, len(self.weight) - 1)
            valid = valid * self.weight.detach().to(counted.device).double()[classes]
        return valid.reshape(len(labels), -1).sum(1) / self.unit

    def mean(self, labels: Tensor, losses: list[float]) -> float:
        """Return the loss of a batch that the losses of its samples amount to."""
        pairs = zip(self(labels).tolist(), losses, strict=True)
        counting = [(weight, loss) for weight, loss in pairs if weight > 0.0]
        total = sum(weight for weight, _ in counting)
        return sum(weight * loss for weight, loss in counting) / total if total else math.nan


class Objective:
    """A loss function, or the one that a network and its data stand for, as the loss of a data set.

    Attributes
    ----------
    kind : {"mean", "sum", "labels", "outputs", "batches"}, or None until it is settled
        How samples make up the loss of a batch: by their mean; by their sum; by a mean weighted by what
        their labels say (class weights, labels that are ignored); by a mean whose weights only the loss
        function knows; or not at all, so that batches are what is averaged.
    ignored : int or None
        The label that does not count, if there is one.
    vectorized : bool
        Whether `torch.func` can differentiate many samples at once, as far as it was tried.
    notes : dict of str to str
        What was logged about the network, the data and the loss.
    """

    def __init__(self, loss_fn: LossFunction | None = None) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise ArgumentError("loss_fn", f"{loss_fn!r}", "pass a function of output and labels, or None")
        self.kind: Kind | None = None
        self.ignored: int | None = None
        self.vectorized = True
        self._loss = loss_fn
        self._own = False
        self._wrap: Callable[[Tensor], Any] = _unchanged
        self._dtype: torch.dtype | None = None
        self._channels = False
        self._row_shape: tuple[int, ...] | None = None
        self._labels_of: Callable[[Batch], Labels] | None = None
        self._count: LabelCount | None = None
        self._reference: tuple[Tensor, Labels] | None = None
        self._hessian: OutputHessian | None = None
        self._of_rows: LossFunction | None = None
        self.notes: dict[str, str] = {}

    @classmethod
    def of(cls, loss_fn: LossFunction | Objective | None) -> Objective:
        """Return `loss_fn` as an objective; one that is settled stays so."""
        return loss_fn if isinstance(loss_fn, Objective) else cls(loss_fn)

    @classmethod
    def matching(cls, run: Run, *, samples: int = 0) -> Objective:
        """Return half the squared distance of outputs from those of `run`; labels are of no consequence.

        Its Hessian in the outputs is the identity. `run` is called once for every batch that is prepared; of
        data that are the same whenever they are read, whose number of `samples` is given, once for a sample.
        A batch raises `ForwardError` for what `run` raises, and `ArgumentError` if it returns no tensor of
        numbers.
        """
        objective, outputs = cls(_half_squared_distance), KnownOutputs(samples)

        def wanted(batch: Batch) -> Tensor:
            known = outputs.at(batch.index)
            if known is not None:
                return known
            with torch.no_grad():
                output = objective.output(run, batch)
            rows = logits_of(output)
            if rows is None or not rows.is_floating_point():
                found = f"True, and the network returns {structure(output)}"
                remedy = "leave it out, or let the network return its outputs as a tensor of numbers"
                raise ArgumentError("stages.fine_tuning.matching", found, remedy)
            outputs.keep(batch.index, rows.detach())
            return rows.detach()

        objective._labels_of = wanted
        return objective

    @property
    def in_batches(self) -> bool:
        """Whether only whole batches, as the caller cut them, have a loss."""
        return self.kind == "batches"

    @property
    def output_hessian(self) -> Form | None:
        """The form of the loss in the outputs of the network, as far as a few samples show it.

        "softmax": cross-entropy, over classes or over the classes of every position; "squared"; "logistic":
        binary cross-entropy with logits. The Hessian in the outputs is then known in closed form, up to
        how much each output counts: see `output_hessian.py`. None before it is settled, of a loss that looks
        at whole batches, and of any other. Of a loss that the network computes itself, that of its logits
        and labels which has the same value.
        """
        return None if self._hessian is None else self._hessian.form

    def say(self, what: str, text: str, *values: object) -> None:
        """Log `text` and take note of it, unless `what` was said before."""
        if what not in self.notes:
            self.notes[what] = text % values
            log.warning(self.notes[what])

    def fitted(self, batch: Batch) -> Batch:
        """Return a batch in the dtype and the memory format that the network takes."""
        dtype = self._dtype
        if dtype is not None:
            inputs, labels = map_tensors(
                lambda x: x.to(dtype) if x.is_floating_point() else x, (batch.inputs, batch.labels)
            )
            batch = replace(batch, inputs=inputs, labels=labels)
        return replace(batch, inputs=map_tensors(_channels_last, batch.inputs)) if self._channels else batch

    def prepared(self, batch: Batch) -> Batch:
        """Return a batch as the network takes it, with the labels that the loss is taken at."""
        batch = self.fitted(batch)
        return batch if self._labels_of is None else replace(batch, labels=self._labels_of(batch))

    def labelled(
        self, batches: Iterable[Batch], *, size: int, device: torch.device
    ) -> tuple[Objective, list[Batch]]:
        """Return batches of at most `size` samples with the labels that this makes, and the loss at these.

        For samples that many networks are compared on. The objective is settled, if it makes labels.
        """
        if self._labels_of is None:
            return self, list(batches)
        known = [self.prepared(batch) for batch in cut(batches, size=size, device=device)]
        return Objective(self._loss), known

    def output(self, run: Run, batch: Batch) -> Any:
        """Return what the network returns for a batch; raise `ForwardError` for what it raises."""
        try:
            output = run(batch.inputs)
        except (CbsError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            found = f"the network raised {type(error).__name__} for {structure(batch.inputs)}: {error}"
            remedy = "pass batches that it takes: model(x), model(x1, x2) or, for a mapping, model(**batch)"
            raise ForwardError("model, data", found, remedy) from error
        return self.as_row(output) if batch.size == 1 else output

    def as_row(self, output: Any) -> Any:
        """Return the output of a single sample as that of a batch, where the network squeezes it."""
        shape = self._row_shape
        return output if shape is None or not isinstance(output, Tensor) else output.reshape(1, *shape)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch: the mean over its samples, weighted if they count differently.

        Raises `LossError` if the loss function raises or returns no scalar.
        """
        loss = self._value(output, batch.labels)
        return loss / batch.size if self.kind == "sum" else loss

    def weights(self, batch: Batch, run: Run) -> Tensor | None:
        """Return how much each sample counts, (B,) float64; None where all count as 1."""
        if self._count is not None:
            weights = self._count(batch.labels)
        elif self._reference is not None:
            with torch.no_grad():
                rows = logits_of(self.output(run, batch))
            assert rows is not None
            weights, _ = self._relative_weights(rows, batch.labels)
        else:
            return None
        return None if bool((weights == 1.0).all()) else weights

    def settle(self, model: nn.Module, run: Run, batch: Batch, argument: str = "data") -> None:
        """Find out, on a few samples, how the loss of a batch is made up, and how the network takes them.

        `run` is `model` at some weights. Does nothing if that is known. Raises `ForwardError`, `LossError`
        and `RandomOutputError` if the network or the loss cannot be used, `LabelRangeError` for a class that
        does not exist, `ArgumentError` if there is no loss function and none follows from output and labels.
        """
        if self.kind is not None:
            return
        few = _few(batch)
        with torch.no_grad():
            few, output = self._fitting(model, run, few, argument)
            self._channels = _takes_channels_last(model, few) and self._ordered_alike(run, few, output)
            if not _alike(output, self.output(run, few), NEAR):
                found = "the same samples give another output when the network is run again"
                remedy = "call model.eval(), and leave out in evaluation mode what is random"
                raise RandomOutputError("model", found, remedy)
            alone = self._stand_alone(run, few, output)
            rows = self._rows_of(output, few) if alone else None
            self.kind = self._kind_of(run, few, output, rows) if alone else "batches"
            if not self.in_batches:
                self._hessian = self._hessian_of(run, few, output, rows)
        if self.in_batches:
            text = "loss_fn: it looks at whole batches, so every gradient row is that of a batch"
            given = f"; the data are not cut into batches: {UNCUT_BATCH} samples make one"
            self.say("batches", text + (given if batch.uncut else ""))

    def pieces(
        self, batches: Iterator[Batch], *, size: int, max_samples: int | None, device: torch.device
    ) -> Iterator[Batch]:
        """Cut batches to at most `size` samples, `max_samples` in all, unless the loss needs whole ones."""
        if not self.in_batches:
            yield from cut(batches, size=size, max_samples=max_samples, device=device)
            return
        for batch in batches:
            yield from cut([batch], size=UNCUT_BATCH if batch.uncut else None, device=device)

    def _fitting(self, model: nn.Module, run: Run, few: Batch, argument: str) -> tuple[Batch, Any]:
        """Return samples as the network and the loss take them, and the output for them."""
        dtypes = {
            tensor.dtype for tensor in tensors_of((few.inputs, few.labels)) if tensor.is_floating_point()
        }
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        try:
            return self._tried(run, few, argument)
        except (ForwardError, LossError):
            if own is None or not dtypes - {own}:
                raise
            self._dtype = own
            try:
                fitting = self._tried(run, few, argument)
            except CbsError:
                self._dtype = None
            else:
                self.say("dtype", "data: numbers are converted to %s, as the network has", own)
                return fitting
            raise

    def _ordered_alike(self, run: Run, few: Batch, output: Any) -> bool:
        """Return whether the network gives the same for images whose channels lie next to one another."""
        try:
            found = self.output(run, replace(few, inputs=map_tensors(_channels_last, few.inputs)))
        except ForwardError:
            # It reads what it is given as it lies in memory.
            return False
        return _alike(output, found, NEAR)

    def _tried(self, run: Run, few: Batch, argument: str) -> tuple[Batch, Any]:
        """Run the network and the loss, there and back; return the samples as they are and the output."""
        few = self.prepared(few)
        output = self.output(run, few)
        if self._loss is None:
            self._loss = self._default(run, few, output)
            few = self.prepared(few)
        classes = class_count(output, few.labels)
        if classes is not None:
            count = LabelCount.of(self._loss, few.labels)
            ignored = count.ignored if count is not None and self._may_ignore(few) else None
            check_labels(few.labels, classes, argument, ignored=ignored)
        try:
            if isinstance(output, Tensor) and output.is_floating_point():
                self._slope(output, few.labels)
            else:
                self._value(output, few.labels)
        except LossError:
            if classes is not None:
                check_labels(few.labels, classes, argument)
            raise
        return few, output

    def _may_ignore(self, batch: Batch) -> bool:
        """Return whether it can be tried if a label is ignored.

        A kernel that takes the label for an index would end all work of an accelerator.
        """
        says = hasattr(self._loss, "ignore_index") or self._loss is cross_entropy or self._own
        return says or _device(batch).type == "cpu"

    def _value(self, output: Any, labels: Labels, loss_fn: LossFunction | None = None) -> Tensor:
        """Return the loss at an output; `loss_fn` in place of the one that was passed."""
        loss_fn = self._loss if loss_fn is None else loss_fn
        assert loss_fn is not None
        try:
            loss = loss_fn(output, labels)
        except (CbsError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            found = (
                f"raised {type(error).__name__} for output {structure(output)}, labels {structure(labels)}"
            )
            raise LossError("loss_fn", f"{found}: {error}", _advice(output, labels)) from error
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise LossError("loss_fn", f"returned {what}", "return the mean loss as a scalar tensor")
        return loss

    def _slope(self, rows: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return the loss at an output, and its gradient in it."""
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            loss = self._value(self._wrap(leaf.clone()), labels)  # which a loss may write to
            try:
                return loss.detach(), torch.autograd.grad(loss, leaf)[0]
            except RuntimeError as error:
                found = f"cannot be differentiated in the output of the network ({error})"
                remedy = "compute it from output by operations of torch, without detaching it"
                raise LossError("loss_fn", found, remedy) from error

    def _default(self, run: Run, few: Batch, output: Any) -> LossFunction:
        """Return the loss that output and labels stand for."""
        if _own_loss(output) is not None:
            self._own = True
            return _require_own_loss
        logits, labels = logits_of(output), few.labels
        if labels is None and logits is not None and _is_causal(run, few, logits):
            self._labels_of = _tokens
            self.say("tokens", "loss_fn: cross-entropy of the next token, as there are no labels")
            return _next_token_loss
        if logits is not None and isinstance(labels, Tensor):
            if _whole_numbers(labels) and labels.shape == (len(logits), 1) and logits.ndim == 2:
                self._labels_of = lambda batch: batch.labels.reshape(-1)
                labels = labels.reshape(-1)
            loss = _cross_entropy_for(logits, labels)
            if loss is not None:
                return loss if isinstance(output, Tensor) else lambda out, y: loss(logits_of(out), y)
        found = f"not given, and none follows from output {structure(output)}, labels {structure(labels)}"
        remedy = "pass loss_fn(output, labels), such as torch.nn.functional.mse_loss"
        raise ArgumentError("loss_fn", found, remedy)

    def _stand_alone(self, run: Run, few: Batch, output: Any) -> bool:
        """Return whether every sample has an entry of its own in the output; learn the shape of one."""
        if not isinstance(output, Tensor):
            return True
        if output.ndim == 0 or len(output) != few.size:
            return False
        shape = tuple(output.shape[1:])
        single = self.output(run, few.take(slice(1)))
        if not isinstance(single, Tensor) or single.numel() != math.prod(shape):
            return False
        if tuple(single.shape) != (1, *shape):
            self._row_shape = shape
        if not _alike(output[:1], single.reshape(1, *shape), NEAR):
            self.say(
                "mixing", "model: outputs depend on the whole batch; gradients are those of single samples"
            )
        return True

    def _kind_of(self, run: Run, few: Batch, output: Any, rows: Tensor | None) -> Kind:
        """Return the form of the loss that explains that of a few samples by their own."""

        def value(batch: Batch, sample: int | None = None) -> float:
            where = slice(None) if sample is None else slice(sample, sample + 1)
            part = batch.take(where)
            if rows is None:
                return float(self._value(self.output(run, part), part.labels))
            return float(self._value(self._wrap(rows[where].to(_device(batch), copy=True)), part.labels))

        try:
            whole, alone = value(few), [value(few, number) for number in range(few.size)]
        except (ForwardError, LossError):
            return "batches"
        most = _tolerance(output, NEAR if rows is None else CLOSE)
        self._count = self._counted(few, value, whole, alone, most)
        if self._count is not None:
            self.ignored = self._count.ignored
            return "labels"
        if _error(whole, sum(alone) / few.size, alone) <= most:
            return "mean"
        if _error(whole, sum(alone), alone) <= most:
            return "sum"
        if rows is not None and self._learn_weights(rows, few.labels):
            self.ignored = self._ignored_label(few, value)
            return "outputs"
        return "batches"

    def _rows_of(self, output: Any, few: Batch) -> Tensor | None:
        """Return the part of an output that the loss looks at, a row a sample; None if it is not known."""
        rows = None if self._own else logits_of(output)
        if rows is None or isinstance(output, Tensor):
            return rows
        make = dict if type(output) is dict else type(output)
        self._wrap = lambda logits: make(logits=logits)
        try:
            known = float(self._value(output, few.labels))
            return rows if known == float(self._value(self._wrap(rows.clone()), few.labels)) else None
        except (TypeError, LossError):
            return None

    def _hessian_of(self, run: Run, few: Batch, output: Any, rows: Tensor | None) -> OutputHessian | None:
        """Return the form of the loss in its outputs, and set the loss as a function of these."""
        loss_fn: Any = self._loss
        if self._own:
            rows, loss_fn = logits_of(output), self._known_loss(output, few.labels)
        if rows is None or loss_fn is None or rows.ndim == 0 or not rows.is_floating_point():
            return None
        few_enough = slice(max(1, min(len(rows), HESSIAN_NUMBERS // max(1, rows[0].numel()))))
        there = loss_fn if rows.device.type == "cpu" else on_cpu(loss_fn)
        self._of_rows = lambda z, labels: self._value(self._wrap(z), labels, loss_fn)
        return form_of(
            lambda z, labels: self._value(self._wrap(z), labels, there),
            rows[few_enough],
            few.take(few_enough).labels,
        )

    def _known_loss(self, output: Any, labels: Labels) -> LossFunction | None:
        """Return the loss of logits and labels whose value is the one that the network computed itself."""
        logits, own = logits_of(output), _own_loss(output)
        if logits is None or own is None or not isinstance(labels, Tensor):
            return None
        for candidate in (_cross_entropy_for(logits, labels), *OWN_LOSSES):
            try:
                if candidate is not None and _error(float(own), float(candidate(logits, labels)), []) <= NEAR:
                    return candidate
            except (RuntimeError, ValueError, IndexError):  # it takes no such labels
                continue
        return None

    def sketch(self, outputs: Tensor, batch: Batch, draws: Tensor, weights: Tensor | None) -> Tensor:
        """Return ``L e``, with ``L L^T`` the Hessian of the samples' losses in their outputs, added up.

        `outputs`: the logits (B, ...) of a batch. `draws`: e, of the same shape. `weights`: how much each
        sample counts, see `weights`. Where the form of the loss is not known, the outputs (B, C) are taken
        for the logits of classes, whose loss is cross-entropy.
        """
        form = OutputHessian(form="softmax") if self._hessian is None else self._hessian
        seeds = form.factor(outputs, draws)
        counts = weights
        if counts is None:
            counts = torch.ones(len(outputs), dtype=torch.float64, device=outputs.device)
        scales = counts.view(-1, *[1] * (outputs.ndim - 1))
        if self._hessian is not None and bool(counts.any()):
            assert self._of_rows is not None
            slope = partial(slope_of, self._of_rows)
            mass = 1.0 if self.kind == "sum" else float(counts.sum())
            measured = form.scales(slope, outputs, batch.labels).double() * mass
            most = SAME_SCALE * torch.finfo(outputs.dtype).eps
            same = (measured - scales).abs() <= most * scales
            scales = torch.where(same, scales, measured.clamp(min=0.0))
        return seeds * scales.sqrt().to(seeds)

    def _counted(
        self, few: Batch, value: Callable[..., float], whole: float, alone: list[float], most: float
    ) -> LabelCount | None:
        """Return how labels weigh samples, if the loss is such a mean and ignores what it should."""
        labels = few.labels
        for shift in range(2 if isinstance(labels, Tensor) and labels.ndim == 2 else 1):
            count = LabelCount.of(self._loss, labels, shift)
            if count is None:
                return None
            hidden = labels.clone()
            hidden[0].view(-1)[min(1, labels[0].numel() - 1) :] = count.ignored
            masked = _with_labels(few, hidden)
            masked = masked if self._may_ignore(few) else masked.to(torch.device("cpu"))
            try:
                changed = [value(masked, 0), *alone[1:]]
                both = value(masked)
            except (ForwardError, LossError):
                continue
            errors = (
                _error(whole, count.mean(labels, alone), alone),
                _error(both, count.mean(hidden, changed), alone),
            )
            if max(errors) <= most:
                return count
        return None

    def _ignored_label(self, few: Batch, value: Callable[..., float]) -> int | None:
        """Return the label without which nothing is left of a sample's loss."""
        count = LabelCount.of(self._loss, few.labels)
        if count is None:
            return None
        hidden = _with_labels(few, torch.full_like(few.labels, count.ignored))
        try:
            alone = value(hidden if self._may_ignore(few) else hidden.to(torch.device("cpu")), 0)
        except (ForwardError, LossError):
            return None
        return count.ignored if math.isnan(alone) else None

    def _learn_weights(self, rows: Tensor, labels: Labels) -> bool:
        """Return whether weights of samples follow from gradients in the output; set the reference sample."""
        slopes = [self._slope(rows[i : i + 1], _entry(labels, i))[1].norm() for i in range(len(rows))]
        first = int(torch.stack(slopes).argmax())
        self._reference = rows[first : first + 1].detach(), _entry(labels, first)
        _, explained = self._relative_weights(rows, labels)
        if not explained:
            self._reference = None
        return explained

    def _relative_weights(self, rows: Tensor, labels: Labels) -> tuple[Tensor, bool]:
        """Return weights relative to the reference sample, and whether gradients agree that there are such.

        In the gradient of a weighted mean, each sample's part is its own gradient times its share.
        """
        assert self._reference is not None
        row, label = self._reference
        rows = torch.cat([rows, row.to(rows)])
        joined = map_tensors(lambda a, b: torch.cat([a, b.to(a)]), labels, label)
        _, slope = self._slope(rows, joined)
        singles = [self._slope(rows[i : i + 1], _entry(joined, i)) for i in range(len(rows))]
        together = slope.double().flatten(1)
        alone = torch.cat([slope for _, slope in singles]).double().flatten(1)
        losses = torch.stack([loss for loss, _ in singles])
        squares = alone.square().sum(1)
        shares = torch.where(squares > 0.0, (together * alone).sum(1) / squares, torch.nan)
        # What is fitted perfectly says nothing about its weight; what has no loss by itself is ignored.
        shares = torch.where(shares.isnan(), shares.nanmean(), shares)
        shares = torch.where(losses.isnan(), 0.0, shares)
        rest = (together - shares.unsqueeze(1) * alone.nan_to_num()).norm() / together.norm()
        most = _tolerance(rows, NEAR)
        normalised = abs(float(shares.sum()) - 1.0) <= most and bool((shares >= 0).all())
        return shares[:-1] / shares[-1], normalised and float(rest) <= most


def logits_of(output: Any) -> Tensor | None:
    """Return the tensor that predictions are in: the output, its `logits`, or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, tuple | list):
        return next((part for part in output if isinstance(part, Tensor) and part.ndim > 0), None)
    return None


def class_count(output: Any, labels: Labels) -> int | None:
    """Return the number of classes if output (B, C >= 2) and integer labels (B,) are a classifier's."""
    logits = logits_of(output)
    if logits is None or not isinstance(labels, Tensor) or not _whole_numbers(labels):
        return None
    fits = logits.ndim == 2 and logits.shape[1] >= 2 and labels.shape == logits.shape[:1]
    return int(logits.shape[1]) if fits else None


def check_labels(labels: Tensor, classes: int, argument: str = "data", ignored: int | None = None) -> None:
    """Raise `LabelRangeError` unless every label is one of ``0 ... classes - 1``, or `ignored`."""
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.numel():
        return
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        found = f"labels from {low} to {high} for {classes} outputs"
        remedy = f"number the classes 0 to {classes - 1}; make the labels float if they are no classes"
        raise LabelRangeError(argument, found, remedy)


def _unchanged(rows: Tensor) -> Any:
    return rows


def _few(batch: Batch) -> Batch:
    """Return some samples, of several classes where that can be; a single one twice."""
    if batch.size == 1:
        return batch.take(torch.zeros(2, dtype=torch.int64, device=_device(batch)))
    labels = batch.labels
    if not isinstance(labels, Tensor) or labels.ndim != 1 or not _whole_numbers(labels):
        return batch.take(slice(HANDFUL))
    firsts = [int((labels == value).nonzero()[0]) for value in torch.unique(labels)[:HANDFUL]]
    rest = [number for number in range(min(batch.size, HANDFUL)) if number not in firsts]
    chosen = sorted((firsts + rest)[: min(HANDFUL, batch.size)])
    return batch.take(torch.tensor(chosen, device=labels.device))


def _device(batch: Batch) -> torch.device:
    return next(tensors_of((batch.labels, batch.inputs))).device


def _entry(labels: Labels, number: int) -> Labels:
    return map_tensors(lambda x: x[number : number + 1], labels)


def _with_labels(batch: Batch, labels: Tensor) -> Batch:
    inputs = batch.inputs
    if isinstance(inputs, dict) and LABELS in inputs:
        inputs = {**inputs, LABELS: labels}
    return replace(batch, inputs=inputs, labels=labels)


def _whole_numbers(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _tolerance(tree: Any, least: float) -> float:
    kinds = [tensor.dtype for tensor in tensors_of(tree) if tensor.is_floating_point()]
    return max([least, *(ROUNDINGS * torch.finfo(dtype).eps for dtype in kinds)])


def _takes_channels_last(model: nn.Module, few: Batch) -> bool:
    """Return whether a network convolves images on a processor, where that order of their channels is faster.

    A gradient of ResNet20 with batch normalisation by batches takes .63 of the time, in evaluation mode .85.
    """
    images = any(_is_images(x) and x.device.type == "cpu" for x in tensors_of(few.inputs))
    return images and any(isinstance(module, nn.Conv2d) for module in model.modules())


def _is_images(x: Tensor) -> bool:
    return x.ndim == 4 and x.dtype == torch.float32


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if _is_images(x) else x


def _alike(one: Any, other: Any, least: float) -> bool:
    """Return whether two outputs agree up to rounding; a NaN agrees with a NaN."""
    tolerance = _tolerance(one, least)
    for a, b in zip(tensors_of(one), tensors_of(other), strict=False):
        if a.shape != b.shape:
            return False
        if a.numel() and a.is_floating_point() and not torch.equal(a, b):
            scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
            if not torch.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True):
                return False
    return True


def _error(loss: float, explained: float, alone: list[float]) -> float:
    """Return the relative error of an explanation of a loss; NaN and infinity only explain themselves."""
    if not math.isfinite(loss) or not math.isfinite(explained):
        return 0.0 if loss == explained or (math.isnan(loss) and math.isnan(explained)) else math.inf
    scale = max(abs(loss), *(abs(value) for value in alone if math.isfinite(value)), 1e-300)
    return abs(loss - explained) / scale


def _own_loss(output: Any) -> Tensor | None:
    """Return the loss that a network has computed itself, if it has."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None and isinstance(output, tuple) and len(output) > 1:
        loss = output[0]
    scalar = isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point()
    return loss if scalar else None


def _require_own_loss(output: Any, labels: Labels) -> Tensor:
    loss = _own_loss(output)
    if loss is None:
        found = f"not given, and the network returned none with {structure(output)}"
        raise LossError("loss_fn", found, "let all batches have labels, or pass loss_fn(output, labels)")
    return loss


def _cross_entropy_for(logits: Tensor, labels: Tensor) -> LossFunction | None:
    """Return the cross-entropy that fits the shapes of logits and labels; None if there is none."""
    if not _whole_numbers(labels):
        shares = labels.shape == logits.shape and logits.ndim == 2 and logits.shape[1] >= 2
        shares = shares and labels.is_floating_point() and bool((labels >= 0).all())
        return (
            cross_entropy if shares and _alike(labels.sum(1), torch.ones_like(labels[:, 0]), NEAR) else None
        )
    if labels.ndim != logits.ndim - 1 or labels.shape[0] != logits.shape[0]:
        return None
    if labels.shape[1:] == logits.shape[2:]:
        return cross_entropy if logits.shape[1] >= 2 else None
    if labels.shape == logits.shape[:-1]:
        return lambda output, y: cross_entropy(output.flatten(0, -2), y.flatten())
    return None


def _token_ids(inputs: Inputs) -> Tensor | None:
    ids = inputs.get("input_ids") if isinstance(inputs, dict) else inputs
    fits = isinstance(ids, Tensor) and ids.ndim == 2 and _whole_numbers(ids) and ids.shape[1] > 1
    return ids if fits else None


def _is_causal(run: Run, few: Batch, logits: Tensor) -> bool:
    """Return whether (B, T, V) logits belong to tokens (B, T), and none looks at later ones."""
    ids = _token_ids(few.inputs)
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        return False
    half = ids.shape[1] // 2
    others = torch.cat([ids[:, :half], (ids[:, half:] + 1) % logits.shape[2]], dim=1)
    inputs = {**few.inputs, "input_ids": others} if isinstance(few.inputs, dict) else others
    changed = logits_of(run(inputs))
    return changed is not None and _alike(logits[:, :half], changed[:, :half], NEAR)


def _tokens(batch: Batch) -> Tensor:
    """Return tokens as labels, those that are padding ignored."""
    ids = _token_ids(batch.inputs)
    assert ids is not None
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORED)


def _next_token_loss(output: Any, labels: Tensor) -> Tensor:
    logits = logits_of(output)
    assert logits is not None
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _half_squared_distance(output: Any, wanted: Tensor) -> Tensor:
    found = logits_of(output)
    assert found is not None
    return 0.5 * (found - wanted).square().sum() / len(found)


def _squared_loss(output: Any, labels: Tensor) -> Tensor:
    if output.squeeze().shape != labels.squeeze().shape:
        raise ValueError("labels of another shape")
    return mse_loss(output.squeeze(), labels.squeeze())


OWN_LOSSES: tuple[LossFunction, ...] = (_next_token_loss, _squared_loss, binary_cross_entropy_with_logits)
"""Losses besides cross-entropy that networks compute themselves of their logits and labels."""


def _advice(output: Any, labels: Labels) -> str:
    """Return what to do about a loss that does not take an output and labels."""
    if isinstance(output, Tensor):
        column = isinstance(labels, Tensor) and labels.shape == (len(output), 1) and _whole_numbers(labels)
        return "pass labels of shape (B,): y.squeeze(1)" if column else "pass a loss that takes these"
    if logits_of(output) is None:
        return "take from the output what the loss needs"
    part = "output[0]" if isinstance(output, tuple | list) else "output.logits"
    return f"take the tensor it needs: loss_fn=lambda output, labels: your_loss({part}, labels)"
