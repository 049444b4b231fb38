"""Certified gaps where the Hessian has full rank: rows of layers over the second moments of their inputs.

    python -m experiments.benchmarks.full_rank_gaps --out runs/full_rank
    python -m experiments.benchmarks.full_rank_gaps --cache ~/smollm2 --layers "SmolLM2 layer 10 o_proj"
    python -m experiments.benchmarks.full_rank_gaps --layers "ResNet20 layer3.1.conv1" --exact 128 192 256

A row is the joint program of the weights of one output channel, ``H`` the second moments of what the layer is
fed, 1 % of the mean diagonal added; those of SmolLM2, whose folder `experiments.language_model` prepares, are
of the first 16 times 512 tokens of the validation text. The first table bounds up to ``--rows`` rows of a
layer at once by `formulations.relaxations.lower_bounds`, against the sets of `swap_search` with a hundred
restarts: the row of median norm, by the damping as its split, by the best diagonal split and by one in
clusters, alone and among the others. The second has rows that are small enough to be proved optimal, of the
first inputs of a layer: how far apart bound and the set of plain swaps are, and how far that set is from the
optimum. With ``--patterns`` a third one bounds the first row where two of every four weights stay. With
``--exact`` there is one table alone, of what branch and bound comes to within a minute by the clock on the
row of median norm and so many of the first inputs. Processor seconds are of one thread. Each cell is appended
to ``OUT/results.jsonl`` as it is done: the same command goes on where it was stopped. Prints the tables as
Markdown and draws ``OUT/full_rank.svg``.

Exit codes: 0 all bounds verified, 1 an error or a bound that does not verify, 2 a usage error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

import cbs_opt
from cbs_opt.curvature.layer_inputs import input_moments
from cbs_opt.network.partition import Partition
from cbs_opt.report.figure_style import dress, marker, numbered_style
from cbs_opt.system.threads import thread_limit
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.data_files import DATA_FILES
from experiments.datasets import load_dataset
from experiments.language_model import CALIBRATION_LENGTH, load_model
from experiments.ledger import Ledger, commit, settings_key
from experiments.networks import load_network
from formulations import BlockProblem, BlockSolution, Limits, NofM
from formulations.branch_and_bound import branch_and_bound
from formulations.errors import CbsError
from formulations.incumbents import swap_search
from formulations.problem import FloatArray
from formulations.relaxations import lower_bound, lower_bounds

DEFAULT_OUT = Path("runs/full_rank")
LAYERS = {
    "ResNet20 layer1.1.conv1": ("resnet20_cifar10", "layer1.1.conv1.weight"),
    "ResNet20 layer2.1.conv1": ("resnet20_cifar10", "layer2.1.conv1.weight"),
    "ResNet20 layer3.1.conv1": ("resnet20_cifar10", "layer3.1.conv1.weight"),
    "MLPNet fc1": ("mlpnet_mnist", "fc1.weight"),
}
MODULES = {
    "SmolLM2 layer 0 q_proj": "model.layers.0.self_attn.q_proj",
    "SmolLM2 layer 0 gate_proj": "model.layers.0.mlp.gate_proj",
    "SmolLM2 layer 10 gate_proj": "model.layers.10.mlp.gate_proj",
    "SmolLM2 layer 10 o_proj": "model.layers.10.self_attn.o_proj",
}
SEQUENCES = 16
SHARES = (0.5, 0.7, 0.9)
DAMPING = 0.01
BATCH = 64
RESTARTS = 100
PROVED_LAYER = "ResNet20 layer3.1.conv1"
ORDERS, PROVED_SHARES = (24, 32, 48, 64), (0.5, 0.9)
PROVED_ROWS, SECONDS = 4, 60.0
"""Rows that are to be proved: how many of each order and share pruned, and the time limit of one."""
Rows = tuple[FloatArray, FloatArray]


def layer_rows(layer: str, data_dir: Path | None, verify: bool) -> Rows:
    """Return the second moments (n, n) of a layer, scaled to a mean diagonal of 1, and its weights (r, n).

    The row of median norm comes first.
    """
    name, parameter = LAYERS[layer]
    network = load_network(name, data_dir, verify=verify)
    data = load_dataset(network.dataset, data_dir, mean=network.mean, std=network.std, verify=verify)
    partition = Partition.from_model(network.model, target=parameter, blocks="layer")
    moments = input_moments(network.model, (data.train_x, data.train_y), partition)
    hessian = moments[parameter].double().cpu().numpy()
    hessian = 0.5 * (hessian + hessian.T) / float(np.diagonal(hessian).mean())
    weights = dict(network.model.named_parameters())[parameter].detach().double().flatten(1).cpu().numpy()
    return hessian, median_first(weights)


def model_rows(layer: str, cache: Path) -> Rows:
    """Return the same of a layer of SmolLM2, from the folder that `experiments.language_model` prepares."""
    model, name = load_model(cache), MODULES[layer]
    module = model.get_submodule(name)
    tokens = load_file(cache / "tokens.safetensors")["valid"][: SEQUENCES * CALIBRATION_LENGTH]
    weights = module.get_parameter("weight").detach().double().numpy()
    moments = torch.zeros(weights.shape[1], weights.shape[1], dtype=torch.float64)

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        fed = inputs[0].detach().flatten(0, -2).double()
        moments.add_(fed.T @ fed)

    handle = module.register_forward_pre_hook(add)
    with torch.no_grad():
        for sequence in tokens.view(-1, 1, CALIBRATION_LENGTH):
            model(sequence, use_cache=False)
    handle.remove()
    hessian = moments.numpy()
    hessian = 0.5 * (hessian + hessian.T) / float(np.diagonal(hessian).mean())
    return hessian, median_first(weights)


def median_first(weights: FloatArray) -> FloatArray:
    """Return rows of weights with the one of median norm in front."""
    order = np.argsort(np.linalg.norm(weights, axis=1), kind="stable")
    middle = order.size // 2
    return weights[np.concatenate(([order[middle]], np.delete(order, middle)))]


def programs(rows: Rows, share: float, count: int) -> list[BlockProblem]:
    """Return the joint programs of the first rows, over one read-only Hessian."""
    hessian, weights = rows
    hessian = np.ascontiguousarray(hessian)
    hessian.flags.writeable = False
    n = len(hessian)
    return [
        BlockProblem(weights=row, hessian=hessian, damping=DAMPING, n_prune=round(share * n))
        for row in weights[:count]
    ]


def searched(problem: BlockProblem) -> BlockSolution:
    """Return the best set of a hundred and one descents: one alone is up to 8 % above it."""
    return swap_search(problem, "joint", restarts=RESTARTS)


def bounded(rows: Rows, share: float, batch: int = BATCH) -> dict[str, Any]:
    """Bound up to `batch` rows of a layer together and the first one alone, with what that takes."""
    problems = programs(rows, share, batch)
    sets = [searched(problem) for problem in problems]
    first, known = problems[0], sets[0]
    plain = lower_bound(first, "joint", incumbent=known, diagonal_split=False)
    diagonal = lower_bound(first, "joint", incumbent=known, relaxation="perspective", diagonal_split=True)
    alone, seconds = timed(partial(lower_bound, first, "joint", incumbent=known))
    together, of_all = timed(partial(lower_bounds, problems, incumbents=sets))
    checked = [
        cbs_opt.verify(problem, found).ok
        for problem, found in zip([first, *problems], [alone, *together], strict=True)
    ]
    return {
        "n": first.n,
        "rows": len(problems),
        "gap_damping": plain.gap,
        "gap_diagonal": diagonal.gap,
        "gap_alone": alone.gap,
        "gap_together": together[0].gap,
        "gap_mean": float(np.mean([found.gap for found in together])),
        "seconds_alone": seconds,
        "seconds_a_row": of_all / len(problems),
        "verified": all(checked),
    }


def patterned(rows: Rows) -> dict[str, Any]:
    """Bound the first row of a layer where two of every four weights stay, by a diagonal split and blocks."""
    first = replace(programs(rows, 0.5, 1)[0], n_prune=None, support=NofM(2, 4))
    known = searched(first)
    diagonal = lower_bound(first, "joint", incumbent=known, relaxation="perspective", diagonal_split=True)
    found, seconds = timed(partial(lower_bound, first, "joint", incumbent=known))
    return {
        "n": first.n,
        "gap_diagonal": diagonal.gap,
        "gap_blocks": found.gap,
        "seconds": seconds,
        "verified": cbs_opt.verify(first, found).ok,
    }


def proved(rows: Rows, share: float, n: int) -> dict[str, Any]:
    """Solve rows of the first inputs of a layer, and read what their gaps are made of."""
    hessian, weights = rows
    problems = programs((hessian[:n, :n], weights[:, :n]), share, PROVED_ROWS)
    sets = [swap_search(problem, "joint") for problem in problems]
    bounds = lower_bounds(problems, incumbents=sets)
    limits = Limits(time_limit=SECONDS)
    gaps, excesses, seconds = [], [], []
    for problem, known, bound in zip(problems, sets, bounds, strict=True):
        exact, took = timed(partial(branch_and_bound, problem, "joint", limits=limits))
        seconds.append(took)
        if exact.termination.value != "optimal":
            continue
        gaps.append(_relative(known, bound.bound))
        excesses.append(_relative(known, exact.objective))
    return {
        "n": n,
        "rows": len(problems),
        "proved": len(gaps),
        "gap": float(np.mean(gaps)) if gaps else None,
        "excess": float(np.mean(excesses)) if gaps else None,
        "seconds": float(np.mean(seconds)),
        "verified": all(cbs_opt.verify(p, found).ok for p, found in zip(problems, bounds, strict=True)),
    }


def solved(rows: Rows, share: float, n: int) -> dict[str, Any]:
    """Return what branch and bound comes to on the first row and its first inputs."""
    hessian, weights = rows
    problem = programs((hessian[:n, :n], weights[:, :n]), share, 1)[0]
    limits = Limits(time_limit=SECONDS)
    found, seconds = timed(partial(branch_and_bound, problem, "joint", limits=limits))
    return {
        "n": n,
        "nodes": found.stats.nodes,
        "seconds": seconds,
        "gap": found.gap,
        "proved": found.termination.value == "optimal",
        "verified": not cbs_opt.verify(problem, found).wrong,
    }


def timed(solve: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the processor seconds that it took."""
    began = time.process_time()
    found = solve()
    return found, time.process_time() - began


def _relative(known: BlockSolution, value: float | None) -> float:
    assert known.objective is not None
    assert value is not None
    return (known.objective - value) / known.objective


def bounds_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of bounds."""
    head = ("layer", "n", "k/n", "damping as split, %", "diagonal, %", "clusters, %", "mean of rows, %")
    lines = _head((*head, "s alone", "rows", "s a row together"))
    for cell in results:
        gaps = [_percent(cell[name]) for name in ("gap_damping", "gap_diagonal", "gap_alone", "gap_mean")]
        took = [f"{cell['seconds_alone']:.2f}", str(cell["rows"]), f"{cell['seconds_a_row']:.2f}"]
        lines.append(
            "| " + " | ".join([cell["layer"], str(cell["n"]), f"{cell['share']:g}", *gaps, *took]) + " |"
        )
    return "\n".join(lines) + "\n"


def proved_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of what gaps are made of."""
    lines = _head(("n", "k/n", "proved", "certified gap, %", "of it the set's, %", "s to prove one"))
    for cell in results:
        found = [str(cell["n"]), f"{cell['share']:g}", f"{cell['proved']} of {cell['rows']}"]
        gaps = [_percent(cell["gap"]), _percent(cell["excess"], 2)]
        lines.append("| " + " | ".join([*found, *gaps, f"{cell['seconds']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def solved_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of rows that branch and bound was given, and what it left open."""
    lines = _head(("layer", "n", "k/n", "nodes", "s", "left, %"))
    for cell in results:
        left = "proved" if cell["proved"] else _percent(cell["gap"])
        counts = f"{cell['nodes']:,}".replace(",", " ")
        own = [cell["layer"], str(cell["n"]), f"{cell['share']:g}", counts, f"{cell['seconds']:.1f}", left]
        lines.append("| " + " | ".join(own) + " |")
    return "\n".join(lines) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    rule = ["---" if name in ("layer", "proved") else "---:" for name in names]
    return ["| " + " | ".join(names) + " |", "| " + " | ".join(rule) + " |"]


def pattern_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the bounds of rows with two of every four weights as Markdown."""
    lines = _head(("layer", "n", "diagonal, %", "blocks, %", "s"))
    for found in results:
        gaps = f"{_percent(found['gap_diagonal'])} | {_percent(found['gap_blocks'])}"
        lines.append(f"| {found['layer']} | {found['n']} | {gaps} | {found['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{100.0 * value:.{digits}f}"


def draw(results: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw certified gaps and true gaps of swaps against n, a colour a share pruned."""
    frame = pd.DataFrame(list(results)).dropna(subset=["gap"])
    figure = Figure(figsize=(5.2, 3.0), layout="constrained")
    axes = figure.subplots()
    dress(axes)
    for number, (share, own) in enumerate(frame.groupby("share")):
        style = numbered_style(number)
        for name, line, label in (("gap", "-", "certified"), ("excess", ":", "true")):
            values = 100.0 * own[name].clip(lower=0.0)
            axes.plot(own["n"], values, line, label=f"{label}, k/n {share:g}", **marker(style))
    axes.set_xlabel("weights in a row")
    axes.set_ylabel("gap of swaps, %")
    axes.legend(frameon=False, fontsize=8)
    return figure


def settings(layer: str, **what: Any) -> dict[str, Any]:
    """Return everything that decides a cell, as plain values."""
    if layer in MODULES:
        return {
            "layer": layer,
            "parameter": MODULES[layer],
            "sequences": SEQUENCES,
            "damping": DAMPING,
            **what,
        }
    name, parameter = LAYERS[layer]
    checksum = DATA_FILES[f"{name}.safetensors"].sha256
    return {"layer": layer, "parameter": parameter, "weights_sha256": checksum, "damping": DAMPING, **what}


def main(arguments: list[str] | None = None) -> int:
    """Measure what the ledger does not have, print the tables and draw the picture."""
    root = experiment_parser("benchmarks.full_rank_gaps", __doc__)
    root.add_argument("--layers", nargs="+", choices=[*LAYERS, *MODULES], default=list(LAYERS))
    root.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    root.add_argument("--rows", type=int, default=BATCH, help=f"rows bounded together (default {BATCH})")
    root.add_argument("--cache", type=Path, help="folder of SmolLM2, for its layers")
    root.add_argument("--patterns", action="store_true", help="also two of every four weights")
    root.add_argument("--exact", nargs="+", type=int, default=(), metavar="N", help="solve rows of N inputs")
    add_run_options(root, seeds=1, out=DEFAULT_OUT)
    add_no_verify(root)
    given = root.parse_args(arguments)
    if given.cache is None and not set(given.layers).isdisjoint(MODULES):
        root.error("--cache: name the folder of SmolLM2")
    ledger = Ledger(given.out / "results.jsonl")
    loaded: dict[str, Rows] = {}

    def cell(what: dict[str, Any], measure: Callable[[Rows], dict[str, Any]]) -> dict[str, Any]:
        key, layer = settings_key(what), what["layer"]
        if key not in ledger:
            if layer not in loaded:
                loaded[layer] = (
                    model_rows(layer, given.cache)
                    if layer in MODULES
                    else layer_rows(layer, given.data, not given.no_verify)
                )
            ledger.add(key, {**what, **measure(loaded[layer]), "commit": commit()})
        return ledger[key]

    try:
        with thread_limit(1):
            if given.exact:
                exact = [
                    cell(
                        settings(layer, share=share, exact=n, limit=SECONDS),
                        partial(solved, share=share, n=n),
                    )
                    for layer in given.layers
                    for n in given.exact
                    for share in given.shares
                ]
                sys.stdout.write(solved_table(exact))
                return 0 if all(found["verified"] for found in exact) else 1
            tables = [
                cell(
                    settings(layer, share=share, batch=given.rows),
                    partial(bounded, share=share, batch=given.rows),
                )
                for layer in given.layers
                for share in given.shares
            ]
            patterns = [
                cell(settings(layer, pattern="2:4"), patterned) for layer in given.layers if given.patterns
            ]
            small = [
                cell(
                    settings(PROVED_LAYER, share=share, order=n, limit=SECONDS, rows=PROVED_ROWS),
                    partial(proved, share=share, n=n),
                )
                for share in PROVED_SHARES
                for n in ORDERS
            ]
    except CbsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{bounds_table(tables)}\n{proved_table(small)}")
    if patterns:
        sys.stdout.write(f"\n{pattern_table(patterns)}")
    draw(small).savefig(given.out / "full_rank.svg", metadata={"Date": None})
    return 0 if all(found["verified"] for found in (*tables, *small, *patterns)) else 1


if __name__ == "__main__":
    sys.exit(main())
