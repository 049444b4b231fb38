"""The form of a loss in the outputs: told apart from others, whatever its labels, weights and reduction."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.output_hessian import Form, on_cpu

SAMPLES = 8


def classes(*shape: int) -> Tensor:
    return torch.randint(0, 4, (SAMPLES, *shape))


def numbers(*shape: int) -> Tensor:
    return torch.rand(SAMPLES, *shape)


def ignored_tokens() -> Tensor:
    labels = classes(5)
    labels[:, 2:] = -100
    labels[1] = -100
    return labels


def focal(output: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(output, y, reduction="none")
    return ((1.0 - torch.exp(-losses)) ** 2 * losses).mean()


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 3.0])
CASES: dict[str, tuple[Any, tuple[int, ...], Callable[[], Tensor], Form | None]] = {
    "default": (None, (4,), classes, "softmax"),
    "class weights": (nn.CrossEntropyLoss(weight=WEIGHT), (4,), classes, "softmax"),
    "summed class weights": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), (4,), classes, "softmax"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), (4,), classes, "softmax"),
    "by hand": (lambda o, y: F.nll_loss(o.log_softmax(1), y), (4,), classes, "softmax"),
    "positions": (F.cross_entropy, (4, 5), lambda: classes(5), "softmax"),
    "tokens": (None, (5, 4), ignored_tokens, "softmax"),
    "squared": (F.mse_loss, (3,), lambda: numbers(3), "squared"),
    "squared, summed": (nn.MSELoss(reduction="sum"), (3, 2), lambda: numbers(3, 2), "squared"),
    "binary": (F.binary_cross_entropy_with_logits, (3,), lambda: numbers(3), "logistic"),
    "binary of probabilities": (
        lambda o, y: F.binary_cross_entropy(torch.sigmoid(o), y),
        (3,),
        lambda: numbers(3),
        "logistic",
    ),
    "absolute": (F.l1_loss, (3,), lambda: numbers(3), None),
    "huber": (F.smooth_l1_loss, (3,), lambda: numbers(3), None),
    "focal": (focal, (4,), classes, None),
    "regularised": (lambda o, y: F.cross_entropy(o, y) + 0.01 * o.square().mean(), (4,), classes, None),
    "poisson": (F.poisson_nll_loss, (3,), lambda: numbers(3), None),
    "whole batches": (lambda o, y: (o @ o.T).logsumexp(1).mean(), (4,), classes, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_the_form_of_a_loss_is_told(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    loss, shape, labels, expected = CASES[name]
    model = nn.Sequential(nn.Linear(3, int(torch.Size(shape).numel())), nn.Unflatten(1, shape)).to(dtype)
    loss = copy.deepcopy(loss).to(dtype) if isinstance(loss, nn.Module) else loss
    objective = Objective(loss)
    assert objective.output_hessian is None
    y = labels()
    y = y.to(dtype) if y.is_floating_point() else y
    objective.settle(model.eval(), model, Batch(inputs=torch.randn(SAMPLES, 3, dtype=dtype), labels=y))
    assert objective.output_hessian == expected


class OwnLoss(nn.Module):
    """A language model that computes its loss itself."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.factor = factor

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.embedding(input_ids))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": self.factor * loss, "logits": logits}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "softmax"), (2.0, None)])
def test_a_loss_of_the_network_itself_is_known_by_its_value(factor: float, expected: Form | None) -> None:
    torch.manual_seed(0)
    model = OwnLoss(factor).eval()
    ids = torch.randint(0, 7, (SAMPLES, 6))
    objective = Objective()
    batch = Batch(inputs={"input_ids": ids, "labels": ids}, labels=ids)
    objective.settle(model, lambda inputs: model(**inputs), batch)
    assert objective.output_hessian == expected


def test_class_weights_come_along_to_the_cpu() -> None:
    """Of partial functions and modules; a network on an accelerator has them there."""
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    module = on_cpu(loss)
    assert module is not loss
    assert torch.equal(module.weight, WEIGHT)
    moved = on_cpu(functools.partial(F.cross_entropy, weight=WEIGHT, reduction="sum"))
    assert torch.equal(moved.keywords["weight"], WEIGHT)
    assert moved.keywords["reduction"] == "sum"
