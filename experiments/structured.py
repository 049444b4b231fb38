"""Channels and neurons taken out of trained networks without retraining: accuracy and measured time.

    python -m experiments.structured --network mlpnet_mnist
    python -m experiments.structured --network resnet20_cifar10
    python -m experiments.structured --page

Contenders
----------
- ``ours``: `cbs_opt.prune_groups`. For a share of the operations, or of the milliseconds that
  `cbs_opt.measure_latency` finds, it chooses widths, and all others prune to these.
- ``ours_fitted``: the same without the Newton steps at the end.
- ``ours_proved``, for a share of every set of small networks: the same with an exact search of every set,
  which ends with its optimum proved or after ten minutes by the clock on the wall.
- ``reconstruction``: greedy least squares layer by layer, in the manner of Meng, Chen, Wang and Mazumder,
  "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization", ICML
  2024, written from the paper. In network order, on inputs of the network as pruned so far, the inputs go
  whose loss raises the squared error of the layer's outputs least, one after another, followed by
  exchanges. Where channels are coupled by additions, the errors of all layers that read them are added up.
  That is ``ours_fitted`` with ``metric="outputs"``, which ours tries as well.
- ``magnitude``: the filters of smallest norm go, all layers of a coupled set together (Li et al., "Pruning
  Filters for Efficient ConvNets", ICLR 2017); nothing else moves.
- ``magnitude_fitted``: the same filters, and the layers that read them fitted as ours are.
- ``..._even``: for a share of the operations, the same share of every set instead of the widths of ours, the
  largest that is within the budget.

Statistics of batch norm are estimated anew on training images where that lowers the loss on others, of all of
them alike; ``ours`` does so itself. Milliseconds are the median processor time of passes of one batch of 100
images on one core, dense and shrunk by turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cbs_opt
from cbs_opt import GroupRecipe, GroupReport, LatencyTable
from cbs_opt.network.data import iterate
from cbs_opt.network.evaluation import evaluate
from cbs_opt.structure.groups import MAKES, READS, BoolArray, GroupSet, Structure, groups, tensor_named
from cbs_opt.structure.pruning import BATCH, fitted_layers, refit
from cbs_opt.structure.removal import shrink
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.comparators.page import NOTHING, table
from experiments.comparators.running import Cell, measure_cells
from experiments.datasets import Dataset, load_dataset
from experiments.known import BESIDE, commits, keep_known, seeds, with_known
from experiments.networks import Network, load_network
from experiments.studies_page import between_marks
from formulations.files import write_atomically

EVEN = "_even"
PROVED = "ours_proved"
OURS = ("ours", "ours_fitted", PROVED)
RIVALS = ("reconstruction", "magnitude_fitted", "magnitude")
CONTENDERS = (*OURS, *RIVALS)
BUDGETS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "mlpnet_mnist": (("keep", 0.5), ("keep", 0.25)),
    "resnet20_cifar10": (("flops", 0.5), ("milliseconds", 0.7), ("milliseconds", 0.66), ("flops", 0.33)),
}
"""What is kept: a share of the groups of every set, of the operations, or of the milliseconds."""
DEFAULT = GroupRecipe()
"""Whose images and steps all contenders have, where the command line says nothing."""
EXACT_SECONDS = 600.0
STATISTICS, JUDGED = 1024, 512
"""Training images that batch norm is estimated on, and that say whether it gains by that."""
TIMED = 100
"""Images of the batch that is timed."""
PASSES = 15
WHAT = {"keep": "every set of groups", "flops": "the operations", "milliseconds": "the milliseconds"}
OUT = Path("runs/structured")
PAGE = BESIDE / "structure.md"
KNOWN = "structured.jsonl"
"""The results behind the page, beside it."""
LABELS = {
    "ours": "ours",
    "ours_fitted": "ours, without the steps",
    PROVED: "ours, without the steps, proved",
    "reconstruction": "greedy reconstruction",
    "magnitude_fitted": "magnitude, fitted",
    "magnitude": "magnitude",
}


def even_keep(structure: Structure, share: float) -> float:
    """Return the largest share of every set, in 64ths, with at most a share of the operations.

    Raises `ArgumentError` of `Structure.checked` if not even the smallest one is a network.
    """
    for step in range(64, 0, -1):
        masks = {name: np.arange(size) < count for name, size, count in _counts(structure, step / 64)}
        if structure.flops_of(structure.checked(masks)) <= share * structure.flops:
            return step / 64
    return 1 / 64


def _counts(structure: Structure, share: float) -> list[tuple[str, int, int]]:
    """Return name, groups and groups kept of every set, as `prune_groups` rounds them."""
    return [(part.name, part.n_groups, max(1, round(share * part.n_groups))) for part in structure.sets]


def magnitude_masks(
    model: nn.Module, sets: Sequence[GroupSet], counts: Mapping[str, int]
) -> dict[str, BoolArray]:
    """Return which groups are kept by the norm of the weights that make them, of equals the first ones."""
    masks = {}
    for part in sets:
        norms = np.zeros(part.n_groups)
        for member in part.members:
            if member.role == MAKES:
                rows = tensor_named(model, member.name).detach().movedim(member.axis, 0).flatten(1)
                norms += rows.double().square().sum(1).cpu().numpy()[member.index].sum(1)
        masks[part.name] = _largest(norms, counts[part.name])
    return masks


def _largest(values: NDArray[np.float64], count: int) -> BoolArray:
    keep = np.zeros(values.size, dtype=np.bool_)
    keep[np.argsort(-values, kind="stable")[:count]] = True
    return keep


def estimate_statistics(model: nn.Module, images: Tensor) -> None:
    """Estimate the statistics of batch norm anew, as plain means over batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    with torch.no_grad():
        for part in images.split(BATCH) if norms else ():
            model(part)
    for module, momentum in zip(norms, before, strict=True):
        module.momentum = momentum
        module.eval()


def milliseconds(models: Sequence[nn.Module], images: Tensor, passes: int = PASSES) -> list[float]:
    """Return the median processor time of a pass for each network, which take turns; one core."""
    seconds = np.zeros((passes, len(models)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for model in models:
                model(images)
            for turn, number in np.ndindex(seconds.shape):
                start = time.process_time()
                models[number](images)
                seconds[turn, number] = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    found: list[float] = (1e3 * np.median(seconds, axis=0)).tolist()
    return found


def settled(model: nn.Module, data: Dataset, order: Tensor) -> nn.Module:
    """Return the network, or one with statistics of the first images in `order`, by the loss on the last."""
    aside = order[-JUDGED:]
    anew = deepcopy(model)
    estimate_statistics(anew, data.train_x[order[:STATISTICS]])
    losses = [
        evaluate(network, (data.train_x[aside], data.train_y[aside]), nn.functional.cross_entropy).loss
        for network in (model, anew)
    ]
    return anew if losses[1] < losses[0] else model


@dataclass(kw_only=True)
class Bench:
    """A network with its data, on which cells are measured; what `ours` chose is kept for the others."""

    network: Network
    data: Dataset
    table: Path | None = None
    chosen: dict[tuple[Any, ...], tuple[nn.Module, GroupReport]] = field(default_factory=dict)

    @cached_property
    def latency(self) -> LatencyTable:
        """Milliseconds of layers at all widths in eighths, kept in the file `table` if there is one."""
        return cbs_opt.measure_latency(self.network.model, self.data.test_x[:TIMED], cache=self.table)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return what a contender made of the network."""
        model, data = self.network.model, self.data
        self._budget(cell)  # Before the clock starts: a table of milliseconds takes its time.
        counts = {} if cell["contender"] in OURS else self._counts(cell)
        start = time.process_time()
        small = self._small(cell, counts)
        seconds = time.process_time() - start
        proofs = self._ours(cell, PROVED)[1].choices if cell["contender"] == PROVED else {}
        generator = torch.Generator().manual_seed(cell["seed"])
        if cell["contender"] != "ours":
            small = settled(small, data, torch.randperm(len(data.train_x), generator=generator))
        example = data.train_x[:2]
        before, after = groups(model, example), groups(small, example)
        dense, shrunk = milliseconds((model, small), data.test_x[:TIMED])
        found = evaluate(small, (data.test_x, data.test_y), nn.functional.cross_entropy)
        return {
            "accuracy": 100.0 * (found.accuracy or 0.0),
            "loss": found.loss,
            "dense_accuracy": self.network.dense_accuracy,
            "parameters": [before.parameters, after.parameters],
            "flops": [before.flops, after.flops],
            "milliseconds": [dense, shrunk],
            "processor_seconds": seconds,
            "proofs": [[name, *astuple(choice)] for name, choice in proofs.items()],
        }

    def _counts(self, cell: Cell) -> dict[str, int]:
        """Return how many groups of each set a rival keeps: as many as ours, or the same share of all."""
        if cell["contender"].endswith(EVEN):
            structure = groups(self.network.model, self.data.train_x[:2])
            return {name: count for name, _, count in _counts(structure, even_keep(structure, cell["share"]))}
        made = next((name for name in OURS if self._key(cell, name) in self.chosen), "ours_fitted")
        return {name: choice.n_keep for name, choice in self._ours(cell, made)[1].choices.items()}

    def _small(self, cell: Cell, counts: Mapping[str, int]) -> nn.Module:
        """Return the smaller network of a contender; `counts` is what a rival keeps of each set."""
        model, contender = self.network.model, cell["contender"]
        recipe = GroupRecipe(samples=cell["samples"], steps=0)
        pair = self.data.train_x, self.data.train_y
        if contender in OURS:
            return deepcopy(self._ours(cell, contender)[0])
        batches = list(iterate(pair, batch_size=BATCH, max_samples=recipe.samples, seed=cell["seed"]))
        example = batches[0].take(slice(2)).inputs
        structure = groups(model, example)
        sets = [part for part in structure.sets if part.name in counts]
        if contender.startswith("reconstruction"):
            keep = {part.name: counts[part.name] / part.n_groups for part in sets}
            recipe = replace(recipe, metric="outputs")
            return cbs_opt.prune_groups(model, pair, keep=keep, recipe=recipe, seed=cell["seed"])[0]
        masks, work = magnitude_masks(model, sets, counts), deepcopy(model)
        if contender.removesuffix(EVEN) != "magnitude":
            blank(work, sets, masks)
            refit(model, work, fitted_layers(model, structure, ()), batches, recipe.damping)
        return shrink(work, example, keep=masks)[0]

    def _budget(self, cell: Cell) -> dict[str, Any]:
        if cell["budget"] == "milliseconds":
            return {"milliseconds": cell["share"] * self.latency.total, "latency": self.latency}
        return {cell["budget"]: cell["share"]}

    def _key(self, cell: Cell, contender: str) -> tuple[Any, ...]:
        return (contender, *(cell[name] for name in ("budget", "share", "samples", "seed")))

    def _ours(self, cell: Cell, contender: str) -> tuple[nn.Module, GroupReport]:
        key = self._key(cell, contender)
        if key not in self.chosen:
            steps, seen = cell["steps"] if contender == "ours" else (0, 2)
            exact = EXACT_SECONDS if contender == PROVED else 0.0
            recipe = GroupRecipe(samples=cell["samples"], steps=steps, step_samples=seen, exact_seconds=exact)
            self.chosen[key] = cbs_opt.prune_groups(
                self.network.model,
                (self.data.train_x, self.data.train_y),
                recipe=recipe,
                seed=cell["seed"],
                **self._budget(cell),
            )
        return self.chosen[key]


def blank(work: nn.Module, sets: Sequence[GroupSet], masks: Mapping[str, BoolArray]) -> None:
    """Zero the weights that read groups which go."""
    with torch.no_grad():
        for part in sets:
            for member in part.members:
                if member.role == READS:
                    index = torch.from_numpy(member.index[~masks[part.name]].reshape(-1))
                    work.get_parameter(member.name).movedim(member.axis, 0)[index] = 0.0


def cells(network: str, *, samples: int | None = None, seeds: int = 1) -> list[Cell]:
    """Return the cells of a network."""
    found = []
    for budget, share in BUDGETS[network]:
        names = [name for name in CONTENDERS if name != PROVED or budget == "keep"]
        if budget == "flops":
            names += [name + EVEN for name in RIVALS]
        found += [
            {
                "network": network,
                "budget": budget,
                "share": share,
                "contender": name,
                "samples": DEFAULT.samples if samples is None else samples,
                "steps": [DEFAULT.steps, DEFAULT.step_samples],
                "seed": seed,
                "version": 4,
            }
            for seed in range(seeds)
            for name in names
        ]
    return found


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for every network and budget that was measured."""
    parts = []
    keys = dict.fromkeys((entry["network"], entry["budget"], entry["share"]) for entry in results)
    for network, budget, share in keys:
        own = [
            entry
            for entry in results
            if (entry["network"], entry["budget"], entry["share"]) == (network, budget, share)
        ]
        samples = ", ".join(str(count) for count in sorted({entry["samples"] for entry in own}))
        count = seeds(own)
        facts = f"Dense {own[0]['dense_accuracy']:.2f} %; {samples} training images; {count} seed"
        parts.append(f"## {network}, {share:g} of {WHAT[budget]}")
        parts.append(f"{facts}{'s' if count > 1 else ''}; commit {commits(own)}.")
        parts.append(table(TITLES, [_line(name, own) for name in _names(own)]))
        parts += _proofs(own)
    return "\n\n".join(parts) or NOTHING


TITLES = (
    "",
    "accuracy",
    "loss",
    "parameters",
    "operations",
    "ms dense",
    "ms shrunk",
    "times faster",
    "seconds",
)


def _proofs(own: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a sentence on the proved optimum of every set, for the first seed that has one."""
    entry = next((entry for entry in own if entry["proofs"]), None)
    if entry is None:
        return []
    told = [
        f"{name}, {n_keep} of {n} kept: loss {loss:.6g}, no set below {bound:.6g}"
        for name, n_keep, n, loss, bound in entry["proofs"]
    ]
    return [f"Exact search, of seed {entry['seed']} alone, as its row: {'; '.join(told)}."]


def _names(own: Sequence[Mapping[str, Any]]) -> list[str]:
    every = [*CONTENDERS, *(name + EVEN for name in RIVALS)]
    return [name for name in every if any(entry["contender"] == name for entry in own)]


def _line(name: str, own: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [entry for entry in own if entry["contender"] == name]

    def mean(of: Callable[[Mapping[str, Any]], float]) -> float:
        return float(np.mean([of(row) for row in rows]))

    dense, shrunk = (mean(lambda row, place=place: row["milliseconds"][place]) for place in (0, 1))
    return [
        LABELS[name.removesuffix(EVEN)] + (", equal shares" if name.endswith(EVEN) else ""),
        f"{mean(lambda row: row['accuracy']):.2f}",
        f"{mean(lambda row: row['loss']):.4f}",
        f"{mean(lambda row: row['parameters'][1] / row['parameters'][0]):.3f}",
        f"{mean(lambda row: row['flops'][1] / row['flops'][0]):.3f}",
        f"{dense:.2f}",
        f"{shrunk:.2f}",
        f"{dense / shrunk:.2f}",
        f"{mean(lambda row: row['processor_seconds']):.0f}",
    ]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("structured", __doc__)
    root.add_argument("--network", choices=list(BUDGETS), default="mlpnet_mnist", help="default mlpnet_mnist")
    root.add_argument("--samples", type=int, help="training images; by default so many as the network has")
    root.add_argument("--contenders", nargs="+", help="some of them; by default all")
    root.add_argument("--shares", nargs="+", type=float, help="some of the shares; by default all")
    root.add_argument("--page", action="store_true", help=f"write tables into {PAGE}, and stop")
    add_run_options(root, seeds=1, out=OUT)
    add_no_verify(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    path = given.out / "structured.jsonl"
    if given.page:
        known = PAGE.with_name(KNOWN)
        results = with_known(known, path)
        if not results:
            sys.stderr.write(f"--out: no file {path}; python -m experiments.structured makes it\n")
            return 1
        page = between_marks(PAGE.read_text(encoding="utf-8"), "structured", section(results))
        keep_known(known, results)
        write_atomically(PAGE, page.encode())
        return 0

    def bench() -> Callable[[Cell], dict[str, Any]]:
        verify = not given.no_verify
        network = load_network(given.network, given.data, verify=verify)
        data = load_dataset(network.dataset, given.data, mean=network.mean, std=network.std, verify=verify)
        given.out.mkdir(parents=True, exist_ok=True)
        return Bench(network=network, data=data, table=given.out / f"{given.network}_latency.json").measure

    every = cells(given.network, samples=given.samples, seeds=given.seeds)
    wanted = [
        cell
        for cell in every
        if (given.contenders is None or cell["contender"] in given.contenders)
        and (given.shares is None or cell["share"] in given.shares)
    ]
    return measure_cells(path, wanted, bench)


if __name__ == "__main__":
    sys.exit(main())
