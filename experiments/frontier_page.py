"""Tables and figures of docs/results/frontier.md, from the ledger of `experiments.frontier`.

    python -m experiments.frontier_page --ledger runs/frontier/results.jsonl

Cells of the ledger go into docs/results/frontier.csv, beside the page, in the place of those of the same
settings; the page is made of that file, so that a new ledger need not have what was measured before.
What the page says about them is written by hand and stays; what was measured stands between marks and is
replaced. What was not measured is shown as missing.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from cbs_opt.report.figure_style import INK, dress, marker, numbered_style, panels_legend
from experiments.command_line import experiment_parser
from experiments.frontier import CONTENDERS, DEFAULT_OUT, PLANS, Contender, cells
from experiments.ledger import Ledger, settings_key
from experiments.networks import NETWORKS
from experiments.studies_page import between_marks
from formulations.files import write_atomically

PAGE = Path("docs/results/frontier.md")
FIGURES = Path("docs/figures")
SEEDS = 5
"""The most that are looked for."""
CELL = ["network", "sparsity", "contender", "budget", "seed"]
"""What a cell is known by in the file of all of them."""
MISSING = "not run"
NO_ROOM = "no room"
COSTS = {"samples": "samples differentiated", "processor_seconds": "processor seconds"}
WIDTH = 7.2
HEIGHT = 2.5
LOWEST = 40.0
"""Points of accuracy that a panel reaches down from its best, at most."""


def part(who: Contender) -> str:
    """Return the letter of a contender on the page."""
    if who.recipe is None:
        return "c" if who.gradual else "b"
    return "d" if who.sgd else "a"


def measured(ledger: Ledger, network: str) -> pd.DataFrame:
    """Return a row for every cell of the plan and every seed in the ledger.

    Columns are "sparsity", "contender", "part", "budget" (0 without one), "seed", "commit" ("" where the
    ledger has none), "accuracy" in per cent (NaN where the budget had no room), "samples" and
    "processor_seconds".
    """
    rows = [
        {
            **{name: cell[name] for name in ("sparsity", "contender", "seed")},
            "part": part(CONTENDERS[cell["contender"]]),
            "budget": cell["budget"] or 0,
            "commit": ledger[settings_key(cell)].get("commit", ""),
            **{name: ledger[settings_key(cell)][name] for name in ("accuracy", *COSTS)},
        }
        for cell in cells(network, seeds=SEEDS)
        if settings_key(cell) in ledger
    ]
    columns = ["sparsity", "contender", "seed", "part", "budget", "commit", "accuracy", *COSTS]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": float})


def with_known(rows: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Return rows of all networks, and those of a CSV file, if it is there, of which they have no other."""
    known = [pd.read_csv(path, keep_default_na=False, na_values={"accuracy": ""})] if path.is_file() else []
    return pd.concat([*known, rows]).drop_duplicates(CELL, keep="last").sort_values(CELL, ignore_index=True)


def means(rows: pd.DataFrame) -> pd.DataFrame:
    """Return `measured` rows averaged over seeds, with "spread" (NaN for one seed) and "seeds"."""
    grouped = rows.groupby(["sparsity", "contender", "part", "budget"], sort=False)
    return grouped.agg(
        accuracy=("accuracy", "mean"),
        spread=("accuracy", "std"),
        seeds=("accuracy", "size"),
        samples=("samples", "mean"),
        processor_seconds=("processor_seconds", "mean"),
    ).reset_index()


def section(rows: pd.DataFrame, network: str) -> str:
    """Return what stands between the marks of a network."""
    plan = PLANS[network]
    expected = [(cell["sparsity"], cell["contender"], cell["budget"] or 0) for cell in cells(network)]
    found = means(rows)
    seeds = rows["seed"].nunique()
    commits = sorted(set(rows["commit"]) - {""})
    parts = [
        f"{len(found)} of {len(expected)} cells were measured"
        + (f", with {seeds} seeds at most" if seeds > 1 else ", with one seed")
        + (f'; "{NO_ROOM}": pruning alone takes the budget' if found["accuracy"].isna().any() else "")
        + f". Before pruning: {NETWORKS[network].dense_accuracy:.2f} %."
        + (f" Commits: {', '.join(commits)}." if commits else "")
    ]
    if comparable(found):
        parts.append(f"![Accuracy against samples and against time](../figures/frontier_{network}.svg)")
    for share in plan.sparsities:
        own = found[found["sparsity"] == share]
        parts.append(f"### Sparsity {share:g}")
        if own.empty:
            parts.append("Nothing was measured yet.")
            continue
        parts += ["\n".join(_by_budget(own, plan.budgets)), "\n".join(_by_name(own))]
        parts += _who_is_ahead(own, plan.budgets)
    return "\n\n".join(parts)


def comparable(rows: pd.DataFrame) -> bool:
    """Whether something of ours and something of the rivals was measured, so that there is a picture."""
    parts = set(rows.dropna(subset="accuracy")["part"])
    return bool(parts & {"a", "d"}) and bool(parts & {"b", "c"})


def figure(rows: pd.DataFrame) -> Figure:
    """Return accuracy against samples, left, and processor seconds, right; a line of panels a sparsity.

    Points are joined in the order of budgets.
    """
    found = means(rows).dropna(subset="accuracy")
    shares = sorted(found["sparsity"].unique())
    drawing = Figure(figsize=(WIDTH, 0.9 + HEIGHT * len(shares)), layout="constrained")
    grid = drawing.subplots(len(shares), len(COSTS), squeeze=False, sharey="row", sharex="col")
    for line, share in zip(grid, shares, strict=True):
        own = found[found["sparsity"] == share]
        for axes, cost in zip(line, COSTS, strict=True):
            _panel(axes, own, cost)
        top = float(own["accuracy"].max())
        low = max(float(own["accuracy"].min()), top - LOWEST)
        room = max(0.05 * (top - low), 0.5)
        line[0].set_ylim(low - room, top + room)
        line[0].set_ylabel("test accuracy, %", fontsize=8)
        line[0].set_title(f"sparsity {share:g}", fontsize=9, color=INK, loc="left")
    for axes, label in zip(grid[-1], COSTS.values(), strict=True):
        axes.set_xlabel(label, fontsize=8)
    panels_legend(drawing, list(grid.flat))
    return drawing


def _panel(axes: Axes, own: pd.DataFrame, cost: str) -> None:
    """Draw a line a contender with budgets, and a large marker for a recipe by its name."""
    dress(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}".replace(",", " ")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=7)
    for number, (name, who) in enumerate(CONTENDERS.items()):
        points = own[own["contender"] == name].sort_values(["budget", cost])
        if points.empty:
            continue
        style = numbered_style(number)
        look = marker(style) | ({} if who.budget else {"markersize": 9.0, "zorder": 3})
        line = style.line if who.budget else "none"
        axes.plot(points[cost], points["accuracy"], linestyle=line, label=_label(name), **look)


def _label(name: str) -> str:
    return f"({part(CONTENDERS[name])}) {CONTENDERS[name].label}"


def _by_budget(own: pd.DataFrame, budgets: Sequence[int]) -> Iterator[str]:
    """Yield the lines of the table of contenders by budget, and of the distances between them."""
    yield from _head(
        ["accuracy (processor seconds) with", *(f"{_count(budget)} samples" for budget in budgets)]
    )
    for name, who in CONTENDERS.items():
        if who.budget:
            yield _line([_label(name), *(_shown(_cell(own, name, budget)) for budget in budgets)])
    for label, ours, theirs in (("(a) above (b) and (c)", "a", "bc"), ("(d) above (b)", "d", "b")):
        yield _line([label, *(_signed(_lead(own, ours, theirs, budget)) for budget in budgets)])


def _by_name(own: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the table of recipes by name, each beside the better of the two rivals."""
    rivals = own[own["part"].isin(["b", "c"])].dropna(subset="accuracy")
    within = ["best of (b), (c) with no more samples", "in no more time", "samples with which they get there"]
    yield from _head(["(a) recipe", "accuracy", *COSTS.values(), *within])
    for name, who in CONTENDERS.items():
        if who.budget:
            continue
        cell = _cell(own, name, 0)
        if cell is None:
            yield _line([who.label, *[MISSING] * 6])
            continue
        best = [_best(rivals[rivals[cost] <= cell[cost]]) for cost in COSTS]
        there = rivals.loc[rivals["accuracy"] >= cell["accuracy"], "samples"]
        reached = _count(there.min()) if len(there) else ""
        if not reached and len(rivals):
            reached = f"more than {_count(rivals['samples'].max())}"
        yield _line(
            [
                who.label,
                _accuracy(cell),
                _count(cell["samples"]),
                _seconds(cell["processor_seconds"]),
                *(MISSING if accuracy is None else f"{accuracy:.2f}" for accuracy in best),
                reached or MISSING,
            ]
        )


def _who_is_ahead(own: pd.DataFrame, budgets: Sequence[int]) -> Iterator[str]:
    """Yield a sentence on the budgets at which pruning alone is ahead of both rivals, and where it is not."""
    leads = {budget: _lead(own, "a", "bc", budget) for budget in budgets}
    known = {budget: lead for budget, lead in leads.items() if lead is not None}
    if not known:
        return
    ahead = [_count(budget) for budget, lead in known.items() if lead > 0.0]
    behind = [_count(budget) for budget, lead in known.items() if lead <= 0.0]
    if not behind:
        yield f"Pruning alone is ahead of both rivals at every budget that was run: {_and(ahead)}."
    else:
        yield f"Pruning alone is ahead of both rivals at {_and(ahead)}, and not at {_and(behind)}."


def _lead(own: pd.DataFrame, ours: str, theirs: str, budget: int) -> float | None:
    """Return by how many points the best of ours within a budget is above the best of theirs at it."""
    inside = own["budget"].eq(budget) | (own["budget"].eq(0) & own["samples"].le(budget))
    first, second = (_best(own[inside & own["part"].isin(list(parts))]) for parts in (ours, theirs))
    return None if first is None or second is None else first - second


def _cell(own: pd.DataFrame, contender: str, budget: int) -> pd.Series[Any] | None:
    cell = own[(own["contender"] == contender) & (own["budget"] == budget)]
    return None if cell.empty else cell.iloc[0]


def _best(rows: pd.DataFrame) -> float | None:
    return float(rows["accuracy"].max()) if rows["accuracy"].notna().any() else None


def _shown(cell: pd.Series[Any] | None) -> str:
    if cell is None:
        return MISSING
    if pd.isna(cell["accuracy"]):
        return NO_ROOM
    return f"{_accuracy(cell)} ({_seconds(cell['processor_seconds'])})"


def _accuracy(cell: pd.Series[Any]) -> str:
    return f"{cell['accuracy']:.2f}" + ("" if pd.isna(cell["spread"]) else f" ± {cell['spread']:.2f}")


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", " ")


def _seconds(value: float) -> str:
    return f"{value:.0f}" if value >= 10.0 else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"


def _and(words: Sequence[str]) -> str:
    return ", ".join(words) + " samples" if words else "no budget"


def _head(titles: Iterable[str]) -> Iterator[str]:
    names = list(titles)
    yield _line(names)
    yield _line(["---"] + ["---:"] * (len(names) - 1))


def _line(entries: Iterable[str]) -> str:
    return "| " + " | ".join(entries) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Replace what the page shows of each network, and its figure; returns the exit code."""
    root = experiment_parser("frontier_page", __doc__)
    root.add_argument("--ledger", type=Path, default=DEFAULT_OUT / "results.jsonl")
    root.add_argument("--page", type=Path, default=PAGE, help=f"default {PAGE}")
    root.add_argument("--figures", type=Path, default=FIGURES, help=f"default {FIGURES}")
    given = root.parse_args(arguments)
    known = given.page.with_suffix(".csv")
    if not given.ledger.is_file() and not known.is_file():
        sys.stderr.write(f"--ledger: no file {given.ledger}; make one with python -m experiments.frontier\n")
        return 1
    ledger = Ledger(given.ledger)
    new = pd.concat([measured(ledger, network).assign(network=network) for network in PLANS])
    everything = with_known(new, known)
    text = given.page.read_text(encoding="utf-8")
    for network in PLANS:
        if f"<!-- {network} -->" not in text:
            continue
        rows = everything[everything["network"] == network]
        text = between_marks(text, network, section(rows, network))
        if comparable(rows):
            picture = io.BytesIO()
            # Names of parts of the file are made from this, so that the same numbers give the same file.
            with mpl.rc_context({"svg.hashsalt": "cbs-opt"}):
                figure(rows).savefig(picture, format="svg", metadata={"Date": None})
            given.figures.mkdir(parents=True, exist_ok=True)
            write_atomically(given.figures / f"frontier_{network}.svg", picture.getvalue())
    columns = [*CELL, "part", "accuracy", *COSTS, "commit"]
    write_atomically(known, everything.to_csv(index=False, columns=columns, float_format="%.7g").encode())
    write_atomically(given.page, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
