"""Test accuracy against the samples and the time that it takes: pruning by name, SGD after it, and rivals.

    python -m experiments.frontier --networks mlpnet_mnist
    python -m experiments.frontier --networks resnet20_cifar10 --sparsity .9 --contenders magnitude_sgd

Contenders
----------
- ``fast``, ``balanced``, ``best``: `prune` with no option but the name. ``best_within`` is
  ``recipe=cbs.best(samples=budget)``.
- ``magnitude_sgd``: the smallest weights go at once, then SGD with the mask fixed.
- ``gradual_sgd``: they go while SGD runs, by the cubic of Zhu and Gupta over the first two thirds of the
  samples; then the mask is fixed.
- ``fast_sgd``, ``balanced_sgd``, ``best_sgd``: that recipe, then the same SGD on what is left of the budget.

Protocol
--------
- The dense network, the weights that may go, and the data are those of `experiments.recipes`; magnitudes are
  compared over the whole network. Counts are exact. The test set is read once a cell, whole.
- A budget is of training images that are differentiated: in pruning, in training, or both.
- SGD (`experiments.rivals_training`): all parameters, batches of 128, momentum .9, weight decay 1e-4, cosine,
  images shifted and mirrored on CIFAR-10.
- Its learning rate is the one of the best accuracy on the last 5 000 training images after training on the
  others: among four, half a decade apart, and more where the best is at an end. The search is made anew for
  every contender and sparsity, and not counted in the cost. On MLPNet it is made at every budget, on ResNet20
  at 25 000 samples, and carried over to the others. (Those images are set aside in the search only: the dense
  network was trained on them, and recipes prune with them.)
- Processor seconds are those of `prune` and of training, with one thread; reading data, the search for rates
  and the evaluation are left out. Run ``cbs-opt prepare`` before, or compilation is among them.
- Every cell, and every rate that is tried, is appended to ``results.jsonl`` as it is done: the same command
  goes on where it was stopped. To measure contenders again, delete their lines::

      sed -i -E '/"contender": "(fast|balanced|best)/d' runs/frontier/results.jsonl

`experiments.frontier_page` makes the page and its figures of them.
Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

import cbs_opt
from cbs_opt import __version__
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Weights
from cbs_opt.system.threads import thread_limit
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.data_files import DATA_FILES
from experiments.datasets import load_dataset
from experiments.ledger import Ledger, commit, settings_key
from experiments.networks import NETWORKS, Network, load_network
from experiments.rivals_training import (
    GRADUAL,
    GRID,
    UPDATES,
    Cost,
    Training,
    best_rate,
    gradual,
    one_shot,
    train,
)
from formulations.errors import CbsError

DEFAULT_OUT = Path("runs/frontier")
SET_ASIDE = 5_000
"""Training images, the last ones, that learning rates are chosen on."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to a sparse network.

    `recipe` is the name of the one that prunes it, none for magnitude; `sgd` whether it is trained after or,
    if `gradual`, meanwhile. Without a `budget` it takes what it takes.
    """

    label: str
    recipe: str | None = None
    sgd: bool = False
    gradual: bool = False
    budget: bool = True


CONTENDERS: Mapping[str, Contender] = {
    "fast": Contender(label='"fast"', recipe="fast", budget=False),
    "balanced": Contender(label='"balanced"', recipe="balanced", budget=False),
    "best": Contender(label='"best"', recipe="best", budget=False),
    "best_within": Contender(label="best(samples=budget)", recipe="best"),
    "magnitude_sgd": Contender(label="magnitude, then SGD", sgd=True),
    "gradual_sgd": Contender(label="gradual magnitude with SGD", sgd=True, gradual=True),
    "fast_sgd": Contender(label='"fast", then SGD', recipe="fast", sgd=True),
    "balanced_sgd": Contender(label='"balanced", then SGD', recipe="balanced", sgd=True),
    "best_sgd": Contender(label='"best", then SGD', recipe="best", sgd=True),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured of a network: sparsities, budgets, and samples that each learning rate is tried on.

    Without `trial_samples` they are tried on as many as there are to train on.
    """

    sparsities: tuple[float, ...]
    budgets: tuple[int, ...]
    trial_samples: int | None = None


RESNET20 = Plan(
    sparsities=(0.8, 0.9, 0.95),
    budgets=(10_000, 25_000, 50_000, 100_000, 300_000, 500_000),
    trial_samples=25_000,
)
PLANS: Mapping[str, Plan] = {
    "mlpnet_mnist": Plan(
        sparsities=(0.95, 0.98), budgets=(15_000, 30_000, 60_000, 120_000, 300_000, 600_000, 1_200_000)
    ),
    "resnet20_cifar10": RESNET20,
    "resnet20a_cifar10": RESNET20,
}


def settings(
    network: str, contender: str, sparsity: float, budget: int | None, seed: int = 0
) -> dict[str, Any]:
    """Return everything that decides a cell, as plain values; of a rival our version is no part."""
    who = CONTENDERS[contender]
    cell = {
        "network": network,
        "weights_sha256": DATA_FILES[f"{network}.safetensors"].sha256,
        "target": NETWORKS[network].target,
        "contender": contender,
        "sparsity": sparsity,
        "budget": budget,
        "seed": seed,
    }
    if who.recipe is not None:
        cell["version"] = __version__
    if who.sgd:
        training = asdict(Training(rate=0.0, samples=1))
        cell["training"] = {name: training[name] for name in ("batch_size", "momentum", "weight_decay")}
        cell["rates"] = {"grid": GRID, "samples": PLANS[network].trial_samples, "set_aside": SET_ASIDE}
    if who.gradual:
        cell["gradual"] = {"updates": UPDATES, "share": GRADUAL}
    return cell


def cells(
    network: str,
    *,
    contenders: Sequence[str] = tuple(CONTENDERS),
    sparsities: Sequence[float] = (),
    budgets: Sequence[int] = (),
    seeds: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield the settings of cells, those of the plan where nothing is said, small budgets first."""
    plan = PLANS[network]
    own: list[tuple[int | None, bool]] = [
        (None, False),
        *((budget, True) for budget in budgets or plan.budgets),
    ]
    for seed, (budget, has_budget), share in itertools.product(
        range(seeds), own, sparsities or plan.sparsities
    ):
        for contender in contenders:
            if CONTENDERS[contender].budget == has_budget:
                yield settings(network, contender, share, budget, seed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Start:
    """A network before it is trained, and what it took to get there."""

    network: Network
    cost: Cost
    says: Mapping[str, Any]


class Bench:
    """One network, its data, and the starts that were made, for the contenders that share them.

    Parameters
    ----------
    network : str
    ledger : Ledger
        Where the rates that are tried are kept.
    data_dir : Path, optional
        See `experiments.data_files.data_directory`.
    verify : bool
        Check the files' SHA-256.
    """

    def __init__(self, network: str, ledger: Ledger, data_dir: Path | None, *, verify: bool) -> None:
        spec = NETWORKS[network]
        self.dense = load_network(network, data_dir, verify=verify)
        self.data = load_dataset(spec.dataset, data_dir, mean=spec.mean, std=spec.std, verify=verify)
        self.ledger = ledger
        self._starts: dict[str, Start] = {}

    def measure(self, cell: Mapping[str, Any]) -> dict[str, Any]:
        """Make the network of a cell and evaluate it; no accuracy where the budget is too small to train."""
        who = CONTENDERS[cell["contender"]]
        if who.sgd:
            spent = self._known_cost(cell) or self._start(cell).cost
            if spent.samples >= cell["budget"]:
                return {**cell, **_costs(spent), "accuracy": None}
        start = self._start(cell)
        network, cost, says = start.network, start.cost, dict(start.says)
        if who.sgd:
            left = cell["budget"] - cost.samples
            says["rate"] = best_rate(lambda rate: self._trial(cell, left, rate))
            network = _copied(start.network)
            training = Training(rate=says["rate"], samples=left, seed=cell["seed"])
            more = train(network, self.data, training, _sparsities(cell, left))
            cost = Cost(samples=cost.samples + more.samples, seconds=cost.seconds + more.seconds)
        after = evaluate(network.model, (self.data.test_x, self.data.test_y), nn.functional.cross_entropy)
        weights = Partition.from_model(network.model, target=network.target).tensors(network.model).values()
        return {
            **cell,
            **says,
            **_costs(cost),
            "accuracy": 100.0 * (after.accuracy or 0.0),
            "test_loss": after.loss,
            "n": sum(tensor.numel() for tensor in weights),
            "zeros": sum(int((tensor == 0.0).sum()) for tensor in weights),
        }

    def _known_cost(self, cell: Mapping[str, Any]) -> Cost | None:
        """Return what the recipe of a cell took by its name, if that was measured."""
        recipe = CONTENDERS[cell["contender"]].recipe
        if recipe is None:
            return None
        key = settings_key(settings(cell["network"], recipe, cell["sparsity"], None, cell["seed"]))
        if key not in self.ledger:
            return None
        entry = self.ledger[key]
        return Cost(samples=entry["samples"], seconds=entry["processor_seconds"])

    def _start(self, cell: Mapping[str, Any]) -> Start:
        """Return the dense network, or one that a recipe has pruned."""
        who = CONTENDERS[cell["contender"]]
        if who.recipe is None:
            return Start(network=self.dense, cost=Cost(samples=0, seconds=0.0), says={})
        budget = None if who.sgd else cell["budget"]
        key = settings_key(
            {**{name: cell[name] for name in ("sparsity", "seed")}, "of": [who.recipe, budget]}
        )
        if key not in self._starts:
            self._starts[key] = self._pruned(cell["sparsity"], cell["seed"], who.recipe, budget)
        return self._starts[key]

    def _pruned(self, sparsity: float, seed: int, recipe: str, budget: int | None) -> Start:
        network = _copied(self.dense)
        weights = Weights(target=network.target, blocks="global")
        began = time.process_time()
        report = cbs_opt.prune(
            network.model,
            (self.data.train_x, self.data.train_y),
            sparsity=sparsity,
            recipe=Named(name=recipe, samples=budget, weights=weights),
            seed=seed,
            progress=False,
        )
        cost = Cost(samples=report.samples, seconds=time.process_time() - began)
        says = {"choices": list(report.choices), "notes": list(report.notes)}
        return Start(network=network, cost=cost, says=says)

    def _trial(self, cell: Mapping[str, Any], left: int, rate: float) -> float:
        """Return the accuracy on images set aside after training on the others, with seed 0 for all seeds."""
        samples = PLANS[cell["network"]].trial_samples or left
        trial = {**cell, "seed": 0, "budget": None, "trial": {"rate": rate, "samples": samples}}
        key = settings_key(trial)
        if key not in self.ledger:
            network = _copied(self._start(trial).network)
            x, y = self.data.train_x, self.data.train_y
            aside = min(SET_ASIDE, len(x) // 2)
            others = replace(self.data, train_x=x[:-aside], train_y=y[:-aside])
            cost = train(network, others, Training(rate=rate, samples=samples), _sparsities(cell, samples))
            found = evaluate(network.model, (x[-aside:], y[-aside:]), nn.functional.cross_entropy)
            self.ledger.add(key, {**trial, **_costs(cost), "accuracy_aside": 100.0 * (found.accuracy or 0.0)})
        accuracy: float = self.ledger[key]["accuracy_aside"]
        return accuracy


def _sparsities(cell: Mapping[str, Any], samples: int) -> Sequence[tuple[int, float]]:
    if CONTENDERS[cell["contender"]].gradual:
        return gradual(cell["sparsity"], samples)
    return one_shot(cell["sparsity"])


def _costs(cost: Cost) -> dict[str, Any]:
    return {"samples": cost.samples, "processor_seconds": cost.seconds}


def _copied(network: Network) -> Network:
    return replace(network, model=copy.deepcopy(network.model))


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("frontier", __doc__)
    root.add_argument("--networks", nargs="+", choices=list(PLANS), default=list(PLANS)[:2])
    root.add_argument("--sparsity", nargs="+", type=float, default=(), help="default: those of the plan")
    root.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    root.add_argument("--budgets", nargs="+", type=int, default=(), help="default: those of the plan")
    add_run_options(root, seeds=1, out=DEFAULT_OUT)
    add_no_verify(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    ledger = Ledger(given.out / "results.jsonl")
    try:
        for network in given.networks:
            chosen = cells(
                network,
                contenders=given.contenders,
                sparsities=given.sparsity,
                budgets=given.budgets,
                seeds=given.seeds,
            )
            todo = [cell for cell in chosen if settings_key(cell) not in ledger]
            if not todo:
                continue
            bench = Bench(network, ledger, given.data, verify=not given.no_verify)
            with thread_limit(1):
                for cell in tqdm(todo, desc=network, disable=None):
                    ledger.add(settings_key(cell), {**bench.measure(cell), "commit": commit()})
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
