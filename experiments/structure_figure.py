"""Structure side by side: accuracy against parameters and against measured time, on one picture.

    python -m experiments.structured
    python -m experiments.comparators.admm
    python -m experiments.comparators.autoprune
    python -m experiments.structure_figure

Accuracies and counts are those of the files beside the pages of the commands above (see `experiments.known`)
and of their ledgers; this one trains and prunes nothing. Contenders of `experiments.structured` are not
trained after pruning, those of `experiments.comparators` are. Times of the former are in their ledger. ADMM's
are measured here, on networks of the widths that it left, by turns with the dense one. AutoPrune leaves zeros
in tensors of the same size, which take as long as before.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from cbs_opt.report.figure_style import marker, numbered_style, panels, panels_legend
from cbs_opt.structure.groups import groups
from cbs_opt.structure.removal import shrink
from experiments.command_line import experiment_parser
from experiments.comparators.page import FIGURES, table
from experiments.comparators.running import DEFAULT_OUT, Cell, measure_cells
from experiments.comparators.subjects import fresh
from experiments.known import keep_known, with_known
from experiments.ledger import settings_key
from experiments.structured import EVEN, LABELS, OUT, PAGE, PROVED, TIMED, milliseconds
from experiments.studies_page import SEED, between_marks
from formulations.files import write_atomically

FIGURE = "structure.svg"
TURNS = 101
"""Passes of each network that is timed here: small ones take a tenth of a millisecond."""
MARK = "side by side"
WIDTHS = "widths.jsonl"
"""Milliseconds of networks of the widths that ADMM left."""
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
NETWORKS = {"mlpnet_mnist": "MLPNet", "resnet20_cifar10": "ResNet20", "lenet5": "LeNet-5"}
TRAINED = {"admm": "ADMM, trained", "autoprune": "AutoPrune, trained"}
TITLES = ("", "accuracy", "below dense", "parameters", "milliseconds")
CAPTION = (
    "Accuracy against what is left of parameters and of measured time; the grey line is the dense network"
)


def width_cells(admm: Iterable[Mapping[str, Any]]) -> list[Cell]:
    """Return a cell for the widths that each run of ADMM left."""
    return [{"network": entry["network"], "units": entry["units"], "images": TIMED} for entry in admm]


def measured_widths(cell: Cell) -> dict[str, Any]:
    """Return the milliseconds of a network, dense and with as many units as a cell says of each layer."""
    network = fresh(cell["network"], 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(cell["images"], *SHAPES[network.dataset], generator=generator)
    structure = groups(network.model, images[:2])
    counts = {name.removesuffix(".weight"): count for name, count in cell["units"].items()}
    masks = {
        part.name: np.arange(part.n_groups) < counts.get(part.name, part.n_groups) for part in structure.sets
    }
    small, _ = shrink(network.model, images[:2], keep=masks)
    return {"milliseconds": milliseconds((network.model, small), images, TURNS)}


def points(
    structured: Iterable[Mapping[str, Any]],
    admm: Iterable[Mapping[str, Any]],
    widths: Iterable[Mapping[str, Any]],
    autoprune: Iterable[Mapping[str, Any]],
) -> pd.DataFrame:
    """Return a row a point: accuracies, and the shares of parameters and time left; means over seeds."""
    seconds = {(entry["network"], str(entry["units"])): entry["milliseconds"] for entry in widths}

    def found() -> Iterator[tuple[Any, ...]]:
        for entry in structured:
            name = entry["contender"]
            if name != PROVED and not name.endswith(EVEN):
                said = f"{entry['budget']} {entry['share']}"
                yield _point(entry, LABELS[name], said, *entry["parameters"], *entry["milliseconds"])
        for entry in admm:
            time, said = (
                seconds[entry["network"], str(entry["units"])],
                str({**entry["method"], "seed": None}),
            )
            yield _point(entry, TRAINED["admm"], said, entry["n"], entry["kept"], *time)
        for entry in autoprune:
            if entry["contender"] == "autoprune":
                said = str({**entry["method"], "seed": None})
                yield _point(entry, TRAINED["autoprune"], said, entry["n"], entry["kept"], 1.0, 1.0)

    columns = ["network", "label", "setting", "accuracy", "dense", "parameters", "milliseconds"]
    rows = pd.DataFrame(found(), columns=columns)
    return rows.groupby(columns[:3], sort=False).mean().reset_index()


def _point(entry: Mapping[str, Any], label: str, setting: str, *sizes: float) -> tuple[Any, ...]:
    """Return a row of `points` from sizes before and after."""
    whole, left, before, after = sizes
    accuracy = entry["accuracy"], entry["dense_accuracy"]
    return (entry["network"], label, setting, *accuracy, left / whole, after / before)


def picture(rows: pd.DataFrame) -> Figure:
    """Return two rows of panels, one panel a network: accuracy against parameters, and against time."""
    networks = list(dict.fromkeys(rows["network"]))
    labels = list(dict.fromkeys(rows["label"]))
    sides = [(network, side) for side in ("parameters", "milliseconds") for network in networks]
    figure, every = panels(len(sides), "share that is left", "test accuracy, %")
    for axes, (network, side) in zip(every, sides, strict=True):
        own = rows[rows["network"] == network]
        for number, label in enumerate(labels):
            some = own[own["label"] == label].sort_values(side)
            if len(some):
                style = numbered_style(number)
                axes.plot(some[side], some["accuracy"], linestyle=style.line, label=label, **marker(style))
        axes.axhline(float(own["dense"].iloc[0]), color="#888888", linewidth=0.8)
        axes.set_xlim(0.0, 1.05)
        axes.set_title(f"{NETWORKS.get(network, network)}, {side}", fontsize=8)
    panels_legend(figure, every)
    return figure


def section(rows: pd.DataFrame) -> str:
    """Return the picture and the table of its points."""
    parts = [f"![{CAPTION}](../figures/{FIGURE})", f"{CAPTION}."]
    for network, own in rows.groupby("network", sort=False):
        lines = [
            [
                row.label,
                f"{row.accuracy:.2f}",
                f"{row.dense - row.accuracy:.2f}",
                f"{row.parameters:.3f}",
                f"{row.milliseconds:.2f}",
            ]
            for row in own.sort_values("parameters", ascending=False).itertuples()
        ]
        parts += [f"### {NETWORKS.get(network, network)}, what is left", table(TITLES, lines)]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    root = experiment_parser("structure_figure", __doc__)
    root.add_argument("--structured", type=Path, default=OUT, help=f"folder of its ledger, default {OUT}")
    root.add_argument(
        "--ledgers", type=Path, default=DEFAULT_OUT, help=f"of ADMM and AutoPrune, default {DEFAULT_OUT}"
    )
    root.add_argument("--page", type=Path, default=PAGE, help=f"default {PAGE}")
    root.add_argument("--figures", type=Path, default=FIGURES, help=f"default {FIGURES}")
    given = root.parse_args(arguments)
    found = {}
    for name, folder in ("structured", given.structured), *((name, given.ledgers) for name in TRAINED):
        file = folder / f"{name}.jsonl"
        found[name] = with_known(given.page.with_name(file.name), file)
        if not found[name]:
            place = "" if name == "structured" else "comparators."
            sys.stderr.write(f"no file {file}; python -m experiments.{place}{name} makes it\n")
            return 1
    known, timed = given.page.with_name(WIDTHS), given.ledgers / WIDTHS
    have = {entry["key"] for entry in with_known(known)}
    wanted = [cell for cell in width_cells(found["admm"]) if settings_key(cell) not in have]
    code = measure_cells(timed, wanted, lambda: measured_widths)
    if code:
        return code
    widths = with_known(known, timed)
    rows = points(found["structured"], found["admm"], widths, found["autoprune"])
    drawn = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": SEED}):
        picture(rows).savefig(drawn, format="svg", metadata={"Date": None})
    given.figures.mkdir(parents=True, exist_ok=True)
    write_atomically(given.figures / FIGURE, drawn.getvalue())
    page = between_marks(given.page.read_text(encoding="utf-8"), MARK, section(rows))
    keep_known(known, widths)
    write_atomically(given.page, page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
