"""A study as one self-contained HTML page and a Markdown file, and its pictures for a paper."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from cbs_opt.report.pages import Picture, embedded, render
from cbs_opt.report.tables import Table
from cbs_opt.study import figures, figures_excess, tables
from cbs_opt.study.effects import RESAMPLES, effects
from cbs_opt.study.errors import StudyFolderError
from cbs_opt.study.results import Results
from cbs_opt.study.statistics import (
    PROCESSOR,
    SHIFT_NODES,
    SHIFT_SECONDS,
    clock,
    processor_share,
    with_labels,
)
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
    f"better. Percentile bootstrap over blocks, {RESAMPLES} resamples."
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


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure, a name for its file, and what it shows."""

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """The part of the page on one program."""

    title: str
    methods: Table
    effects: Table | None
    endings: Table | None
    pictures: tuple[Picture, ...]


def write_report(results: Results, folder: Path, *, pictures: str | None = None) -> list[Path]:
    """Write ``report.html`` and ``report.md``, each in one step.

    Parameters
    ----------
    results : Results
        See `cbs_opt.study.results.read_results`.
    folder : path
        Exists.
    pictures : {"png", "svg", "pdf"}, optional
        Write each picture to a file of its own too, for a paper.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    StudyFolderError
        If no run is done yet.
    """
    table = _labelled(results)
    written = [folder / HTML, folder / MARKDOWN]
    write_atomically(written[0], render_html(results).encode())
    write_atomically(written[1], render_markdown(results).encode())
    if pictures is not None:
        for program in PROGRAMS:
            for drawing in drawings(table[table["program"] == program]):
                path = folder / f"{program}_{drawing.name}.{pictures}"
                content = io.BytesIO()
                drawing.figure.savefig(content, format=pictures, dpi=RESOLUTION)
                write_atomically(path, content.getvalue())
                written.append(path)
    return written


def render_html(results: Results) -> str:
    """The page as a string; everything is in it, nothing is fetched."""
    table = _labelled(results)
    return render(
        "study.html.j2",
        title=results.name,
        lead=_lead(results),
        description=results.description,
        sections=[_section(program, own) for program, own in _by_program(table)],
        methods_note=f"{METHODS_NOTE} {_clock_note(table)}",
        effects_note=EFFECTS_NOTE,
        settings=tables.settings_table(table),
        notes=_notes(results, table),
    )


def render_markdown(results: Results) -> str:
    """The tables as Markdown, without pictures."""
    table = _labelled(results)
    note = f"{METHODS_NOTE} {_clock_note(table)}"
    parts = [f"# {results.name}", _lead(results)]
    parts += [results.description] if results.description else []
    for program, own in _by_program(table):
        parts += [f"## {PROGRAM_NOTES[program]}", tables.markdown(tables.methods_table(own)), note]
        changed = tables.effects_table(effects(own))
        parts += [] if changed is None else ["### Effects of options", tables.markdown(changed), EFFECTS_NOTE]
        ended = tables.endings_table(own)
        parts += [] if ended is None else ["### Runs without a usable answer", tables.markdown(ended)]
    parts += ["## Settings", tables.markdown(tables.settings_table(table)), *_notes(results, table)]
    return "\n\n".join(parts) + "\n"


def drawings(table: pd.DataFrame) -> list[Drawing]:
    """Every picture that the rows of one program, with labels, have something to show in."""
    # Blocks of several sizes round the same sparsity differently: brought to twentieths.
    sparsity = (20.0 * table["n_prune"] / table["n"].clip(lower=1)).round() / 20.0
    table = table.assign(sparsity=sparsity)
    found = effects(table)
    candidates = [
        ("profile", figures.profile_figure(table), PROFILE),
        ("gap", figures.gap_figure(table), GAP),
        ("traces", figures.traces_figure(table), TRACES),
        ("excess", figures_excess.excess_figure(table), EXCESS),
        ("effects", figures_excess.effects_figure(found), EFFECTS),
    ]
    for column, (what, title) in AXES.items():
        figure = figures_excess.excess_against_figure(table, column, title)
        candidates.append((f"excess_{column}", figure, AGAINST.format(what=what)))
    return [
        Drawing(name=name, figure=figure, caption=caption)
        for name, figure, caption in candidates
        if figure is not None
    ]


def _labelled(results: Results) -> pd.DataFrame:
    if results.table.empty:
        raise StudyFolderError("folder", f"no run of {results.name!r} is done", "run `cbs-opt study` first")
    return with_labels(results.table)


def _by_program(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for program in PROGRAMS:
        own = table[table["program"] == program]
        if not own.empty:
            yield program, own


def _section(program: str, table: pd.DataFrame) -> Section:
    return Section(
        title=PROGRAM_NOTES[program],
        methods=tables.methods_table(table),
        effects=tables.effects_table(effects(table)),
        endings=tables.endings_table(table),
        pictures=tuple(embedded(drawing.figure, drawing.caption) for drawing in drawings(table)),
    )


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
    """Which time is meant, and how much of a processor the runs had."""
    share = processor_share(table)
    had = "" if math.isnan(share) else f" Runs of .1 s and more had {share:.0%} of one in the median."
    if clock(table) == PROCESSOR:
        return f"Time is processor time; limits, gaps and traces go by the wall clock.{had}"
    return f"Time is wall-clock time.{had}"


def _notes(results: Results, table: pd.DataFrame) -> Sequence[str]:
    notes = [f"Left out: {reason}." for reason in results.left_out]
    absent = tables.unavailable_only(table)
    if absent:
        notes.append(f"Not available on this machine: {', '.join(absent)}.")
    if results.others:
        notes.append(f"{results.others} earlier rows belong to no run of this study and are not shown.")
    return notes
