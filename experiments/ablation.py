"""What buys what: the one-stage recipe with one part changed at a time, and built up from magnitude pruning.

    python -m experiments.ablation --network mlpnet_mnist --sparsity .9 .98 --seeds 2 --out runs/ablation

Groups of rows
--------------
- "built": from magnitude pruning to the whole recipe, one part added at a time.
- "changed": the whole recipe with one part exchanged or left out. Everything else stays as it is, so parts
  that make up for each other look cheap here and dear in "built".
- "defaults": `prune` as a new user would call it, for every setting that could be its default.

Nothing is chosen here: dampings and weights are those written down, the update has its full length. Every row
takes about as many gradient rows; samples are counted, and rows in stages take several times more. Training
loss is that of the first `LOSS_SAMPLES` training samples, test accuracy of the whole test set.

Results are appended to ``results.jsonl`` in the output directory, keyed by their settings: the same command
goes on where it stopped. ``<network>.md``, ``<network>.csv`` and ``<network>.svg`` are written at the end.
Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import cbs_opt
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, SketchedFisher
from cbs_opt.network.data import Data
from cbs_opt.network.evaluation import evaluate
from cbs_opt.recipe.files import request_to_plain
from cbs_opt.recipe.records import Recipe, Request, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import OBS, GreedyOBS, Magnitude, SwapSearch
from cbs_opt.report.record import PruneReport
from experiments.ablation_figure import draw
from experiments.command_line import add_run_options, experiment_parser
from experiments.exact_vs_heuristic import Subject, subject
from experiments.ledger import Ledger, settings_key
from formulations.errors import CbsError

DEFAULT_OUT = Path("runs/ablation")
NETWORKS = ("digits", "mlpnet_mnist", "resnet20_cifar10")
GROUPS = ("built", "changed", "defaults")
LOSS_SAMPLES = 10_000
SAMPLES: Mapping[str, tuple[int, int]] = {
    "digits": (1_200, 4),
    "mlpnet_mnist": (16_000, 16),
    "resnet20_cifar10": (8_000, 16),
}
"""Training samples of the whole recipe, and how many of them a row sketches."""
CLASSES = 10
STAGES = 4
DROP_FACTOR = 0.85
"""Share of the kept weights that each drop of greedy OBS keeps, about."""
COLUMNS = (
    "group",
    "sparsity",
    "label",
    "seeds",
    "train_loss",
    "accuracy",
    "accuracy_std",
    "seconds",
    "samples",
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: a name, and how `cbs_opt.prune` is called."""

    group: str
    label: str
    recipe: Recipe
    stages: Stages | None = None


def whole(network: str, sparsity: float) -> Recipe:
    """Return the recipe that is taken apart."""
    samples, per_row = SAMPLES[network]
    return Recipe(
        curvature=SketchedFisher(samples=samples, per_row=per_row),
        layer_inputs=1.0,
        damping=0.1,
        select=GreedyOBS(drops=drops(sparsity)),
        update=Update(),
    )


def drops(sparsity: float) -> int:
    """Return drops of greedy OBS: as many as keep about `DROP_FACTOR` of the weights each."""
    return max(1, math.ceil(math.log(1.0 - sparsity) / math.log(DROP_FACTOR)))


def variants(network: str, sparsity: float) -> Iterator[Variant]:
    """Every row of the table, group by group."""
    yield from _built(network, sparsity)
    yield from _changed(network, sparsity)
    yield from _defaults()


def _built(network: str, sparsity: float) -> Iterator[Variant]:
    everything = whole(network, sparsity)
    samples, per_row = SAMPLES[network]
    parts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("+ update of the kept weights", {"update": Update()}),
        ("+ OBS saliency", {"select": OBS()}),
        ("+ rows of many samples", {"curvature": EmpiricalFisher(samples=samples, per_row=per_row)}),
        ("+ sketched exact Fisher", {"curvature": everything.curvature}),
        ("+ layer-input term", {"layer_inputs": everything.layer_inputs}),
        ("+ greedy OBS in drops", {"select": everything.select}),
        ("+ exchanges", {"select": SwapSearch()}),
    )
    recipe = replace(
        everything,
        select=Magnitude(),
        update=None,
        curvature=EmpiricalFisher(samples=samples // per_row),
        layer_inputs=0.0,
    )
    yield Variant(group="built", label="magnitude", recipe=recipe)
    for label, change in parts:
        recipe = replace(recipe, **change)
        yield Variant(group="built", label=label, recipe=recipe)
    yield _in_stages("built", f"+ {STAGES} stages", everything)


def _changed(network: str, sparsity: float) -> Iterator[Variant]:
    everything = whole(network, sparsity)
    samples, per_row = SAMPLES[network]
    rows = samples // per_row
    changes: dict[str, dict[str, Any]] = {
        "the whole recipe": {},
        "no update": {"update": None},
        "magnitude, then update": {"select": Magnitude()},
        "selection program, then update": {"select": SwapSearch(program="selection")},
        "OBS at once": {"select": OBS()},
        "with exchanges": {"select": SwapSearch()},
        "empirical rows, one sample each": {"curvature": EmpiricalFisher(samples=rows)},
        "empirical rows, averaged": {"curvature": EmpiricalFisher(samples=samples, per_row=per_row)},
        "exact Fisher, as many rows": {"curvature": ExactFisher(samples=rows // CLASSES)},
        "no layer-input term": {"layer_inputs": 0.0},
        "layer-input term times 3": {"layer_inputs": 3.0},
        "damping / 10": {"damping": 0.01},
        "damping x 10": {"damping": 1.0},
    }
    for label, change in changes.items():
        yield Variant(group="changed", label=label, recipe=replace(everything, **change))
    yield _in_stages("changed", f"{STAGES} stages", everything)


def _in_stages(group: str, label: str, everything: Recipe) -> Variant:
    """Several stages with new rows and gradients each: they cost as many times more samples."""
    stages = Stages(count=STAGES, updates=2, final_updates=2, gradient_samples=everything.samples)
    recipe = replace(everything, select=GreedyOBS(drops=4))
    return Variant(group=group, label=label, recipe=recipe, stages=stages)


def _defaults() -> Iterator[Variant]:
    old: dict[str, Any] = {"damping": absolute(1e-3), "layer_inputs": 0.0}
    sketched: dict[str, Any] = {"curvature": SketchedFisher()}
    swaps, greedy = SwapSearch(), GreedyOBS()
    rest = {
        "selection, empirical, 1e-3": Recipe(select=SwapSearch(program="selection"), **old),
        "joint, empirical, 1e-3": Recipe(select=swaps, **old),
        "joint, empirical, .1": Recipe(select=swaps, layer_inputs=0.0, damping=0.1),
        "joint, empirical, term, .01": Recipe(select=swaps, layer_inputs=1.0, damping=0.01),
        "joint, empirical, term, .1": Recipe(select=swaps, layer_inputs=1.0, damping=0.1),
        "greedy, empirical, term, .01": Recipe(select=greedy, layer_inputs=1.0, damping=0.01),
        "greedy, empirical, term, .1": Recipe(select=greedy, layer_inputs=1.0, damping=0.1),
        "joint, sketched, term, .01": Recipe(select=swaps, layer_inputs=1.0, damping=0.01, **sketched),
        "joint, sketched, term, .1": Recipe(select=swaps, layer_inputs=1.0, damping=0.1, **sketched),
        "greedy, sketched, term, .1": Recipe(select=greedy, layer_inputs=1.0, damping=0.1, **sketched),
        "joint, sketched, .1": Recipe(select=swaps, layer_inputs=0.0, damping=0.1, **sketched),
    }
    for label, recipe in rest.items():
        yield Variant(group="defaults", label=label, recipe=recipe)


class Bench:
    """One network and its data; the network is trained or read once a seed."""

    def __init__(self, network: str, data_dir: Path | None) -> None:
        self.network = network
        self.data_dir = data_dir
        self._seed: int | None = None
        self._given: Subject | None = None
        self._trained: dict[str, torch.Tensor] = {}

    def measure(self, variant: Variant, sparsity: float, seed: int) -> dict[str, Any]:
        """Prune the trained network and evaluate it."""
        given = self._subject(seed)
        given.model.load_state_dict(self._trained)
        began = time.perf_counter()
        report = cbs_opt.prune(
            given.model,
            given.train,
            sparsity=sparsity,
            recipe=replace(variant.recipe, weights=Weights(target=given.target, blocks="global")),
            stages=variant.stages,
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - began
        x, y = given.train
        before = _evaluated(given.model, (x[:LOSS_SAMPLES], y[:LOSS_SAMPLES]))
        after = _evaluated(given.model, given.test)
        return {
            "network": self.network,
            "group": variant.group,
            "label": variant.label,
            "sparsity": sparsity,
            "seed": seed,
            "train_loss": before[0],
            "accuracy": 100.0 * after[1],
            "seconds": seconds,
            "samples": _samples(report, variant.recipe),
            "n_prune": report.n_prune,
        }

    def _subject(self, seed: int) -> Subject:
        if self._given is None or (self.network == "digits" and self._seed != seed):
            self._given, self._seed = subject(self.network, seed, self.data_dir), seed
            self._trained = {name: value.clone() for name, value in self._given.model.state_dict().items()}
        return self._given


def _evaluated(model: nn.Module, data: Data) -> tuple[float, float]:
    """Loss and accuracy."""
    found = evaluate(model, data, nn.functional.cross_entropy)
    return found.loss, found.accuracy or 0.0


def _samples(report: PruneReport, recipe: Recipe) -> int:
    """Training samples whose gradients were taken."""
    if report.stages:
        return max(record.samples for record in report.stages)
    unused = isinstance(recipe.select, Magnitude) and recipe.update is None
    return 0 if unused else recipe.samples


def run(
    network: str,
    sparsities: Sequence[float],
    seeds: Sequence[int],
    groups: Sequence[str],
    ledger: Ledger,
    data_dir: Path | None,
) -> list[dict[str, Any]]:
    """Measure what the ledger lacks; the results of all cells, seed by seed."""
    todo = [
        (variant, sparsity, seed)
        for seed, sparsity in itertools.product(seeds, sparsities)
        for variant in variants(network, sparsity)
        if variant.group in groups
    ]
    bench = Bench(network, data_dir)
    results = []
    for variant, sparsity, seed in tqdm(todo, desc="cells", disable=None):
        key = settings_key(
            {
                "network": network,
                "request": request_to_plain(
                    Request(sparsity=sparsity, recipes=(variant.recipe,), stages=variant.stages, seed=seed)
                ),
                "label": variant.label,
                "group": variant.group,
                "version": cbs_opt.__version__,
            }
        )
        if key not in ledger:
            found = bench.measure(variant, sparsity, seed)
            ledger.add(key, found)
            figures = f"{found['train_loss']:.4f} {found['accuracy']:.2f} % {found['seconds']:.1f} s"
            tqdm.write(f"{variant.label} {sparsity:g} seed {seed}: {figures}", file=sys.stderr)
        results.append(ledger[key])
    return results


def ablation_frame(results: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Means over seeds, one row a group, sparsity and label, in the order of `results`."""
    cells = pd.DataFrame(list(results))
    if cells.empty:
        return pd.DataFrame(columns=list(COLUMNS))
    grouped = cells.groupby(["group", "sparsity", "label"], sort=False)
    frame = grouped[["train_loss", "accuracy", "seconds", "samples"]].mean()
    frame["accuracy_std"] = grouped["accuracy"].std(ddof=1)
    frame["seeds"] = grouped.size()
    return frame.reset_index()[list(COLUMNS)]


def markdown(frame: pd.DataFrame) -> str:
    """One table a group: training loss and test accuracy at every sparsity, seconds and samples."""
    parts = []
    for group, rows in frame.groupby("group", sort=False):
        levels = sorted(rows["sparsity"].unique())
        head = [
            str(group),
            *(f"{level:g}: {what}" for level in levels for what in ("training loss", "test %")),
            "seconds",
            "samples",
        ]
        lines = [head, ["---", *["---:"] * (len(head) - 1)]]
        for label, own in rows.groupby("label", sort=False):
            at = own.set_index("sparsity")
            figures = [text for level in levels for text in _figures(at, level)]
            spent = f"{own['seconds'].mean():.1f}", f"{own['samples'].mean():,.0f}".replace(",", " ")
            lines.append([str(label), *figures, *spent])
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def _figures(rows: pd.DataFrame, level: float) -> tuple[str, str]:
    """Training loss and accuracy at one sparsity, the latter with its deviation where there are seeds."""
    if level not in rows.index:
        return "", ""
    row = rows.loc[level]
    spread = f" ± {row['accuracy_std']:.2f}" if row["seeds"] > 1 else ""
    return f"{row['train_loss']:.4f}", f"{row['accuracy']:.2f}{spread}"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("ablation", __doc__)
    root.add_argument("--network", choices=NETWORKS, default="digits")
    root.add_argument("--sparsity", nargs="+", type=float, default=[0.9])
    root.add_argument("--groups", nargs="+", choices=GROUPS, default=["built", "changed"])
    add_run_options(root, seeds=1, out=DEFAULT_OUT)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = parser().parse_args(arguments)
    ledger = Ledger(given.out / "results.jsonl")
    try:
        results = run(given.network, given.sparsity, range(given.seeds), given.groups, ledger, given.data)
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    frame = ablation_frame(results)
    text = markdown(frame)
    (given.out / f"{given.network}.md").write_text(text, encoding="utf-8")
    frame.to_csv(given.out / f"{given.network}.csv", index=False)
    draw(frame).savefig(given.out / f"{given.network}.svg", metadata={"Date": None})
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
