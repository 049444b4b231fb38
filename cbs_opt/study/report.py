"""A study as one self-contained HTML page and a Markdown file, its tables, and its pictures for a paper."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from cbs_opt.report.html import Picture, embedded, render
from cbs_opt.report.tables import Column, Table
from cbs_opt.study import figures, statistics
from cbs_opt.study.errors import FAILURES, UNAVAILABLE, StudyFolderError
from cbs_opt.study.results import Results
from cbs_opt.study.statistics import HEURISTIC, SHIFT_NODES, SHIFT_SECONDS, Effect, shifted_geometric_mean
from formulations.files import write_atomically
from formulations.problem import PROGRAMS

HTML = "report.html"
MARKDOWN = "report.md"
FORMATS = ("png", "svg", "pdf")
RESOLUTION = 200
"""Of PNG pictures, in dots an inch."""

PROGRAM_NOTES = {
    "selection": "Selection program: kept weights do not move",
    "joint": "Joint program: kept weights are adjusted",
}
METHODS_NOTE = (
    "Options not named are at the first value that the study gives. "
    f"Time and nodes: shifted geometric means (shifts {SHIFT_SECONDS:g} s and {SHIFT_NODES:g}); an exact "
    "method that proved nothing counts with its whole time limit. Open gap: median over the runs with a "
    "bound and no proof. Excess: objective over the proved optimum, mean, median and worst over the blocks "
    "that have a proof in this study; 0 within the tolerance of that proof. Failed: no usable answer."
)
EFFECTS_NOTE = (
    "Geometric means over pairs of runs that differ in this option alone; below 1 the second value is "
    f"better. Percentile bootstrap over blocks, {statistics.RESAMPLES} resamples."
)
PROFILE = (
    "Performance profile (Dolan and Moré 2002): share of the cases (block and seed) that a method proves "
    "optimal within a factor of the fastest method's time. A case without a proof counts as infinite. "
    f"Legend: cases proved. Of more than {figures.MOST_LINES} methods, those that prove most and fastest."
)
GAP = (
    "Gap between incumbent and bound, median over the cases; 100 % before the first bound. A method "
    "without a trace is a step at the end of its run. "
    f"Of more than {figures.MOST_LINES} methods, those that close it first."
)
TRACES = (
    "Incumbent (solid, filled marks) and bound (dashed, hollow marks) relative to the best objective "
    "known, on the blocks with the longest traces; the vertical axis is linear within 0.1 %."
)
EXCESS = (
    "Objective of each heuristic over the proved optimum, a mark a run; at the left end: indistinguishable "
    "from the optimum at the tolerance of the proof, and in brackets how many of the runs are."
)
AGAINST = "Mean excess over the proved optimum against {what}; bars: 95 % bootstrap interval over blocks."
EFFECTS = (
    "Effect of each option, all else equal: geometric mean of the factor by which time, nodes or objective "
    "changes; bars: 95 % bootstrap interval over blocks."
)
AXES = {
    "n": ("the size of the block", "Weights in the block, n"),
    "damping": ("the damping", "Damping added to the diagonal of H"),
    "sparsity": ("the sparsity", "Sparsity (share of the weights pruned)"),
}


class Drawing(NamedTuple):
    """A figure, a name for its file, and what it shows."""

    name: str
    figure: Figure
    caption: str


def percent_text(share: float) -> str:
    """Return a share in per cent, to two digits below ten."""
    return f"{100.0 * share:.0f} %" if share >= 0.1 or share == 0.0 else f"{100.0 * share:.2g} %"


METHODS = (
    *(Column(name=name) for name in ("Method", "Runs", "Proved", "Failed")),
    Column(name="Time (s)", show="{:.3g}".format),
    Column(name="Nodes", show="{:.0f}".format),
    *(Column(name=name, show=percent_text) for name in ("Open gap", "Excess", "Median", "Worst")),
)
TIME_COLUMN, EXCESS_COLUMN = 4, 7
"""Columns of `METHODS` whose best cells are stressed."""
EFFECT_COLUMNS = (
    Column(name="Method"),
    *(Column(name=name, text=True) for name in ("Option", "From", "To", "Measure")),
    Column(name="Factor", show="{:.3g}".format),
    *(Column(name=name) for name in ("95 % interval", "Pairs", "Blocks")),
)
ENDINGS = (
    Column(name="Method"),
    Column(name="Ending", text=True, show=lambda status: status.replace("_", " ")),
    Column(name="Runs"),
    Column(name="Reason given first", text=True, show=lambda note: note[:160]),
)
SETTINGS = ("time_limit", "rel_gap", "node_limit", "iteration_limit", "threads", "memory_gib", "grace")


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of the report on one program; `runs` are its rows, with labels."""

    program: str
    runs: pd.DataFrame
    effects: list[Effect]

    @property
    def title(self) -> str:
        """The heading."""
        return PROGRAM_NOTES[self.program]

    @property
    def tables(self) -> Iterator[tuple[str, Table, str]]:
        """Heading, table and note, those that have something to show."""
        yield "", methods_table(self.runs), f"{METHODS_NOTE} {_clock_note(self.runs)}"
        if changed := effects_table(self.effects):
            yield "Effects of options", changed, EFFECTS_NOTE
        if ended := endings_table(self.runs):
            yield "Runs without a usable answer", ended, ""

    @property
    def pictures(self) -> list[Picture]:
        """The drawings, to be put into a page."""
        return [embedded(drawing.figure, drawing.caption) for drawing in self.drawings()]

    def drawings(self) -> list[Drawing]:
        """Return every picture that the rows have something to show in."""
        # Blocks of several sizes round the same sparsity differently: brought to twentieths.
        sparsity = (20.0 * self.runs["n_prune"] / self.runs["n"].clip(lower=1)).round() / 20.0
        runs = self.runs.assign(sparsity=sparsity)
        pictures = [
            ("profile", figures.profile_figure(runs), PROFILE),
            ("gap", figures.gap_figure(runs), GAP),
            ("traces", figures.traces_figure(runs), TRACES),
            ("excess", figures.excess_figure(runs), EXCESS),
            ("effects", figures.effects_figure(self.effects), EFFECTS),
        ]
        for column, (what, title) in AXES.items():
            figure = figures.excess_against_figure(runs, column, title)
            pictures.append((f"excess_{column}", figure, AGAINST.format(what=what)))
        return [Drawing(name, figure, caption) for name, figure, caption in pictures if figure is not None]


def sections(table: pd.DataFrame) -> list[Section]:
    """Return a section for each program that has rows; `table` with labels."""
    posed = {program: table[table["program"] == program] for program in PROGRAMS}
    return [
        Section(program=program, runs=runs, effects=statistics.effects(runs))
        for program, runs in posed.items()
        if not runs.empty
    ]


def write_report(results: Results, folder: Path, *, pictures: str | None = None) -> list[Path]:
    """Write ``report.html`` and ``report.md``, each in one step.

    Raises `StudyFolderError` if no run is done yet. `results`: see `cbs_opt.study.results.read_results`.
    `folder`: exists. `pictures`: write each picture to a file of its own too, for a paper.
    """
    contents = {HTML: render_html(results).encode(), MARKDOWN: render_markdown(results).encode()}
    for section in sections(_labelled(results)) if pictures is not None else ():
        for drawing in section.drawings():
            stream = io.BytesIO()
            drawing.figure.savefig(stream, format=pictures, dpi=RESOLUTION)
            contents[f"{section.program}_{drawing.name}.{pictures}"] = stream.getvalue()
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def render_html(results: Results) -> str:
    """Return the page; everything is in it, nothing is fetched."""
    table = _labelled(results)
    return render(
        "study.html.j2",
        package="cbs_opt.study",
        title=results.name,
        lead=_lead(results),
        description=results.description,
        sections=sections(table),
        settings=settings_table(table),
        notes=_notes(results, table),
    )


def render_markdown(results: Results) -> str:
    """Return the tables as Markdown, without pictures."""
    table = _labelled(results)
    parts = [f"# {results.name}", _lead(results), results.description]
    for section in sections(table):
        parts.append(f"## {section.title}")
        for heading, content, note in section.tables:
            parts += [heading and f"### {heading}", content.markdown(), note]
    parts += ["## Settings", settings_table(table).markdown(), *_notes(results, table)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _labelled(results: Results) -> pd.DataFrame:
    if results.table.empty:
        raise StudyFolderError("folder", f"no run of {results.name!r} is done", "run `cbs-opt study` first")
    return statistics.with_labels(results.table)


def _lead(results: Results) -> str:
    table = results.table
    text = (
        f"{len(table)} of {results.planned} runs: {table['method'].nunique()} methods on "
        f"{table['instance'].nunique()} blocks of {table['n'].min()} to {table['n'].max()} weights."
    )
    if len(table) < results.planned:
        text += f" {results.planned - len(table)} runs are not done, so the comparison is incomplete."
    return text


def _clock_note(table: pd.DataFrame) -> str:
    """Say which time is meant, and how much of a processor the runs had."""
    share = statistics.processor_share(table)
    had = "" if math.isnan(share) else f" Runs of .1 s and more had {share:.0%} of one in the median."
    if statistics.clock(table) == statistics.PROCESSOR:
        return f"Time is processor time; limits, gaps and traces go by the wall clock.{had}"
    return f"Time is wall-clock time.{had}"


def _notes(results: Results, table: pd.DataFrame) -> list[str]:
    notes = [f"Left out: {reason}." for reason in results.left_out]
    if absent := unavailable_only(table):
        notes.append(f"Not available on this machine: {', '.join(absent)}.")
    if results.others:
        notes.append(f"{results.others} earlier rows belong to no run of this study and are not shown.")
    return notes


def methods_table(table: pd.DataFrame) -> Table:
    """Return one row a method: how many runs ended how, shifted geometric means, gaps and excesses.

    Of one program, with labels. Bold: the shortest time among the methods that proved most, and the
    least mean excess of a heuristic.
    """
    rows: list[tuple[Any, ...]] = []
    excesses: dict[int, float] = {}
    rated = statistics.with_excess(table.assign(charged=statistics.charged_seconds(table)))
    for label, runs in rated.groupby("label", sort=False):
        heuristic = runs["kind"].isin(HEURISTIC).all()
        nodes = shifted_geometric_mean(runs["nodes"].dropna().to_numpy(float), SHIFT_NODES)
        if heuristic and runs["excess"].notna().any():
            excesses[len(rows)] = runs["excess"].mean()
        proved, failed = runs["proved"].sum(), runs["status"].isin(FAILURES).sum()
        seconds = shifted_geometric_mean(runs["charged"].to_numpy(float), SHIFT_SECONDS)
        counts = (len(runs), None if heuristic else proved, failed, seconds, None if heuristic else nodes)
        open_gap = runs.loc[~runs["proved"] & runs["bound"].notna(), "gap"].median()
        rows.append((label, *counts, open_gap, *runs["excess"].agg(["mean", "median", "max"])))
    best = {(i, EXCESS_COLUMN) for i, excess in excesses.items() if excess == min(excesses.values())}
    ranks = list(statistics.ranking(table).values())
    if ranks and min(ranks)[0] < 0:
        best.add((ranks.index(min(ranks)), TIME_COLUMN))
    return _table(METHODS, rows, best=frozenset(best))


def endings_table(table: pd.DataFrame) -> Table | None:
    """Return how often runs ended without a usable answer, with one of the reasons; None if none did."""
    failed = table[table["status"].isin(FAILURES)].groupby(["label", "status"], sort=False)
    rows = [(*what, len(runs), runs["note"].iloc[0]) for what, runs in failed]
    return _table(ENDINGS, rows, wrap=True) if rows else None


def effects_table(effects: Sequence[Effect]) -> Table | None:
    """Return the factors by which options change time, nodes or objective; None if none varied."""
    rows = [
        (*e.change, e.measure, e.ratio.value, f"{e.ratio.low:.3g} to {e.ratio.high:.3g}", e.pairs, e.blocks)
        for e in effects
    ]
    return _table(EFFECT_COLUMNS, rows) if rows else None


def settings_table(table: pd.DataFrame) -> Table:
    """Return limits, versions and machines; several values mean that the rows do not compare."""
    names = [*SETTINGS, *(name for name in table.columns if name.startswith(("version.", "machine.")))]
    rows = []
    for name in names:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in table[name].dropna()]
        if values:
            rows.append((name.replace("_", " "), ", ".join(dict.fromkeys(values))))
    return Table.of_pairs(rows, ("Setting", "Value"), wrap=True)


def unavailable_only(table: pd.DataFrame) -> list[str]:
    """Return the labels whose every run says that the solver is not there."""
    absent = table["status"].eq(UNAVAILABLE).groupby(table["label"], sort=False).all()
    return [str(label) for label in absent.index[absent]]


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Any]], **more: Any) -> Table:
    cells = (tuple(c.cell(value) for c, value in zip(columns, row, strict=True)) for row in rows)
    return Table(columns=tuple(columns), rows=tuple(cells), **more)
