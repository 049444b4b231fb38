"""Kinds of batches, outputs and losses, around a small perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from experiments.any_network.case import CLASSES, SAMPLES, Case, Trial, classes, perceptron


class Returning(nn.Module):
    """A perceptron whose output is handed through `shape`, with the labels where the batch has them."""

    def __init__(self, shape: Callable[..., Any], outputs: int = CLASSES) -> None:
        super().__init__()
        self.layers = perceptron(outputs=outputs)
        self.shape = shape

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Return what `shape` makes of the logits (B, C)."""
        logits = self.layers(x)
        return self.shape(logits) if labels is None else self.shape(logits, labels)


class TwoInputs(nn.Module):
    """Two branches, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = perceptron(), perceptron(inputs=4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.first(a) + self.second(b)
        return logits


class Rows(Dataset[Any]):
    """A map-style data set with Python numbers as labels; a sample is what `shape` makes of both."""

    def __init__(self, shape: Callable[[Tensor, int], Any]) -> None:
        self.x, self.y = _data()
        self.shape = shape

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        """Return one sample."""
        return self.shape(self.x[index], int(self.y[index]))


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """A data set that can only be read in order."""

    def __init__(self) -> None:
        self.data = _data()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Read the samples from the start."""
        return zip(*self.data, strict=True)


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 8), classes()


def _plain(data: Any, **options: Any) -> Trial:
    return Trial(model=perceptron(), data=data, options=options)


def _cross_entropy_with(**options: Any) -> Callable[[], Trial]:
    return lambda: _plain(_data(), loss_fn=nn.CrossEntropyLoss(**options))


def _own_loss(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _model_output(logits: Tensor, labels: Tensor) -> Any:
    from transformers.modeling_outputs import SequenceClassifierOutput

    loss = nn.functional.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def _returned(shape: Callable[..., Any], **options: Any) -> Trial:
    return Trial(model=Returning(shape).eval(), data=_data(), options=options)


def _dicts(shape: Callable[..., Any]) -> Trial:
    x, y = _data()
    return Trial(model=Returning(shape).eval(), data=[{"x": x[i::3], "labels": y[i::3]} for i in range(3)])


def _first_of_tuple(output: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output[0], labels)


def _two_inputs() -> Trial:
    return Trial(
        model=TwoInputs().eval(), data=[(torch.randn(SAMPLES, 8), torch.randn(SAMPLES, 4), classes())]
    )


def _two_targets() -> Trial:
    x, y = _data()
    targets = {"class": y, "value": torch.randn(SAMPLES)}

    def loss_fn(output: Tensor, target: dict[str, Tensor]) -> Tensor:
        value = nn.functional.mse_loss(output[:, 0], target["value"])
        return nn.functional.cross_entropy(output, target["class"]) + value

    return _plain([(x, targets)], loss_fn=loss_fn)


def _lists() -> Trial:
    x, y = _data()
    return _plain([(x[i::2].tolist(), y[i::2].tolist()) for i in range(2)])


def _arrays() -> Trial:
    x, y = _data()
    return _plain((x.numpy().astype(np.float64), y.numpy()))


def _loader(**options: Any) -> Trial:
    return _plain(DataLoader(TensorDataset(*_data()), batch_size=7, **options))


def _shuffled() -> Trial:
    return _loader(shuffle=True, generator=torch.Generator().manual_seed(0))


def _own_loss_from(data: Any) -> Trial:
    return Trial(model=Returning(_own_loss).eval(), data=data)


def _ends() -> Trial:
    x, y = _data()
    return _plain(batch for batch in zip(x.split(7), y.split(7), strict=True))


def _squeezed() -> Trial:
    model = Returning(lambda logits: logits.squeeze(), outputs=1).eval()
    data = (torch.randn(SAMPLES, 8), torch.randn(SAMPLES))
    return Trial(model=model, data=data, options={"loss_fn": nn.MSELoss()})


def _contrastive() -> Trial:
    def contrast(embedding: Tensor, labels: Tensor) -> Tensor:
        normed = nn.functional.normalize(embedding, dim=1)
        logits = (normed @ normed.T / 0.5).fill_diagonal_(-9.0)
        same = (labels[:, None] == labels[None]).float().fill_diagonal_(0.0)
        return -(same * logits.log_softmax(dim=1)).sum() / same.sum().clamp(min=1.0)

    x, y = _data()
    return _plain([(x[i::3], y[i::3]) for i in range(3)], loss_fn=contrast)


def _multi_label() -> Trial:
    x = torch.randn(SAMPLES, 8)
    return _plain((x, (torch.rand(SAMPLES, CLASSES) > 0.5).float()), loss_fn=nn.BCEWithLogitsLoss())


def _distilled() -> Trial:
    teacher = perceptron(width=16)

    def loss_fn(output: Tensor, x: Tensor) -> Tensor:
        target = teacher(x).softmax(dim=1)
        return nn.functional.kl_div(output.log_softmax(dim=1), target, reduction="batchmean")

    x = torch.randn(SAMPLES, 8)
    return _plain((x, x), loss_fn=loss_fn)


def _inputs_with_graph() -> Trial:
    x, y = _data()
    return _plain((x.requires_grad_(), y))


def _labels_of(kind: Callable[[Tensor], Tensor]) -> Callable[[], Trial]:
    def build() -> Trial:
        x, y = _data()
        return _plain((x, kind(y)))

    return build


def _double_inputs() -> Trial:
    x, y = _data()
    return _plain((x.double(), y))


def _wrong_width() -> Trial:
    return _plain((torch.randn(SAMPLES, 5), classes()))


def _nan_sample() -> Trial:
    x, y = _data()
    x[5, 0] = torch.nan
    return _plain((x, y))


def _one_output() -> Trial:
    x, _ = _data()
    options = {"loss_fn": nn.functional.cross_entropy}
    return Trial(
        model=perceptron(outputs=1), data=(x, torch.zeros(SAMPLES, dtype=torch.long)), options=options
    )


def _labels_out_of_range() -> Trial:
    x, y = _data()
    return _plain((x, y + 2))


def _uneven() -> Trial:
    x, y = _data()
    return _plain((x, y[:-1]))


def _raises() -> Trial:
    def loss_fn(output: Tensor, labels: Tensor) -> Tensor:
        raise ZeroDivisionError("no such loss")

    return _plain(_data(), loss_fn=loss_fn)


def _empty() -> Trial:
    return _plain([])


def _words() -> Trial:
    return _plain([("a sentence", "positive")])


def _no_labels() -> Trial:
    return _plain(torch.randn(SAMPLES, 8))


CASES = (
    Case(network="perceptron", batch="DataLoader", build=_loader),
    Case(network="perceptron", batch="DataLoader, shuffled", build=_shuffled),
    Case(network="perceptron", batch="Dataset", build=lambda: _plain(Rows(lambda x, y: (x, y)))),
    Case(network="perceptron", batch="IterableDataset", build=lambda: _plain(Stream())),
    Case(
        network="returns a dict with its loss",
        batch="Dataset of dicts",
        build=lambda: _own_loss_from(Rows(lambda x, y: {"x": x, "labels": y})),
    ),
    Case(network="perceptron", batch="NumPy arrays, float64", build=_arrays),
    Case(network="perceptron", batch="lists of numbers", build=_lists),
    Case(network="perceptron", batch="generator, read once", build=_ends, refused="only once"),
    Case(
        network="returns a dict with its loss",
        batch="dict of tensors as a whole",
        build=lambda: _own_loss_from(dict(zip(("x", "labels"), _data(), strict=True))),
    ),
    Case(network="perceptron", batch="int32 labels", build=_labels_of(lambda y: y.int())),
    Case(network="perceptron", batch="labels (B, 1)", build=_labels_of(lambda y: y.unsqueeze(1))),
    Case(network="perceptron", batch="float64 inputs", build=_double_inputs),
    Case(network="perceptron", batch="inputs that require gradients", build=_inputs_with_graph),
    Case(network="two inputs", batch="(x1, x2, y)", build=_two_inputs),
    Case(network="perceptron", batch="dict of targets, own loss_fn", build=_two_targets),
    Case(
        network="returns a tuple",
        batch="tensors, own loss_fn",
        build=lambda: _returned(lambda z: (z, z * 2.0), loss_fn=_first_of_tuple),
    ),
    Case(network="returns a dict with its loss", batch="dict with labels", build=lambda: _dicts(_own_loss)),
    Case(
        network="returns a ModelOutput",
        batch="dict with labels",
        build=lambda: _dicts(_model_output),
        needs=("transformers",),
    ),
    Case(
        network="returns an OrderedDict",
        batch="tensors, own loss_fn",
        build=lambda: _returned(
            lambda z: OrderedDict(out=z),
            loss_fn=lambda output, y: nn.functional.cross_entropy(output["out"], y),
        ),
    ),
    Case(network="squeezes its output", batch="tensors, MSE", build=_squeezed),
    Case(network="perceptron", batch="contrastive loss over the batch", build=_contrastive),
    Case(network="perceptron", batch="multi-label, BCE", build=_multi_label),
    Case(
        network="perceptron",
        batch="class weights",
        build=_cross_entropy_with(weight=torch.tensor([1.0, 4.0, 0.5])),
    ),
    Case(network="perceptron", batch="label smoothing", build=_cross_entropy_with(label_smoothing=0.1)),
    Case(
        network="perceptron", batch="loss summed over the batch", build=_cross_entropy_with(reduction="sum")
    ),
    Case(network="perceptron", batch="distillation from a trainable teacher", build=_distilled),
    Case(
        network="perceptron",
        batch="a loss for each sample",
        build=_cross_entropy_with(reduction="none"),
        refused="scalar",
    ),
    Case(
        network="perceptron",
        batch="a loss that ignores the network",
        build=lambda: _plain(_data(), loss_fn=lambda output, y: y.float().mean()),
        refused="loss_fn",
    ),
    Case(network="perceptron", batch="inputs of the wrong width", build=_wrong_width, refused="8x12"),
    Case(network="perceptron", batch="NaN in one sample", build=_nan_sample, refused="sample 5"),
    Case(network="perceptron", batch="cross-entropy of one output", build=_one_output, refused="one output"),
    Case(
        network="perceptron", batch="labels out of range", build=_labels_out_of_range, refused="labels from"
    ),
    Case(network="perceptron", batch="more inputs than labels", build=_uneven, refused="24"),
    Case(network="perceptron", batch="a loss that raises", build=_raises, refused="no such loss"),
    Case(network="perceptron", batch="no batch", build=_empty, refused="no sample"),
    Case(network="perceptron", batch="text", build=_words, refused="batch 0"),
    Case(network="perceptron", batch="inputs alone, no loss", build=_no_labels, refused="loss_fn"),
)
