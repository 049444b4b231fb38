"""Neurons and heads taken out of a language model: perplexity and tokens a second, dense and shrunk.

    python -m experiments.language_structure --cache ~/smollm2
    python -m experiments.language_structure --cache ~/smollm2 --contenders ours magnitude
    python -m experiments.language_structure --page

Protocol
--------
- SmolLM2-135M-Instruct, its texts and its perplexity are those of `experiments.language_model`: calibration
  on the first ``--sequences`` times 512 tokens of the validation text of WikiText-2, perplexity over the
  first 8 x 1 024 tokens of the test text, read once a cell.
- A share of the MLP neurons and of the heads is kept, of either so many over all 30 blocks. The network has
  nine query heads and three key heads a block, each key read by three queries: these four go together, so
  there are 90 groups of heads, and a share of a block of three would be a rough one.

Contenders
----------
- ``ours``: `cbs_opt.prune_groups` with its defaults, which choose how many stay in each block, and move what
  is left on the divergence from the dense network's predictions.
- ``ours_fitted``: the same without that move.
- ``ours_even``: that with the same share of the neurons of every block, and as many heads of each as ours.
- ``reconstruction``: as many of each block, chosen by the squared error of layers' outputs alone, greedily
  and by exchanges, in the manner of OSSCAR; see `experiments.structured`.
- ``magnitude``: as many of each block, those of smallest norm go, and nothing else moves.
- ``magnitude_fitted``: the same groups, and the layers that read them fitted as ours are.
- ``magnitude_moved``: the same, and then moved as ours are.

Timing is that of one core, in processor seconds: the median of passes over a prompt of 512 tokens, and of
tokens that are generated one after the other behind a prompt of 128, with keys and values cached, of one text
and of eight texts together.

Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import cbs_opt
from cbs_opt import GroupRecipe, GroupReport
from cbs_opt.network.data import iterate
from cbs_opt.structure.groups import NEURONS, groups
from cbs_opt.structure.pruning import fitted_layers, refit
from cbs_opt.structure.refinement import follow
from cbs_opt.structure.removal import shrink
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.comparators.page import NOTHING, table
from experiments.comparators.running import Cell, measure_cells
from experiments.data_files import data_file
from experiments.known import commits, keep_known, with_known
from experiments.language_model import CALIBRATION_LENGTH, TEXTS, load_model, perplexity, prepare
from experiments.ledger import Ledger, settings_key
from experiments.structured import PAGE, blank, magnitude_masks
from experiments.studies_page import between_marks
from formulations.errors import ArgumentError
from formulations.files import write_atomically

OUT = Path("runs/language_structure")
MARK = "structured language model"
KNOWN = "language_structure.jsonl"
"""The results behind that part of the page, beside it."""
NETWORK, DENSE = "smollm2", "dense"
SHARES = (0.75,)
OURS = ("ours", "ours_fitted")
LABELS = {
    "ours": "ours",
    "ours_fitted": "ours, without the move",
    "ours_even": "that, equal shares of neurons",
    "reconstruction": "greedy reconstruction",
    "magnitude_moved": "magnitude, moved",
    "magnitude_fitted": "magnitude, fitted",
    "magnitude": "magnitude",
}
TRACED = 23
"""Tokens of the sequences with which the network is traced."""
PROMPT, BEHIND, GENERATED, PASSES = 512, 128, 24, 7
"""Tokens of the prompt that is timed; of that behind which tokens are generated, how many; passes."""
SIDE_BY_SIDE = {"generated": 1, "together": 8}
"""Texts that are generated at the same time."""
TIMINGS = ("prompt", *SIDE_BY_SIDE)


def seconds_a_token(models: Sequence[Any], tokens: Tensor) -> dict[str, list[float]]:
    """Return the median processor time a token of every network, in turns: of `TIMINGS`, by their names."""
    with torch.inference_mode():
        found = {"prompt": _reading(models, tokens[None, :PROMPT])}
        for name, texts in SIDE_BY_SIDE.items():
            found[name] = _generating(models, tokens[: texts * BEHIND].view(texts, BEHIND))
    return found


def _reading(models: Sequence[Any], prompt: Tensor) -> list[float]:
    for model in models:
        model(prompt, logits_to_keep=1)
    spent = np.zeros((PASSES, len(models)))
    for turn, number in np.ndindex(spent.shape):
        start = time.process_time()
        models[number](prompt, logits_to_keep=1)
        spent[turn, number] = (time.process_time() - start) / prompt.numel()
    return np.median(spent, axis=0).tolist()  # type: ignore[no-any-return]


def _generating(models: Sequence[Any], behind: Tensor) -> list[float]:
    states = [model(behind, use_cache=True, logits_to_keep=1) for model in models]
    spent = np.zeros((GENERATED, len(models)))
    for turn, number in np.ndindex(spent.shape):
        token, before = states[number].logits[:, -1:].argmax(-1), states[number].past_key_values
        start = time.process_time()
        states[number] = models[number](token, past_key_values=before, use_cache=True)
        spent[turn, number] = (time.process_time() - start) / len(behind)
    return np.median(spent, axis=0).tolist()  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """The network with its texts, on which cells are measured; `path` is the ledger that holds our widths."""

    cache: Path
    path: Path

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return what a contender made of the network."""
        tokens = load_file(self.cache / "tokens.safetensors")
        model = load_model(self.cache)
        if cell["contender"] == DENSE:
            return {"perplexity": perplexity(model, tokens["test"])}
        count = cell["sequences"]
        calibration = tokens["valid"][: count * CALIBRATION_LENGTH].view(count, CALIBRATION_LENGTH)
        counts = {} if cell["contender"] in OURS else self._counts(cell)
        start = time.process_time()
        small, report = self._small(cell, model, calibration, counts)
        seconds = time.process_time() - start
        sizes = [sum(entry.numel() for entry in network.parameters()) for network in (model, small)]
        found = {
            "perplexity": perplexity(small, tokens["test"]),
            "parameters": sizes,
            "processor_seconds": seconds,
            "seconds_a_token": seconds_a_token((model, small), tokens["valid"]),
        }
        if report is not None:
            found["choices"] = [[name, c.n_keep, c.n_groups, c.loss] for name, c in report.choices.items()]
            found["moved"] = None if report.moved is None else str(report.moved)
        return found

    def _counts(self, cell: Cell) -> dict[str, int]:
        """Return how many groups of each set a rival keeps: as many as ours."""
        ledger = Ledger(self.path)
        for name in OURS:
            key = settings_key({**cell, "contender": name})
            if key in ledger:
                return {name: n_keep for name, n_keep, *_ in ledger[key]["choices"]}
        raise ArgumentError(
            "contenders", f"{cell['contender']} before ours", "measure ours or ours_fitted first"
        )

    def _small(
        self, cell: Cell, model: nn.Module, calibration: Tensor, counts: Mapping[str, int]
    ) -> tuple[nn.Module, GroupReport | None]:
        contender, recipe = cell["contender"], GroupRecipe()
        if contender == "ours":
            return cbs_opt.prune_groups(model, calibration, keep=cell["share"], seed=cell["seed"])
        fitted = GroupRecipe(steps=0)
        if contender == "ours_fitted":
            return cbs_opt.prune_groups(
                model, calibration, keep=cell["share"], recipe=fitted, seed=cell["seed"]
            )
        structure = groups(model, calibration[:2, :TRACED])
        if contender in ("ours_even", "reconstruction"):
            keep = {part.name: counts[part.name] / part.n_groups for part in structure.sets}
            fitted = GroupRecipe(steps=0, metric="outputs", spread="set")
            if contender == "ours_even":
                keep |= {part.name: cell["share"] for part in structure.sets if part.kind == NEURONS}
                fitted = GroupRecipe(steps=0, spread="set")
            return cbs_opt.prune_groups(model, calibration, keep=keep, recipe=fitted, seed=cell["seed"])
        masks, work = magnitude_masks(model, structure.sets, counts), deepcopy(model)
        batches = list(iterate(calibration, batch_size=2))
        if contender == "magnitude_fitted":
            blank(work, structure.sets, masks)
            refit(model, work, fitted_layers(model, structure, ()), batches, recipe.damping)
        small, _ = shrink(work, calibration[:2, :TRACED], keep=masks)
        if contender == "magnitude_moved":
            follow(model, small, batches, recipe.divergence)
        return small, None


def cells(shares: Sequence[float], sequences: int, seeds: int) -> list[Cell]:
    """Return the cells: the dense network, and ours, whose widths the others have, before these."""
    dense: Cell = {"network": NETWORK, "contender": DENSE, "version": 1}
    return [dense] + [
        {
            "network": NETWORK,
            "share": share,
            "contender": contender,
            "sequences": sequences,
            "seed": seed,
            "version": 1,
        }
        for share in shares
        for seed in range(seeds)
        for contender in LABELS
    ]


TITLES = (
    "",
    "perplexity",
    "parameters",
    *(title for name in TIMINGS for title in (f"{name}, dense", name, "times")),
    "seconds",
)


def section(results: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for every share that was measured."""
    parts = []
    dense = next((entry["perplexity"] for entry in results if entry["contender"] == DENSE), None)
    measured = [entry for entry in results if entry["contender"] != DENSE]
    for share, count in dict.fromkeys((entry["share"], entry["sequences"]) for entry in measured):
        own = [entry for entry in measured if (entry["share"], entry["sequences"]) == (share, count)]
        facts = "" if dense is None else f"Dense perplexity {dense:.2f}; "
        facts += f"{count} x {CALIBRATION_LENGTH} tokens; commit {commits(own)}."
        parts += [f"### SmolLM2, {share:g} of the neurons and of the heads", facts]
        rows = [entry for name in LABELS for entry in own if entry["contender"] == name]
        parts.append(table(TITLES, [_line(entry) for entry in rows]))
    return "\n\n".join(parts) or NOTHING


def _line(entry: Mapping[str, Any]) -> list[str]:
    rates = []
    for name in TIMINGS:
        if name in entry["seconds_a_token"]:
            dense, small = (1.0 / seconds for seconds in entry["seconds_a_token"][name])
            rates += [f"{dense:.1f}", f"{small:.1f}", f"{small / dense:.2f}"]
        else:
            rates += ["", "", ""]
    return [
        LABELS[entry["contender"]],
        f"{entry['perplexity']:.1f}",
        f"{entry['parameters'][1] / entry['parameters'][0]:.3f}",
        *rates,
        f"{entry['processor_seconds']:.0f}",
    ]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("language_structure", __doc__)
    root.add_argument("--cache", type=Path, help="folder of the dequantised network")
    root.add_argument("--gguf", type=Path, help="the GGUF file (default: that of the installed package)")
    root.add_argument("--contenders", nargs="+", choices=[*LABELS], default=[*LABELS], help="default: all")
    root.add_argument("--shares", nargs="+", type=float, default=SHARES, help="that are kept (default .75)")
    root.add_argument("--sequences", type=int, default=16, help="of 512 tokens (default 16)")
    root.add_argument("--page", action="store_true", help=f"write tables into {PAGE}, and stop")
    add_run_options(root, seeds=1, out=OUT)
    add_no_verify(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    root = parser()
    given = root.parse_args(arguments)
    path = given.out / "results.jsonl"
    if given.page:
        known = PAGE.with_name(KNOWN)
        results = with_known(known, path)
        page = between_marks(PAGE.read_text(encoding="utf-8"), MARK, section(results))
        keep_known(known, results)
        write_atomically(PAGE, page.encode())
        return 0
    if given.cache is None:
        root.error("--cache: name the folder of the dequantised network")

    def bench() -> Callable[[Cell], dict[str, Any]]:
        texts = {
            name: data_file(file, given.data, verify=not given.no_verify) for name, file in TEXTS.items()
        }
        prepare(given.cache, given.gguf, texts)
        return Bench(cache=given.cache, path=path).measure

    every = cells(given.shares, given.sequences, given.seeds)
    wanted = [cell for cell in every if cell["contender"] in (DENSE, *given.contenders)]
    return measure_cells(path, wanted, bench)


if __name__ == "__main__":
    sys.exit(main())
