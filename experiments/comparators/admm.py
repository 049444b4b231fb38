"""ADMM: structured pruning, then weights on levels, by the alternating direction method of multipliers.

    python -m experiments.comparators.admm
    python -m experiments.comparators.page admm

Sources: Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating
Direction Method of Multipliers", ECCV 2018; Ma et al., "ResNet Can Be Pruned 60x: Introducing Network
Purification and Unused Path Removal (P-RM) after Weight Pruning", 2019.

The loss f(W) is to be minimised over weights in a set S. With Z in S and scaled multipliers U:

- W follows the gradient of f(W) + rho/2 ||W - Z + U||^2, by SGD;
- Z becomes the point of S nearest to W + U, and U becomes U + W - Z, every so many images; rho grows.

Stages
------
1. S has at most k rows (filters, neurons) of each layer that are not zero. Then rows go, with their biases,
   and the others are retrained.
2. *Network purification*: in each layer the smallest rows go for as long as the loss on images held out
   does not rise by more than a tolerance. *Unused paths*: units that nothing reads or that are always zero.
3. S has weights on the levels -L q, ..., -q, 0, q, ..., L q with L = 2^(bits - 1) - 1 and a step q, one for
   each layer, of least squared distance. Then weights are put on their levels.

Biases and batch norm stay in full precision. Weights count once the units that go are removed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.system.checks import check_fields, finite_number, whole_number
from experiments.comparators.running import comparator_parser, measure_cells
from experiments.comparators.subjects import Subject, accuracy, copied, on_dense
from experiments.comparators.units import (
    CHAINS,
    Kept,
    Units,
    all_kept,
    count_kept,
    remaining,
    rows,
    unit_masks,
    unused_removed,
)
from experiments.rivals_training import Training, descend

LEAST_STEP = 0.3
"""Of the step that puts the largest weight on the last level: the smallest that is tried."""
STEPS = 60
"""How many steps between levels are tried."""

SHARES = (0.35, 0.2, 0.1)
"""Of the rows of each layer, where the command line says nothing."""
SAMPLES = 275_000
"""Images differentiated in all, where the command line says nothing."""

Projection = Callable[[str, Tensor], Tensor]
"""Of the name of a weight and a tensor in its shape, the nearest point of a set."""


@dataclass(frozen=True, kw_only=True)
class Admm:
    """How a network is pruned and quantised.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    share : float
        Of the rows of each layer with hidden units, how many stay; rounded up.
    bits : int, default 8
        Of a weight.
    rate : float, default 0.01
        Learning rate of each stage at first; it falls like half a cosine.
    rho : float, default 0.01
        At first. It has to have grown before the learning rate has fallen: from .001 on, W stayed far from Z.
    growth : float, default 1.5
        Of rho with every update of Z, at most up to `most_rho`.
    most_rho : float, default 0.3
    samples : int, default 110_000
        Images for the penalty of stage 1.
    retraining : int, default 110_000
        Images after rows went.
    quantising : int, default 55_000
        Images for the penalty of stage 3.
    updates : int, default 15
        How often Z is updated in each of those.
    tolerance : float, default 1e-3
        By how much the loss on images held out may rise in purification of a layer.
    judges : int, default 5_000
        How many of these, at most, purification looks at.
    seed : int, default 0
    batch_size : int, default 64
    """

    share: float
    bits: int = 8
    rate: float = 0.01
    rho: float = 0.01
    growth: float = 1.5
    most_rho: float = 0.3
    samples: int = 110_000
    retraining: int = 110_000
    quantising: int = 55_000
    updates: int = 15
    tolerance: float = 1e-3
    judges: int = 5_000
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, "method.", finite_number, "share", most=1.0, above=True)
        check_fields(self, "method.", finite_number, "rate", "rho", "most_rho", "tolerance")
        check_fields(self, "method.", finite_number, "growth", least=1.0)
        check_fields(self, "method.", whole_number, "bits", least=2)
        counts = ("samples", "retraining", "quantising", "updates", "judges", "batch_size")
        check_fields(self, "method.", whole_number, *counts)
        check_fields(self, "method.", whole_number, "seed", least=0)

    def training(self, samples: int) -> Training:
        """Return how weights are trained on so many images; without weight decay, which the penalty is."""
        return Training(
            rate=self.rate, samples=samples, seed=self.seed, batch_size=self.batch_size, weight_decay=0.0
        )


def largest_rows(values: Tensor, count: int) -> Tensor:
    """Return `values` with all rows zero but the `count` of largest norm: the nearest such tensor."""
    return values * _largest(values, count).view(-1, *[1] * (values.ndim - 1))


def best_step(values: Tensor, bits: int) -> float:
    """Return the step between levels, among `STEPS`, from which values have the least squared distance."""
    largest = float(values.abs().max()) / _last_level(bits)
    if not largest > 0.0:
        return 1.0
    tried = [largest * (LEAST_STEP + (1.0 - LEAST_STEP) * k / (STEPS - 1)) for k in range(STEPS)]
    return min(tried, key=lambda step: float((values - on_levels(values, step, bits)).square().sum()))


def on_levels(values: Tensor, step: float, bits: int) -> Tensor:
    """Return the nearest of the levels ``step * l``, |l| < 2^(bits - 1) whole, for each value; zero stays."""
    last = _last_level(bits)
    return step * torch.round(values / step).clamp(-last, last)


def _last_level(bits: int) -> int:
    last: int = 2 ** (bits - 1) - 1
    return last


def _largest(values: Tensor, count: int) -> Tensor:
    """Return which rows are the `count` of largest norm, of equals the first ones."""
    order = values.flatten(1).norm(dim=1).argsort(descending=True, stable=True)
    keep = torch.zeros(len(values), dtype=torch.bool)
    keep[order[:count]] = True
    return keep


class Splitting:
    """The variables Z and U of weights W, with the penalty that ties them.

    Parameters
    ----------
    weights : mapping of str to Tensor
        W, by name.
    project : callable
        Onto the set S.
    method : Admm
    """

    def __init__(self, weights: Mapping[str, Tensor], project: Projection, method: Admm) -> None:
        self.weights, self.project, self.method = weights, project, method
        self.rho = method.rho
        self.nearest = {name: project(name, weight.detach()) for name, weight in weights.items()}
        self.multipliers = {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def penalty(self) -> Tensor:
        """Return rho/2 ||W - Z + U||^2 over all weights."""
        total = torch.zeros(())
        for name, weight in self.weights.items():
            total = total + (weight - self.nearest[name] + self.multipliers[name]).square().sum()
        return 0.5 * self.rho * total

    def update(self) -> None:
        """Project W + U, let U ascend, and let rho grow; U is scaled so that rho U stays what it is."""
        grown = max(self.rho, min(self.rho * self.method.growth, self.method.most_rho))
        with torch.no_grad():
            for name, weight in self.weights.items():
                moved = weight + self.multipliers[name]
                self.nearest[name] = self.project(name, moved)
                self.multipliers[name] = (moved - self.nearest[name]) * (self.rho / grown)
        self.rho = grown

    def distance(self) -> float:
        """Return ||W - Z|| / ||W||."""
        apart = sum(
            float((w.detach() - self.nearest[name]).square().sum()) for name, w in self.weights.items()
        )
        size = sum(float(w.detach().square().sum()) for w in self.weights.values())
        return float((apart / size) ** 0.5) if size > 0.0 else 0.0


def split_descent(
    subject: Subject, splitting: Splitting, samples: int, masks: Mapping[str, Tensor] | None = None
) -> int:
    """Train with the penalty and update Z at even distances; returns the number of images."""
    model = subject.network.model
    method = splitting.method
    due = [round(samples * (number + 1) / (method.updates + 1)) for number in range(method.updates)]

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), y) + splitting.penalty()

    def before(used: int, optimizer: torch.optim.SGD) -> None:
        if not used and masks:
            cbs_opt.masked(optimizer, masks, model)
        while due and due[0] <= used:
            due.pop(0)
            splitting.update()

    return descend(subject.network, subject.data, method.training(samples), loss=loss, before=before).samples


def retrain(subject: Subject, method: Admm, masks: Mapping[str, Tensor]) -> int:
    """Train with pruned weights held at zero; returns the number of images."""
    model = subject.network.model

    def before(used: int, optimizer: torch.optim.SGD) -> None:
        if not used:
            cbs_opt.masked(optimizer, masks, model)

    training = replace(method.training(method.retraining), seed=method.seed + 1)
    return descend(subject.network, subject.data, training, before=before).samples


def purified(
    subject: Subject, chain: Sequence[Units], kept: Kept, tolerance: float, judges: int | None = None
) -> Kept:
    """Let the smallest rows go for as long as the loss does not miss them; returns the units that stay.

    Layer by layer, the largest number of smallest rows is looked for by halving, such that the loss on the
    first `judges` images held out (by default on all) rises by no more than `tolerance`. One row of each
    layer stays. What goes is zero then.
    """
    network = subject.network
    x, y = (entry[:judges] for entry in subject.held_out)
    found = {name: keep.clone() for name, keep in kept.items()}
    start = {name: value.clone() for name, value in network.model.state_dict().items()}

    def loss_with(trial: Kept) -> float:
        network.model.load_state_dict(start)
        cbs_opt.apply_masks(network.model, unit_masks(network.model, chain, trial))
        return evaluate(network.model, (x, y), nn.functional.cross_entropy).loss

    for name, norms in list(rows(network.model, chain)):
        order = [unit for unit in norms.argsort(stable=True).tolist() if found[name][unit]]
        limit = loss_with(found) + tolerance
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            fits = loss_with(_without(found, name, order[:middle])) <= limit
            low, high = (middle, high) if fits else (low, middle)
        found = _without(found, name, order[:low])
    loss_with(found)
    return found


def _without(kept: Kept, name: str, units: Sequence[int]) -> Kept:
    """Return which units stay once those of one layer go as well."""
    keep = kept[name].clone()
    keep[list(units)] = False
    return {**kept, name: keep}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a network was after a stage: weights left, bits of each, test accuracy in per cent."""

    name: str
    weights: int
    bits: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done to a network.

    Attributes
    ----------
    stages : tuple of Stage
    kept : dict of str to (units,) Tensor
        The units that are left.
    distances : (float, float)
        ||W - Z|| / ||W|| before rows go, and before weights are put on levels.
    steps : mapping of str to float
        Between the levels of each weight.
    samples : int
        Images differentiated.
    seconds : float
        Of the processor.
    """

    stages: tuple[Stage, ...]
    kept: Kept
    distances: tuple[float, float]
    steps: Mapping[str, float]
    samples: int
    seconds: float


def admm(subject: Subject, chain: Sequence[Units], method: Admm) -> Outcome:
    """Prune and quantise a network in place.

    Parameters
    ----------
    subject : Subject
        Weights are trained on its training images; purification looks at those held out.
    chain : sequence of Units
        Its hidden units.
    method : Admm

    Returns
    -------
    Outcome
        The network has zeros where units went; `kept` says which ones stay.
    """
    began = time.process_time()
    network = subject.network
    model = network.model
    weights = Partition.from_model(model, target=network.target).tensors(model)
    stages: list[Stage] = []

    def note(name: str, kept: Kept, bits: int = 32) -> None:
        left = remaining(model, chain, kept, list(weights))
        stages.append(Stage(name=name, weights=left, bits=bits, accuracy=accuracy(network, subject.data)))

    kept = all_kept(model, chain)
    note("dense", kept)
    counts = {name: count_kept(len(keep), method.share) for name, keep in kept.items()}
    makers = {name: weights[name] for name in counts}
    pruning = Splitting(makers, lambda name, values: largest_rows(values, counts[name]), method)
    samples = split_descent(subject, pruning, method.samples)
    distance = pruning.distance()
    kept = {name: _largest(weight.detach(), counts[name]) for name, weight in makers.items()}
    masks = unit_masks(model, chain, kept)
    cbs_opt.apply_masks(model, masks)
    note("rows removed", kept)
    samples += retrain(subject, method, masks)
    note("retrained", kept)
    kept = purified(subject, chain, kept, method.tolerance, method.judges)
    note("purified", kept)
    kept = unused_removed(model, chain, kept)
    masks = unit_masks(model, chain, kept)
    cbs_opt.apply_masks(model, masks)
    note("unused paths removed", kept)
    quantising = Splitting(
        weights, lambda _, values: on_levels(values, best_step(values, method.bits), method.bits), method
    )
    samples += split_descent(subject, quantising, method.quantising, masks)
    distances = (distance, quantising.distance())
    steps = {name: best_step(weight.detach(), method.bits) for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(on_levels(weight, steps[name], method.bits))
    note("on levels", kept, method.bits)
    return Outcome(
        stages=tuple(stages),
        kept=kept,
        distances=distances,
        steps=steps,
        samples=samples,
        seconds=time.process_time() - began,
    )


def cells(
    network: str,
    *,
    shares: Sequence[float],
    bits: Sequence[int],
    samples: int = SAMPLES,
    judges: int = Admm.judges,
    seeds: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield the settings of all cells; two fifths of `samples` go to stage 1, as many to retraining."""
    part = 2 * samples // 5
    images = {"samples": part, "retraining": part, "quantising": samples // 5, "judges": judges}
    for seed in range(seeds):
        for share in shares:
            for number in bits:
                method = Admm(share=share, bits=number, seed=seed, **images)
                yield {"network": network, "contender": "admm", "seed": seed, "method": asdict(method)}


def measure(dense: Subject, cell: Mapping[str, Any]) -> dict[str, Any]:
    """Prune and quantise a copy of a network as a cell says; returns its stages, counts and cost."""
    outcome = admm(copied(dense), CHAINS[cell["network"]], Admm(**cell["method"]))
    return {
        "stages": [asdict(stage) for stage in outcome.stages],
        "units": {name: int(keep.sum()) for name, keep in outcome.kept.items()},
        "distances": list(outcome.distances),
        "accuracy": outcome.stages[-1].accuracy,
        "dense_accuracy": outcome.stages[0].accuracy,
        "n": outcome.stages[0].weights,
        "kept": outcome.stages[-1].weights,
        "samples": outcome.samples,
        "processor_seconds": outcome.seconds,
    }


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = comparator_parser("admm", __doc__, CHAINS)
    root.add_argument("--shares", nargs="+", type=float, default=SHARES, help=f"of units, default {SHARES}")
    root.add_argument("--samples", type=int, default=SAMPLES, help=f"images in all, default {SAMPLES}")
    root.add_argument("--bits", nargs="+", type=int, default=(8,), help="default 8")
    told = f"images held out that purification looks at, default {Admm.judges}"
    root.add_argument("--judges", type=int, default=Admm.judges, help=told)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    wanted = cells(
        given.network,
        shares=given.shares,
        bits=given.bits,
        samples=given.samples,
        judges=given.judges,
        seeds=given.seeds,
    )
    return measure_cells(given.out / "admm.jsonl", wanted, on_dense(given, measure))


if __name__ == "__main__":
    sys.exit(main())
