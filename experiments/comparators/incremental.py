"""Incremental tasks by low-rank factors, on a network that `cbs_opt.prune` has pruned.

    python -m experiments.comparators.incremental
    python -m experiments.comparators.page incremental

Source: Hyder, Shao, Hou, Markopoulos, Prater-Bennette, Asif, "Incremental Task Learning with Incremental Rank
Updates", ECCV 2022. Budgets and initial values are ours.

Task 0 is the one that the network was trained and pruned for. Task t adds to every layer l a term of low rank
and a selector, a number for each term that there is:

    W_t,l = s_0 W_0,l + sum over tasks k <= t of s_k U_k,l V_k,l^T

U_t, V_t and the selector of t are trained on task t; W_0 and the terms of tasks before stay as they are, and
a selector is used for its own task alone. So what was learned is kept, bit for bit, as long as it is known
which task an image belongs to. Tasks are MNIST with its pixels in another order each.

Contenders
----------
- ``factors``: the above, for several ranks of the term of a task.
- ``retrained``: all weights that were kept are trained on one task after the other, which forgets.
- ``alone``: the weights that were kept are trained on each task from the pruned network, a copy a task.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt import __version__
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Weights
from cbs_opt.system.checks import whole_number
from experiments.comparators.running import Cell, comparator_parser, measure_cells
from experiments.comparators.subjects import Subject, accuracy, copied, on_dense, weight_counts
from experiments.datasets import Dataset
from experiments.networks import Network
from experiments.rivals_training import Training, descend, one_shot, train

CONTENDERS = ("factors", "retrained", "alone")
NETWORKS = ("mlpnet_mnist", "lenet5")
"""Without batch norm, whose statistics belong to a task and would be forgotten."""
TASKS = 10
RANKS = (1, 2, 5, 10)
SPARSITY = 0.9
EPOCHS = 1
RATE = 0.05
"""Learning rate of each task at first."""


class Factors(nn.Module):
    """Terms of low rank and selectors around a network, whose own parameters stay as they are.

    Parameters
    ----------
    model : nn.Module
        Its parameters are frozen.
    names : sequence of str
        Of the weights that get terms, (out, in) or, of convolutions, (out, in, height, width), which count as
        matrices (out, in * height * width).
    rank : int, default 1
        Of the term of a task.

    Notes
    -----
    Task t costs rank * (rows + columns) + t + 1 numbers a layer. Task 0 has no term.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rank: int = 1) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.names = tuple(names)
        self.rank = whole_number("rank", rank)
        self.task = 0
        self.left = nn.ParameterList()
        self.right = nn.ParameterList()
        self.selectors = nn.ParameterList()

    @property
    def tasks(self) -> int:
        """The number of tasks, the first one included."""
        return 1 + len(self.selectors) // len(self.names)

    def add_task(self, generator: torch.Generator) -> list[nn.Parameter]:
        """Add a task and use it; returns what is trained for it.

        At first its term is zero (V is) and its selector is that of the network as it was pruned: 1 for W_0
        and for its own term, 0 for those of other tasks.
        """
        self.requires_grad_(False)
        added = []
        for name in self.names:
            rows, columns = self.model.get_parameter(name).flatten(1).shape
            left = nn.Parameter(torch.randn(rows, self.rank, generator=generator) / rows**0.5)
            right = nn.Parameter(torch.zeros(columns, self.rank))
            selector = torch.zeros(self.tasks + 1)
            selector[[0, -1]] = 1.0
            added.append((left, right, nn.Parameter(selector)))
        for left, right, chosen in added:
            self.left.append(left)
            self.right.append(right)
            self.selectors.append(chosen)
        self.task = self.tasks - 1
        return [parameter for entry in added for parameter in entry]

    def weight(self, name: str, task: int) -> Tensor:
        """Return the weight of a layer for a task."""
        base = self.model.get_parameter(name)
        if task == 0:
            return base
        place, layers = self.names.index(name), len(self.names)
        selector = self.selectors[(task - 1) * layers + place]
        total = selector[0] * base
        for earlier in range(task):
            entry = earlier * layers + place
            term = self.left[entry] @ self.right[entry].T
            total = total + selector[earlier + 1] * term.view(base.shape)
        return total

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.weight(name, self.task) for name in self.names}
        logits: Tensor = torch.func.functional_call(self.model, weights, (x,))
        return logits


def permuted(data: Dataset, order: Tensor) -> Dataset:
    """Return the data with the pixels of all images in another order."""
    train_x, test_x = (x.flatten(1)[:, order].view(x.shape) for x in (data.train_x, data.test_x))
    return replace(data, train_x=train_x, test_x=test_x)


def orders(pixels: int, tasks: int, seed: int) -> list[Tensor]:
    """Return the orders of pixels of all tasks; that of the first is the usual one."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(pixels, generator=generator) if task else torch.arange(pixels) for task in range(tasks)
    ]


def forgetting(table: Sequence[Sequence[float]]) -> float:
    """Return the mean, over all tasks but the last, of the best accuracy that a task had less its last.

    ``table[t][k]`` is the accuracy of task k after task t was learned, k <= t.
    """
    last = table[-1]
    lost = [max(row[task] for row in table[task:]) - last[task] for task in range(len(table) - 1)]
    return sum(lost) / len(lost) if lost else 0.0


def learn(
    subject: Subject, contender: str, tasks: Sequence[Tensor], *, rank: int, training: Training
) -> dict[str, Any]:
    """Learn all tasks one after the other, in place; task 0 is known.

    Parameters
    ----------
    subject : Subject
        A pruned network, with the data of task 0.
    contender : {"factors", "retrained", "alone"}
    tasks : sequence of (pixels,) int64 Tensor
        Order of the pixels of each.
    rank : int
        Of the term of a task, for "factors".
    training : Training
        Of each task; task t has its seed plus t.

    Returns
    -------
    dict
        "table" of accuracies in per cent, see `forgetting`; "added", how many numbers were added for all
        tasks together; "samples" and "processor_seconds".
    """
    network, data, samples, seconds = subject.network, subject.data, 0, 0.0
    total, kept = weight_counts(network)
    names = list(Partition.from_model(network.model, target=network.target).tensors(network.model))
    start = copied(subject).network.model.state_dict()
    factors = Factors(network.model, names, rank) if contender == "factors" else None
    generator = torch.Generator().manual_seed(training.seed)
    table = [[_seen(network, factors, data, tasks[0], 0)]]
    for task, order in enumerate(tasks[1:], start=1):
        own = permuted(data, order)
        settings = replace(training, seed=training.seed + task)
        if factors is not None:
            factors.add_task(generator)
            cost = descend(replace(network, model=factors), own, settings)
        else:
            if contender == "alone":
                network.model.load_state_dict(start)
            cost = train(network, own, settings, one_shot(1.0 - kept / total))
        samples, seconds = samples + cost.samples, seconds + cost.seconds
        if contender == "alone":
            table.append([*table[-1], _seen(network, None, data, order, task)])
        else:
            table.append([_seen(network, factors, data, tasks[old], old) for old in range(task + 1)])
    added = 0 if factors is None else _size(factors) - _size(network.model)
    return {"table": table, "added": added, "samples": samples, "processor_seconds": seconds}


def _seen(network: Network, factors: Factors | None, data: Dataset, order: Tensor, task: int) -> float:
    """Return the accuracy of a task as it is known now, in per cent."""
    tested = permuted(replace(data, train_x=data.train_x[:0], train_y=data.train_y[:0]), order)
    if factors is None:
        return accuracy(network, tested)
    factors.task = task
    return accuracy(replace(network, model=factors), tested)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cells(
    network: str, *, contenders: Sequence[str], ranks: Sequence[int], tasks: int, seeds: int
) -> Iterator[dict[str, Any]]:
    """Yield the settings of all cells; those without factors have rank 0."""
    for seed, contender in itertools.product(range(seeds), contenders):
        for rank in ranks if contender == "factors" else (0,):
            yield {
                "network": network,
                "contender": contender,
                "rank": rank,
                "tasks": tasks,
                "sparsity": SPARSITY,
                "epochs": EPOCHS,
                "rate": RATE,
                "seed": seed,
                "version": __version__,
            }


def measure(dense: Subject, cell: Cell) -> dict[str, Any]:
    """Prune a copy of a network and teach it the tasks of a cell."""
    subject = copied(dense)
    network, data = subject.network, subject.data
    cbs_opt.prune(
        network.model,
        (data.train_x, data.train_y),
        sparsity=cell["sparsity"],
        recipe=Named(name="fast", weights=Weights(target=network.target)),
        seed=cell["seed"],
        progress=False,
    )
    pixels = data.train_x[0].numel()
    tasks = orders(pixels, cell["tasks"], cell["seed"])
    training = Training(
        rate=cell["rate"],
        samples=cell["epochs"] * len(data.train_x),
        seed=cell["seed"],
        weight_decay=0.0,
    )
    total, kept = weight_counts(network)
    says = learn(subject, cell["contender"], tasks, rank=cell["rank"], training=training)
    last = says["table"][-1]
    return {
        **says,
        "accuracy": sum(last) / len(last),
        "forgetting": forgetting(says["table"]),
        "dense_accuracy": dense.network.dense_accuracy,
        "n": total,
        "kept": kept,
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = comparator_parser("incremental", __doc__, NETWORKS)
    root.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    root.add_argument("--ranks", nargs="+", type=int, default=RANKS, help=f"default {RANKS}")
    root.add_argument("--tasks", type=int, default=TASKS, help=f"default {TASKS}")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)

    wanted = cells(
        given.network, contenders=given.contenders, ranks=given.ranks, tasks=given.tasks, seeds=given.seeds
    )
    return measure_cells(given.out / "incremental.jsonl", wanted, on_dense(given, measure))


if __name__ == "__main__":
    sys.exit(main())
