"""AutoPrune: auxiliary parameters behind a step function decide which weights stay.

    python -m experiments.comparators.autoprune
    python -m experiments.comparators.page autoprune

Source: Xiao, Wang, Rajasekaran, "AutoPrune: Automatic Network Pruning by Regularizing Auxiliary Parameters",
NeurIPS 2019. Learning rates, budgets and initial values are ours.

Every weight w has an auxiliary parameter m; the network computes with t = w h(m), where h(m) = 1 for m > 0
and 0 otherwise. The derivative of h is replaced by a coarse one, h'. With g = dL/dt:

- w follows g h(m) on training images: while it is pruned, w keeps the value it will return with;
- m follows sgn(w) g h'(m) + price h'(m) on images held out, and not w g h'(m), so that what is said of a
  small weight counts as much as of a large one. The second term is the derivative of price times the number
  of weights that stay. h' is positive at m < 0 as well: a weight that was pruned comes back where it would
  lower the loss.

When both have been trained the set is fixed, and the weights that stay are trained on. Of several prices the
page names the one with the fewest weights whose accuracy on the images held out is within .3 points of the
dense network's there: weights were not trained on these, and the test set has no say.

Contenders
----------
- ``autoprune``: for several prices; how many weights stay is an outcome.
- ``magnitude_sgd``, ``gradual_sgd``: those of `experiments.rivals_training`, at counts that are asked for,
  with as many images differentiated as ``autoprune`` in all.
- ``fast``, ``balanced``, ``best``: `cbs_opt.prune` with no option but the name, at the same counts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt import __version__
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Weights
from cbs_opt.system.checks import check_fields, finite_number, one_of, whole_number
from experiments.comparators.running import comparator_parser, measure_cells
from experiments.comparators.subjects import (
    SPECS,
    Subject,
    accuracy,
    accuracy_on,
    copied,
    on_dense,
    weight_counts,
)
from experiments.rivals_training import Cost, Training, descend, gradual, one_shot, train

COARSE = ("softplus", "leaky_relu")
"""Functions whose derivatives stand for that of the step."""
SLOPE = 0.1
"""Of the leaky ReLU left of zero."""
RECIPES = ("fast", "balanced", "best")
CONTENDERS = ("autoprune", "magnitude_sgd", "gradual_sgd", *RECIPES)
PRICES = (5e-4, 1e-3, 2e-3)
TIMES = (50.0, 100.0, 200.0)
RATE = 0.03
"""Learning rate of the rivals at first."""
SAMPLES = 495_000
"""Images differentiated in all, of AutoPrune and of rivals alike."""


@dataclass(frozen=True, kw_only=True)
class AutoPrune:
    """How auxiliary parameters are trained.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    price : float
        Of every weight that stays, in units of the loss.
    coarse : {"softplus", "leaky_relu"}, default "softplus"
    gate_rate : float, default 2.0
        Learning rate of the auxiliary parameters, the same throughout.
    rate : float, default 0.01
        Learning rate of the weights at first; it falls like half a cosine, and again after the set is fixed.
    samples : int, default 165_000
        Training images for the weights while the set changes; as many of the images held out for m.
    retraining : int, default 165_000
        Training images after the set is fixed.
    seed : int, default 0
    batch_size : int, default 64
    """

    price: float
    coarse: str = "softplus"
    gate_rate: float = 2.0
    rate: float = 0.01
    samples: int = 165_000
    retraining: int = 165_000
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, "method.", finite_number, "price", "gate_rate", "rate")
        check_fields(self, "method.", whole_number, "samples", "retraining", "batch_size")
        check_fields(self, "method.", whole_number, "seed", least=0)
        check_fields(self, "method.", one_of, "coarse", choices=COARSE)


class Gate(torch.autograd.Function):
    """t = w h(m), whose derivatives are those of the method: g h(m) for w, sgn(w) g h'(m) for m."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, auxiliary: Tensor, coarse: str) -> Tensor:
        """Return the weights that stay, and zeros; the shape is that of both arguments."""
        ctx.save_for_backward(weight, auxiliary)
        ctx.coarse = coarse
        return weight * (auxiliary > 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the derivatives for w and for m."""
        (gradient,) = gradients
        weight, auxiliary = ctx.saved_tensors
        for_auxiliary = gradient * weight.sign() * coarse_derivative(auxiliary, ctx.coarse)
        return gradient * (auxiliary > 0.0), for_auxiliary, None


def coarse_derivative(auxiliary: Tensor, coarse: str) -> Tensor:
    """Return what stands for the derivative of the step: that of softplus or of a leaky ReLU."""
    if coarse == "softplus":
        return torch.sigmoid(auxiliary)
    return torch.where(auxiliary > 0.0, 1.0, SLOPE)


def initial_auxiliary(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return m = |w| over the root mean square of its layer, so that all weights stay at first."""
    found = {}
    for name, weight in weights.items():
        size = weight.detach().abs()
        scale = size.square().mean().sqrt().clamp(min=torch.finfo(size.dtype).tiny)
        found[name] = (size / scale).requires_grad_()
    return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What AutoPrune did: its cost, and how many weights had been pruned at some time and stay in the end."""

    cost: Cost
    recovered: int


def autoprune(subject: Subject, method: AutoPrune) -> Outcome:
    """Prune and train a network in place; its weights that go are zero.

    Parameters
    ----------
    subject : Subject
        Weights are trained on its training images, auxiliary parameters on those held out.
    method : AutoPrune

    Returns
    -------
    Outcome
        Its cost counts the images held out as well.

    Notes
    -----
    Two passes forward and backward a step, and memory for two more copies of the weights.
    """
    began = time.process_time()
    network, (held_x, held_y) = subject.network, subject.held_out
    model = network.model
    partition = Partition.from_model(model, target=network.target, blocks="global")
    weights = partition.tensors(model)
    auxiliary = initial_auxiliary(weights)
    gone = {name: torch.zeros_like(m, dtype=torch.bool) for name, m in auxiliary.items()}
    generator = torch.Generator().manual_seed(method.seed)
    orders = (torch.randperm(len(held_x), generator=generator) for _ in itertools.count())
    indices = itertools.chain.from_iterable(torch.split(order, method.batch_size) for order in orders)
    spent = 0

    def loss(x: Tensor, y: Tensor) -> Tensor:
        gated = {name: Gate.apply(weights[name], m, method.coarse) for name, m in auxiliary.items()}
        return nn.functional.cross_entropy(torch.func.functional_call(model, gated, (x,)), y)

    def move_auxiliary(used: int, optimizer: torch.optim.SGD) -> None:
        nonlocal spent
        index = next(indices)
        spent += len(index)
        gradients = torch.autograd.grad(loss(held_x[index], held_y[index]), list(auxiliary.values()))
        with torch.no_grad():
            for (name, m), gradient in zip(auxiliary.items(), gradients, strict=True):
                m -= method.gate_rate * (gradient + method.price * coarse_derivative(m, method.coarse))
                gone[name] |= m <= 0.0

    training = Training(
        rate=method.rate, samples=method.samples, seed=method.seed, batch_size=method.batch_size
    )
    cost = descend(network, subject.data, training, loss=loss, before=move_auxiliary)
    keep = {name: m.detach() > 0.0 for name, m in auxiliary.items()}
    recovered = sum(int((keep[name] & gone[name]).sum()) for name in keep)
    cbs_opt.apply_masks(model, keep)
    more = train(
        network,
        subject.data,
        replace(training, samples=method.retraining, seed=method.seed + 1),
        one_shot(_sparsity(subject)),
    )
    seconds = time.process_time() - began
    return Outcome(
        cost=Cost(samples=cost.samples + spent + more.samples, seconds=seconds), recovered=recovered
    )


def _sparsity(subject: Subject) -> float:
    """Return the share of weights that are zero."""
    total, kept = weight_counts(subject.network)
    return 1.0 - kept / total


def cells(
    network: str,
    *,
    prices: Sequence[float],
    coarse: Sequence[str],
    times: Sequence[float],
    samples: int = SAMPLES,
    seeds: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield the settings of all cells; others than `autoprune` leave every number of times fewer weights.

    A third of `samples` are for the weights while the set changes, a third for m, and a third for what stays.
    """
    part = samples // 3
    for seed in range(seeds):
        for price, function in itertools.product(prices, coarse):
            method = AutoPrune(price=price, coarse=function, samples=part, retraining=part, seed=seed)
            yield {"network": network, "contender": "autoprune", "seed": seed, "method": asdict(method)}
        for fewer, contender in itertools.product(times, CONTENDERS[1:]):
            cell = {"network": network, "contender": contender, "seed": seed, "sparsity": 1.0 - 1.0 / fewer}
            if contender in RECIPES:
                yield {**cell, "version": __version__}
            else:
                training = Training(rate=RATE, samples=samples, seed=seed, batch_size=64)
                yield {**cell, "training": asdict(training)}


def measure(dense: Subject, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Prune a copy of a network as a cell says; returns accuracy in per cent, counts and cost."""
    subject = copied(dense)
    network, contender = subject.network, cell["contender"]
    says: dict[str, Any] = {}
    if contender == "autoprune":
        outcome = autoprune(subject, AutoPrune(**cell["method"]))
        cost, says = outcome.cost, {"recovered": outcome.recovered}
    elif contender in RECIPES:
        cost = _by_recipe(subject, contender, cell["sparsity"], cell["seed"])
    else:
        training, share = Training(**cell["training"]), cell["sparsity"]
        rule = gradual(share, training.samples) if contender == "gradual_sgd" else one_shot(share)
        cost = train(network, subject.data, training, rule)
    total, kept = weight_counts(network)
    return {
        **says,
        "accuracy": accuracy(network, subject.data),
        "dense_accuracy": dense.network.dense_accuracy,
        "held_out": [accuracy_on(each.network, *dense.held_out) for each in (dense, subject)],
        "n": total,
        "kept": kept,
        "kept_by_layer": layer_counts(subject),
        "samples": cost.samples,
        "processor_seconds": cost.seconds,
    }


def layer_counts(subject: Subject) -> dict[str, int]:
    """Return the number of weights that are not zero, by the name of the parameter."""
    network = subject.network
    weights = Partition.from_model(network.model, target=network.target).tensors(network.model)
    return {name: int(weight.count_nonzero()) for name, weight in weights.items()}


def _by_recipe(subject: Subject, recipe: str, sparsity: float, seed: int) -> Cost:
    began = time.process_time()
    network, data = subject.network, subject.data
    report = cbs_opt.prune(
        network.model,
        (data.train_x, data.train_y),
        sparsity=sparsity,
        recipe=Named(name=recipe, weights=Weights(target=network.target)),
        seed=seed,
        progress=False,
    )
    return Cost(samples=report.samples, seconds=time.process_time() - began)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = comparator_parser("autoprune", __doc__, SPECS)
    root.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    root.add_argument("--prices", nargs="*", type=float, default=PRICES, help=f"default {PRICES}")
    root.add_argument("--samples", type=int, default=SAMPLES, help=f"images in all, default {SAMPLES}")
    root.add_argument("--coarse", nargs="+", choices=COARSE, default=COARSE)
    root.add_argument(
        "--times", nargs="*", type=float, default=TIMES, help="times fewer weights, of the others"
    )
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    every = cells(
        given.network,
        prices=given.prices,
        coarse=given.coarse,
        times=given.times,
        samples=given.samples,
        seeds=given.seeds,
    )
    wanted = [cell for cell in every if cell["contender"] in given.contenders]

    return measure_cells(given.out / "autoprune.jsonl", wanted, on_dense(given, measure))


if __name__ == "__main__":
    sys.exit(main())
