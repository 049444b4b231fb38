"""What exactness buys: a network pruned row by row to proven optimality, and by heuristics.

Every output neuron's incoming weights are one block; all methods prune the same number in each block and
adjust the kept weights optimally (joint program), so they differ in the chosen sets alone. Beside the
heuristics stand random sets whose objective is within a given distance of the optimum: they show what the
last per cent of the objective is worth in loss and accuracy, whatever method left it there.

    python -m experiments.exact_vs_heuristic --out docs/results
    python -m experiments.exact_vs_heuristic --network mlpnet_mnist --sparsity 0.9 --seeds 1 --draws 0

What was measured is kept in ``--results`` as it is found, and not measured again.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm

from cbs_opt import solve
from cbs_opt.budget.counts import allocate
from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.demo import digits_network
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import write_back
from cbs_opt.select.saliency import SALIENCIES
from experiments.datasets import load_dataset
from experiments.exact_vs_heuristic_page import EXACT, RANDOM, REL_GAP, write_page
from experiments.ledger import Ledger, settings_key
from experiments.networks import load_network
from formulations import BlockProblem
from formulations.loss import objective, solved_weights
from formulations.problem import BoolArray
from formulations.solution import BlockSolution

logger = logging.getLogger(__name__)

METHODS: dict[str, tuple[str, str]] = {
    EXACT: ("branch_and_bound", "joint"),
    "joint swap search": ("swap_search", "joint"),
    "selection swap search": ("swap_search", "selection"),
    "OBS": ("obs", "joint"),
    "magnitude": ("magnitude", "joint"),
}
"""What is compared: a method, and the program whose objective it looks at."""
LEVELS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""How far above the optimum a random set may be, relative to the optimum of its block."""
STEPS_A_WEIGHT = 3
"""Swaps that a random walk tries for each weight of the block."""
LOSS = nn.functional.cross_entropy
COLUMNS = (
    "sparsity",
    "seed",
    "dense_accuracy",
    "method",
    "level",
    "objective",
    "bound",
    "excess",
    "gap",
    "train_loss",
    "test_loss",
    "accuracy",
    "proved",
    "seconds",
)
"""Of the file of rows, whatever order a line of results has them in."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A trained network and its data: training for the curvature, test for the last column."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    target: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A set of a block and its joint objective; `bound` is proved for the block."""

    keep: BoolArray
    objective: float
    bound: float | None = None

    @property
    def proved(self) -> bool:
        """Whether the bound meets the objective, to `REL_GAP` and rounding."""
        return self.bound is not None and self.objective - self.bound <= 1.01 * REL_GAP * abs(self.objective)


def subject(network: str, seed: int, data_dir: Path | None = None) -> Subject:
    """Return the digits network trained from `seed`, or a published network with its data."""
    if network == "digits":
        model, train, test = digits_network(seed)
        return Subject(model=model, train=train, test=test)
    loaded = load_network(network, data_dir)
    data = load_dataset(loaded.dataset, data_dir, mean=loaded.mean, std=loaded.std)
    return Subject(
        model=loaded.model,
        train=(data.train_x, data.train_y),
        test=(data.test_x, data.test_y),
        target=loaded.target,
    )


def row_problems(
    given: Subject, sparsity: float, *, samples: int, damping: float, seed: int
) -> tuple[Partition, list[BlockProblem]]:
    """One problem an output neuron; what each loses is decided by OBS saliencies across the network."""
    partition = Partition.from_model(given.model, target=given.target, blocks="row")
    blocks = fisher_blocks(
        given.model,
        given.train,
        loss_fn=LOSS,
        partition=partition,
        curvature=EmpiricalFisher(samples=samples),
        damping=damping,
        seed=seed,
        progress=False,
    )
    scores = torch.cat([SALIENCIES["obs"](block) for block in blocks])
    counts = allocate(partition, sparsity, scores=scores)
    # A trained network's mean gradient is noise beside the curvature, and without it the optimum is
    # positive, so that distances from it can be relative.
    problems = [
        replace(block.to_problem(count), gradient=None) for block, count in zip(blocks, counts, strict=True)
    ]
    return partition, problems


def choose(problem: BlockProblem, name: str, *, time_limit: float, seed: int) -> Choice:
    """Return the set that a method of `METHODS` chooses, valued under the joint program."""
    method, program = METHODS[name]
    if problem.n_prune in (0, problem.n):
        keep = np.full(problem.n, problem.n_prune == 0)
        value = objective(problem, keep, "joint")
        return Choice(keep=keep, objective=value, bound=value)
    limits: dict[str, Any] = {"time_limit": time_limit, "rel_gap": REL_GAP, "seed": seed}
    incumbent: BlockSolution | None = None
    if name == EXACT:
        incumbent = solve(problem, "swap_search", program="joint", **limits)
    solution = solve(problem, method, program=program, incumbent=incumbent, **limits)
    assert solution.keep is not None
    return Choice(
        keep=solution.keep,
        objective=objective(problem, solution.keep, "joint"),
        bound=solution.bound if program == "joint" else None,
    )


def random_near(problem: BlockProblem, best: Choice, level: float, generator: np.random.Generator) -> Choice:
    """Return a random set within ``(1 + level)`` of the best objective, by a walk of swaps."""
    keep, value = best.keep.copy(), best.objective
    ceiling = (1.0 + level) * best.objective
    if problem.n_prune in (0, problem.n):
        return best
    for _ in range(STEPS_A_WEIGHT * problem.n):
        out = generator.choice(np.flatnonzero(keep))
        back = generator.choice(np.flatnonzero(~keep))
        keep[out], keep[back] = False, True
        candidate = objective(problem, keep, "joint")
        if candidate <= ceiling:
            value = candidate
        else:
            keep[out], keep[back] = True, False
    return Choice(keep=keep, objective=value)


def outcome(
    given: Subject, partition: Partition, problems: Sequence[BlockProblem], choices: Sequence[Choice]
) -> dict[str, float]:
    """Objective of the sets, and loss and accuracy of the network that they leave."""
    weights = [
        solved_weights(problem, choice.keep, "joint")
        for problem, choice in zip(problems, choices, strict=True)
    ]
    model = copy.deepcopy(given.model)
    write_back(model, partition, torch.from_numpy(np.concatenate(weights)))
    train, test = evaluate(model, given.train, LOSS), evaluate(model, given.test, LOSS)
    return {
        "objective": math.fsum(choice.objective for choice in choices),
        "train_loss": train.loss,
        "test_loss": test.loss,
        "accuracy": 100.0 * (test.accuracy or 0.0),
    }


def compare_on(
    given: Subject,
    sparsity: float,
    *,
    samples: int,
    damping: float,
    time_limit: float,
    draws: int,
    seed: int,
    methods: Sequence[str] = tuple(METHODS),
) -> Iterator[dict[str, Any]]:
    """One row a method, then one a random set; `excess` is over the exact choice, `gap` to its bound.

    Yields
    ------
    dict
        `method`, `level` (of random sets), `objective`, `bound` (sum over blocks: of the block-diagonal
        model, and only that), `excess`, `train_loss`, `test_loss`, `accuracy` (%), `proved` (share of the
        blocks), `seconds`.
    """
    partition, problems = row_problems(given, sparsity, samples=samples, damping=damping, seed=seed)
    dense = evaluate(given.model, given.test, LOSS)
    common = {"sparsity": sparsity, "seed": seed, "dense_accuracy": 100.0 * (dense.accuracy or 0.0)}
    best: list[Choice] = []
    bound = optimum = math.nan
    for name in (EXACT, *(method for method in methods if method != EXACT)):
        began = time.perf_counter()
        choices = [choose(problem, name, time_limit=time_limit, seed=seed) for problem in problems]
        seconds = time.perf_counter() - began
        found = outcome(given, partition, problems, choices)
        if name == EXACT:
            best, optimum = choices, found["objective"]
            bound = math.fsum(-math.inf if c.bound is None else c.bound for c in choices)
        yield {
            **common,
            "method": name,
            "level": 0.0,
            **_judged(found, optimum, bound),
            "proved": sum(choice.proved for choice in choices) / len(choices),
            "seconds": seconds,
        }
    generator = np.random.default_rng(seed)
    for level in LEVELS:
        for _ in range(draws):
            near = [random_near(p, c, level, generator) for p, c in zip(problems, best, strict=True)]
            found = outcome(given, partition, problems, near)
            yield {**common, "method": RANDOM, "level": level, **_judged(found, optimum, bound)}


def _judged(found: dict[str, float], optimum: float, bound: float) -> dict[str, float]:
    value = found["objective"]
    return {
        **found,
        "bound": bound,
        "excess": (value - optimum) / max(optimum, 1e-12),
        "gap": (value - bound) / max(abs(value), 1e-12),
    }


def main(
    network: Annotated[str, typer.Option(help="digits, or mlpnet_mnist (needs data).")] = "digits",
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Repeatable; .5, .7, .8, .9 by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Networks (digits) or samples of rows, from seed 0 on.")] = 5,
    samples: Annotated[int, typer.Option(help="Gradient rows.")] = 1000,
    damping: Annotated[float, typer.Option(help="Added to the diagonal of H.")] = 1e-3,
    time_limit: Annotated[float, typer.Option(help="Seconds a block.")] = 30.0,
    draws: Annotated[int, typer.Option(help="Random sets for each distance from the optimum.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for page, picture and rows.")] = Path(
        "results/exact_vs_heuristic"
    ),
    results: Annotated[Path, typer.Option(help="File of results, one line a network and sparsity.")] = Path(
        "results/exact_vs_heuristic/results.jsonl"
    ),
    data: Annotated[Path | None, typer.Option(help="Data directory; $CBS_OPT_DATA by default.")] = None,
) -> None:
    """Prune a network row by row, exactly and by heuristics; print and draw what the difference is worth."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    levels = sparsity or [0.5, 0.7, 0.8, 0.9]
    ledger = Ledger(results)
    how: dict[str, Any] = {
        "samples": samples,
        "damping": damping,
        "time_limit": time_limit,
        "draws": draws,
    }
    rows: list[dict[str, Any]] = []
    with tqdm(total=seeds * len(levels), desc="networks", disable=None) as bar:
        for seed in range(seeds):
            given: Subject | None = None
            for share in levels:
                key = settings_key({"network": network, "sparsity": share, "seed": seed, **how})
                if key not in ledger:
                    given = given or subject(network, seed, data)
                    ledger.add(key, {"rows": list(compare_on(given, share, seed=seed, **how))})
                rows += ledger[key]["rows"]
                bar.update()
    settings = {
        "network": network,
        "sparsity": levels,
        "seeds": seeds,
        **how,
    }
    typer.echo(write_page(pd.DataFrame(rows, columns=list(COLUMNS)), settings, out), nl=False)


if __name__ == "__main__":
    typer.run(main)
