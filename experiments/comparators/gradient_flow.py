"""Importance measures of gradient flow: pruning by each of four at several moments of training.

    python -m experiments.comparators.gradient_flow
    python -m experiments.comparators.page gradient_flow

Sources: Lubana and Dick, "A Gradient Flow Framework For Analyzing Network Pruning",
ICLR 2021; signed GraSP: Wang, Zhang, Grosse, "Picking Winning Tickets Before Training by Preserving Gradient
Flow", ICLR 2020. Under gradient flow, dw/dt = -g, the measures belong to the norm of the weights and to its
first and second derivative in time.

- magnitude: |w|;
- loss preservation: |w g|, by how much the loss changes to first order;
- gradient norm: |w (H g)|, by how much the squared norm of the gradient changes to first order;
- signed GraSP: w (H g), so that weights whose removal raises the norm of the gradient go first.

g and H g are those of the mean loss over `MEASURED_ON` training images, H g by a second derivative.

A network is trained, pruned once at a moment of its training, and trained on with the set fixed; momentum and
the learning rate go on as if nothing had happened.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt.budget.counts import allocate
from cbs_opt.network.partition import Partition
from cbs_opt.select.saliency import without_lowest
from experiments.comparators.running import Cell, comparator_parser, measure_cells
from experiments.comparators.subjects import SPECS, Subject, accuracy, fresh, split, weight_counts
from experiments.datasets import load_dataset
from experiments.networks import Network
from experiments.rivals_training import Training, descend

RATE = 0.05
"""Learning rate at first."""
MEASURES = ("magnitude", "loss", "gradient_norm", "grasp")
MEASURED_ON = 1_024
"""Training images, the first ones."""
NETWORKS = ("mlpnet_mnist", "lenet5", "resnet20_cifar10")
EPOCHS = 3
MOMENTS = (0.0, 0.1, 0.5, 1.0, 2.0)
"""In epochs."""
SPARSITIES = (0.9, 0.98)


def flow(
    model: nn.Module, names: Sequence[str], x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return g and H g of the mean cross-entropy, each by the name of a parameter.

    Other parameters are held fixed: g and H are those of the parameters that are named. The network is run in
    the mode it is in. Costs two passes forward and backward, and memory for the graph of the first.
    """
    parameters = [model.get_parameter(name) for name in names]
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    half = 0.5 * torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    products = torch.autograd.grad(half, parameters)
    plain = [gradient.detach() for gradient in gradients]
    return dict(zip(names, plain, strict=True)), dict(zip(names, products, strict=True))


def importance(measure: str, weight: Tensor, gradient: Tensor, product: Tensor) -> Tensor:
    """Return the importance of each weight, given its w, g and H g; the lowest go."""
    if measure == "magnitude":
        return weight.abs()
    if measure == "loss":
        return (weight * gradient).abs()
    signed = weight * product
    return signed.abs() if measure == "gradient_norm" else signed


def chosen(network: Network, measure: str, sparsity: float, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Return masks (True = kept) without the least important weights of the network, to an exact count."""
    partition = Partition.from_model(network.model, target=network.target, blocks="global")
    weights = partition.tensors(network.model)
    gradients, products = flow(network.model, list(weights), x, y)
    scores = [
        importance(measure, weight.detach(), gradients[name], products[name]).flatten()
        for name, weight in weights.items()
    ]
    (count,) = allocate(partition, sparsity)
    return partition.keep_by_parameter(without_lowest(torch.cat(scores), count))


def losses(network: Network, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the mean loss, and the norm of its gradient for the weights that may go and are not zero."""
    model = network.model
    weights = Partition.from_model(model, target=network.target).tensors(model)
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(weights.values()))
    parts = [g[w.detach() != 0.0].norm() for w, g in zip(weights.values(), gradients, strict=True)]
    return float(loss.detach()), float(torch.stack(parts).norm())


def run(subject: Subject, measure: str, sparsity: float, moment: float, training: Training) -> dict[str, Any]:
    """Train a network in place and prune it after `moment` epochs; returns what is seen on the way.

    Returns
    -------
    dict
        "loss_before" and "loss_after" pruning, "norm_before" and "norm_after" of the gradient on the images
        measured on; "kept_by_layer", "accuracy_soon" in per cent, an epoch after pruning or at the end;
        "samples", and "processor_seconds" of training and measuring.
    """
    network, data = subject.network, subject.data
    epoch = len(data.train_x)
    x, y = data.train_x[:MEASURED_ON], data.train_y[:MEASURED_ON]
    says: dict[str, Any] = {}

    def before(used: int, optimizer: torch.optim.SGD) -> None:
        due = "loss_before" not in says and used >= moment * epoch
        soon = "accuracy_soon" not in says and used >= (moment + 1.0) * epoch
        if not due and not soon:
            return
        model = network.model.eval()
        if due:
            says["loss_before"], says["norm_before"] = losses(network, x, y)
            masks = chosen(network, measure, sparsity, x, y)
            cbs_opt.masked(optimizer, masks, model)
            says["loss_after"], says["norm_after"] = losses(network, x, y)
            says["kept_by_layer"] = {name: int(keep.sum()) for name, keep in masks.items()}
        if soon:
            says["accuracy_soon"] = accuracy(network, data)
        model.train()

    cost = descend(network, data, training, before=before)
    says.setdefault("accuracy_soon", accuracy(network, data))
    return {**says, "samples": cost.samples, "processor_seconds": cost.seconds}


def cells(
    network: str, *, sparsities: Sequence[float], moments: Sequence[float], seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield the settings of all cells."""
    for seed, share, moment, measure in itertools.product(range(seeds), sparsities, moments, MEASURES):
        yield {
            "network": network,
            "contender": measure,
            "sparsity": share,
            "moment": moment,
            "seed": seed,
            "epochs": EPOCHS,
            "rate": RATE,
            "measured_on": MEASURED_ON,
        }


def measure_cell(subject: Subject, cell: Cell) -> dict[str, Any]:
    """Train a fresh network as a cell says; returns accuracy in per cent and what was seen on the way."""
    own = replace(subject, network=fresh(cell["network"], cell["seed"]))
    training = Training(
        rate=cell["rate"], samples=round(cell["epochs"] * len(own.data.train_x)), seed=cell["seed"]
    )
    says = run(own, cell["contender"], cell["sparsity"], cell["moment"], training)
    total, kept = weight_counts(own.network)
    return {**says, "accuracy": accuracy(own.network, own.data), "n": total, "kept": kept}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = comparator_parser("gradient_flow", __doc__, NETWORKS)
    root.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES, help=f"default {SPARSITIES}")
    root.add_argument(
        "--moments", nargs="+", type=float, default=MOMENTS, help=f"in epochs, default {MOMENTS}"
    )
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    spec = SPECS[given.network]

    def bench() -> Callable[[Cell], dict[str, Any]]:
        whole = load_dataset(
            spec.dataset, given.data, mean=spec.mean, std=spec.std, verify=not given.no_verify
        )
        data, held_out = split(whole)
        subject = Subject(network=fresh(given.network, 0), data=data, held_out=held_out)
        return lambda cell: measure_cell(subject, cell)

    wanted = cells(given.network, sparsities=given.sparsity, moments=given.moments, seeds=given.seeds)
    return measure_cells(given.out / "gradient_flow.jsonl", wanted, bench)


if __name__ == "__main__":
    sys.exit(main())
