"""Tables and figures of the pages on comparators, from their ledgers.

    python -m experiments.comparators.page autoprune admm

Results join those in the file beside the page, see `experiments.known`.
What a page says about them is written by hand and stays; what was measured stands between marks and is
replaced.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cbs_opt.report.figure_style import legend, marker, numbered_style, panels, panels_legend, single
from experiments.command_line import experiment_parser
from experiments.comparators.gradient_flow import MEASURES
from experiments.comparators.running import DEFAULT_OUT
from experiments.known import BESIDE, commits, keep_known, with_known
from experiments.studies_page import SEED, between_marks
from formulations.files import write_atomically

FIGURES = Path("docs/figures")
MARGIN = 0.3
"""Points that a price may cost on the images held out."""
NOTHING = "Nothing was measured yet."
LABELS: Mapping[str, str] = {
    "autoprune": "AutoPrune",
    "magnitude_sgd": "magnitude, then SGD",
    "gradual_sgd": "gradual magnitude with SGD",
    "fast": '`"fast"`',
    "balanced": '`"balanced"`',
    "best": '`"best"`',
    "magnitude": "magnitude",
    "loss": "loss preservation",
    "gradient_norm": "gradient norm",
    "grasp": "signed GraSP",
    "factors": "factors",
    "retrained": "all kept weights retrained",
    "alone": "a copy a task",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is shown of a comparator: a section of text, and a picture with its caption."""

    section: Callable[[pd.DataFrame], str]
    draw: Callable[[pd.DataFrame], Figure]
    caption: str


def autoprune_section(rows: pd.DataFrame) -> str:
    """Return the table of AutoPrune and others: weights left, accuracy and cost."""
    titles = ["", "price", "weights left", "times fewer", "accuracy", "below dense", "came back", "images"]
    lines = []
    for label, own in _autoprune_series(rows):
        for setting, group in own.groupby("setting", sort=True):
            lines.append(
                [
                    label,
                    f"{setting:g}" if "coarse" in group else "",
                    _count(group["kept"].mean()),
                    f"{group['fewer'].mean():.1f}",
                    _mean(group["accuracy"]),
                    f"{(group['dense_accuracy'] - group['accuracy']).mean():.2f}",
                    "" if group["recovered"].isna().all() else _count(group["recovered"].mean()),
                    _count(group["samples"].mean()),
                    f"{group['processor_seconds'].mean():.0f}",
                ]
            )
    return "\n\n".join([_facts(rows), table([*titles, "seconds"], lines), *_chosen_price(rows)])


def _chosen_price(rows: pd.DataFrame) -> list[str]:
    """Return a sentence on the price that the images held out choose, if they were looked at.

    Where the accuracies on them are gone, "within" of a result says whether its price was within the margin.
    """
    own = rows[rows["contender"] == "autoprune"]
    for column in ("held_out", "within"):
        if column not in own:
            own = own.assign(**{column: None})
    own = own[own["held_out"].notna() | own["within"].notna()]
    if own.empty:
        return []
    method = pd.DataFrame(list(own["method"]), index=own.index)
    own = own.assign(
        price=method["price"],
        coarse=method["coarse"],
        plan=method["samples"],
        loses=[
            (0.0 if said else math.inf) if isinstance(said, bool) else pair[0] - pair[1]
            for said, pair in zip(own["within"], own["held_out"], strict=True)
        ],
    )
    means = own.groupby(["price", "coarse", "plan"])[
        ["loses", "kept", "n", "accuracy", "dense_accuracy"]
    ].mean()
    within = means[means["loses"] <= MARGIN + 1e-9]
    if within.empty:
        return [f"No price is within {MARGIN:g} points of the dense network on the images held out."]
    best = within.loc[within["kept"].idxmin()]
    price, coarse, _ = best.name
    said = f"a price of {price:g} ({str(coarse).replace('_', ' ')}) leaves the fewest weights"
    return [
        f"On the images held out {said} of those within {MARGIN:g} points of the dense network: "
        f"{best['n'] / best['kept']:.1f} times fewer, {best['dense_accuracy'] - best['accuracy']:.2f} points "
        "below it on the test set."
    ]


def autoprune_figure(rows: pd.DataFrame) -> Figure:
    """Return accuracy against the number of times that there are fewer weights."""
    figure, axes = single(3.0)
    for number, (label, own) in enumerate(_autoprune_series(rows)):
        own = own.groupby("setting")[["fewer", "accuracy"]].mean().sort_values("fewer")
        _line(axes, number, own["fewer"], own["accuracy"], label)
    axes.axhline(float(rows["dense_accuracy"].iloc[0]), color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times fewer weights")
    axes.set_ylabel("test accuracy, %")
    legend(axes)
    return figure


def _autoprune_series(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield contenders with their rows, "fewer" and "setting" among them; other images, another series."""
    rows = rows.assign(fewer=rows["n"] / rows["kept"].clip(lower=1))
    for column in ("recovered", "sparsity", "method"):
        if column not in rows:
            rows[column] = None
    for contender in [name for name in LABELS if name in set(rows["contender"])]:
        own = rows[rows["contender"] == contender]
        if contender != "autoprune":
            yield LABELS[contender], own.assign(setting=own["sparsity"])
            continue
        method = pd.DataFrame(list(own["method"]), index=own.index)
        own = own.assign(setting=method["price"], coarse=method["coarse"], plan=method["samples"])
        for (coarse, images), some in own.groupby(["coarse", "plan"]):
            label = f"{LABELS[contender]}, {str(coarse).replace('_', ' ')}"
            yield (f"{label}, 3 x {_count(images)}" if own["plan"].nunique() > 1 else label), some


def admm_section(rows: pd.DataFrame) -> str:
    """Return a table of stages for each share of rows that stays, and for each rho."""
    titles = ["after", "weights", "times fewer", "bits", "accuracy", "below dense"]
    parts = [_facts(rows)]
    for (share, rho, bits), own in _by_method(rows, "share", "rho", "bits"):
        lines = [
            [
                name,
                _count(stages["weights"].mean()),
                f"{(own['n'].mean() / stages['weights'].mean()):.1f}",
                str(stages["bits"].iloc[0]),
                _mean(stages["accuracy"]),
                f"{own['dense_accuracy'].mean() - stages['accuracy'].mean():.2f}",
            ]
            for name, stages in _stages(own)
        ]
        distances = pd.DataFrame(list(own["distances"])).mean()
        units = pd.DataFrame(list(own["units"])).mean()
        left = ", ".join(f"{name.removesuffix('.weight')} {count:.0f}" for name, count in units.items())
        parts.append(f"### A share of {share:g} of the rows, rho from {rho:g}, {bits} bits")
        parts.append(table(titles, lines))
        seconds = f"{own['processor_seconds'].mean():.0f} processor seconds"
        parts.append(
            f"Units left: {left}. W was {distances[0]:.3f} of its norm away from Z before rows went, and "
            f"{distances[1]:.5f} before weights were put on levels. {_count(own['samples'].mean())} images, "
            f"{seconds}."
        )
    return "\n\n".join(parts)


def admm_figure(rows: pd.DataFrame) -> Figure:
    """Return accuracy against the number of times that there are fewer weights, by stage."""
    figure, axes = single(3.0)
    points: dict[str, list[tuple[float, float]]] = {}
    for _, own in _by_method(rows, "share", "rho", "bits"):
        for name, stages in _stages(own):
            fewer = float(own["n"].mean() / stages["weights"].mean())
            points.setdefault(name, []).append((fewer, float(stages["accuracy"].mean())))
    dense = points.pop("dense")[0][1]
    for number, (name, found) in enumerate(points.items()):
        _line(axes, number, *zip(*sorted(found), strict=True), name)
    axes.axhline(dense, color="#888888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times fewer weights")
    axes.set_ylabel("test accuracy, %")
    legend(axes)
    return figure


def _by_method(rows: pd.DataFrame, *fields: str) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Yield rows that agree in fields of their method, the highest first."""
    method = pd.DataFrame(list(rows["method"]), index=rows.index)
    for key, index in sorted(method.groupby(list(fields)).groups.items(), reverse=True):
        yield key, rows.loc[index]


def _stages(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name of each stage and what it was in each row, in order."""
    every = pd.DataFrame([stage for stages in rows["stages"] for stage in stages])
    for name, stages in every.groupby("name", sort=False):
        yield str(name), stages


def gradient_flow_section(rows: pd.DataFrame) -> str:
    """Return two tables for each sparsity: accuracy in the end and soon, and what pruning does at once."""
    parts = [_facts(rows)]
    for share, own in rows.groupby("sparsity"):
        moments = sorted(own["moment"].unique())
        titles = ["pruned after, epochs", *(f"{moment:g}" for moment in moments)]
        ends, changes = [], []
        for measure in MEASURES:
            cells = [own[(own["contender"] == measure) & (own["moment"] == moment)] for moment in moments]
            ends.append(
                [LABELS[measure], *(_two(cell["accuracy"], cell["accuracy_soon"], ".2f") for cell in cells)]
            )
            changes.append(
                [
                    LABELS[measure],
                    *(
                        _two(
                            cell["loss_after"] - cell["loss_before"],
                            cell["norm_after"] / cell["norm_before"],
                            ".2f",
                        )
                        for cell in cells
                    ),
                ]
            )
        parts += [
            f"### Sparsity {share:g}",
            "Test accuracy in the end (an epoch after pruning):",
            table(titles, ends),
            "By how much pruning raises the loss at once (norm of the gradient after over before):",
            table(titles, changes),
        ]
    return "\n\n".join(parts)


def gradient_flow_figure(rows: pd.DataFrame) -> Figure:
    """Return accuracy in the end against the moment of pruning, a panel a sparsity."""
    shares = sorted(rows["sparsity"].unique())
    figure, every = panels(len(shares), "pruned after, epochs", "test accuracy, %")
    for axes, share in zip(every, shares, strict=True):
        for number, measure in enumerate(MEASURES):
            own = rows[(rows["sparsity"] == share) & (rows["contender"] == measure)]
            means = own.groupby("moment")["accuracy"].mean()
            _line(axes, number, means.index, means, LABELS[measure])
        axes.set_title(f"sparsity {share:g}", fontsize=8)
    panels_legend(figure, every)
    return figure


def incremental_section(rows: pd.DataFrame) -> str:
    """Return the table of contenders: mean accuracy over tasks, forgetting, and numbers added."""
    titles = [
        "",
        "mean accuracy",
        "task 0",
        "last task",
        "forgetting",
        "numbers added",
        "of the kept",
        "seconds",
    ]
    lines = []
    for label, own in _incremental_series(rows):
        last = pd.DataFrame([entry[-1] for entry in own["table"]])
        lines.append(
            [
                label,
                _mean(own["accuracy"]),
                f"{last.iloc[:, 0].mean():.2f}",
                f"{last.iloc[:, -1].mean():.2f}",
                f"{own['forgetting'].mean():.2f}",
                _count(own["added"].mean()),
                f"{(own['added'] / own['kept']).mean():.2f}",
                f"{own['processor_seconds'].mean():.0f}",
            ]
        )
    return _facts(rows) + "\n\n" + table(titles, lines)


def incremental_figure(rows: pd.DataFrame) -> Figure:
    """Return the mean accuracy over the tasks so far against their number."""
    figure, axes = single(3.0)
    for number, (label, own) in enumerate(_incremental_series(rows)):
        means = [[sum(row) / len(row) for row in entry] for entry in own["table"]]
        height = pd.DataFrame(means).mean()
        _line(axes, number, [task + 1 for task in height.index], height, label)
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("mean test accuracy, %")
    legend(axes, outside=True)
    return figure


def _incremental_series(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for (contender, rank), own in rows.groupby(["contender", "rank"], sort=False):
        yield LABELS[contender] + (f", rank {rank}" if rank else ""), own


PAGE: Mapping[str, Page] = {
    "autoprune": Page(
        section=autoprune_section,
        draw=autoprune_figure,
        caption="Accuracy against times fewer weights; the grey line is the dense network",
    ),
    "admm": Page(
        section=admm_section,
        draw=admm_figure,
        caption="Accuracy against times fewer weights after each stage; the grey line is the dense network",
    ),
    "gradient_flow": Page(
        section=gradient_flow_section,
        draw=gradient_flow_figure,
        caption="Accuracy in the end against the moment of pruning",
    ),
    "incremental": Page(
        section=incremental_section,
        draw=incremental_figure,
        caption="Mean accuracy over the tasks so far against their number",
    ),
}


def table(titles: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose first column is text and whose others are numbers."""
    names = list(titles)
    rule = ["---"] + ["---:"] * (len(names) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rule, *lines))


def _facts(rows: pd.DataFrame) -> str:
    """Return how the rows came about."""
    count = rows["seed"].nunique()
    dense = f"Dense {rows['dense_accuracy'].mean():.2f} %; " if "dense_accuracy" in rows else ""
    return f"{dense}{count} seed{'s' if count > 1 else ''}; commit {commits(rows.to_dict('records'))}."


def _line(axes: Axes, number: int, x: Any, y: Any, label: str) -> None:
    style = numbered_style(number)
    axes.plot(list(x), list(y), linestyle=style.line, label=label, **marker(style))


def _mean(values: pd.Series[float]) -> str:
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread}"


def _two(first: pd.Series[float], second: pd.Series[float], form: str) -> str:
    return f"{first.mean():{form}} ({second.mean():{form}})" if len(first) else "not run"


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def written(name: str, results: Sequence[Mapping[str, Any]], page: str) -> tuple[str, dict[str, bytes]]:
    """Return a page with its measured part replaced, and its pictures as SVG by file name, one a network."""
    shown, parts, pictures = PAGE[name], [], {}
    networks = dict.fromkeys(entry["network"] for entry in results)
    for network in networks:
        rows = pd.DataFrame([dict(entry) for entry in results if entry["network"] == network])
        picture = io.BytesIO()
        # Names of parts of the file are made from this, so that the same numbers give the same file.
        with mpl.rc_context({"svg.hashsalt": SEED}):
            shown.draw(rows).savefig(picture, format="svg", metadata={"Date": None})
        file = f"{name}_{network}.svg"
        pictures[file] = picture.getvalue()
        parts += [f"## {network}", shown.section(rows)]
        parts += [f"![{shown.caption}](../figures/{file})", f"{shown.caption}."]
    return between_marks(page, name, "\n\n".join(parts) or NOTHING), pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace what pages show, and their figures; returns the exit code."""
    root = experiment_parser("comparators.page", __doc__)
    root.add_argument("names", nargs="+", choices=list(PAGE))
    root.add_argument(
        "--ledgers", type=Path, default=DEFAULT_OUT, help=f"their folder, default {DEFAULT_OUT}"
    )
    root.add_argument("--pages", type=Path, default=BESIDE, help=f"default {BESIDE}")
    root.add_argument("--figures", type=Path, default=FIGURES, help=f"default {FIGURES}")
    given = root.parse_args(arguments)
    for name in given.names:
        ledger, path = given.ledgers / f"{name}.jsonl", given.pages / f"{name}.md"
        known = path.with_suffix(".jsonl")
        results = with_known(known, ledger)
        if not results:
            sys.stderr.write(
                f"--ledgers: no file {ledger}; python -m experiments.comparators.{name} makes it\n"
            )
            return 1
        text, pictures = written(name, results, path.read_text(encoding="utf-8"))
        given.figures.mkdir(parents=True, exist_ok=True)
        for file, picture in pictures.items():
            write_atomically(given.figures / file, picture)
        keep_known(known, results)
        write_atomically(path, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
