"""Tables and pictures of docs/results/studies.md from the folders of finished studies.

What the page says about them is written by hand and stays; what was measured stands between marks and
is replaced.

    cbs-opt study experiments/studies/formulations_joint.toml --out runs/studies/formulations_joint
    python -m experiments.studies_page --results runs/studies
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import pandas as pd
import typer

from cbs_opt.study.report import effects_table, methods_table, sections
from cbs_opt.study.results import Results, read_results
from cbs_opt.study.statistics import (
    CLOCKS,
    clock,
    effects,
    processor_share,
    ranking,
    with_labels,
)
from formulations.files import write_atomically

PAGE = Path("docs/results/studies.md")
FIGURES = Path("docs/figures")
SEED = "cbs-opt"
"""Of the identifiers in SVG files: the same picture is the same file."""
MOST_METHODS = 10


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """What the page shows of a study: the table "methods" or "effects", and one picture, by program."""

    table: str
    picture: str
    programs: tuple[str, ...]


EXCERPTS: Mapping[str, Excerpt] = {
    "formulations_selection": Excerpt(table="methods", picture="profile", programs=("selection",)),
    "formulations_joint": Excerpt(table="methods", picture="profile", programs=("joint",)),
    "solver_parameters": Excerpt(table="effects", picture="effects", programs=("selection",)),
    "branch_and_bound_switches": Excerpt(table="effects", picture="effects", programs=("joint", "selection")),
    "exact_vs_heuristic": Excerpt(table="methods", picture="excess_damping", programs=("joint", "selection")),
    "heuristic_excess": Excerpt(table="methods", picture="excess_n", programs=("joint", "selection")),
}


def excerpt(name: str, results: Results) -> tuple[str, bytes]:
    """Return what stands between the marks of a study, and its picture as SVG."""
    chosen = EXCERPTS[name]
    table = with_labels(results.table)
    parts = [_facts(results)]
    for program in chosen.programs:
        own = table[table["program"] == program]
        parts += [f"*{program.capitalize()} program*"] if len(chosen.programs) > 1 else []
        parts.append(_methods(own) if chosen.table == "methods" else _effects(own))
    first = next(section for section in sections(table) if section.program == chosen.programs[0])
    drawing = next(drawing for drawing in first.drawings() if drawing.name == chosen.picture)
    caption = f"{chosen.programs[0].capitalize()} program. {drawing.caption}"
    parts += [f"![{results.name}](../figures/study_{name}.svg)", caption]
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": SEED}):
        drawing.figure.savefig(content, format="svg", metadata={"Date": None})
    return "\n\n".join(parts), content.getvalue()


def between_marks(page: str, name: str, text: str) -> str:
    """Return the page with what stands between the marks of `name` replaced.

    Raises
    ------
    ValueError
        If the page lacks a mark.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {start.strip()} ... {end}")
    return f"{before}{start}\n{text}\n\n{end}{after}"


def _facts(results: Results) -> str:
    table = results.table
    share = processor_share(table)
    return (
        f"{len(table)} runs on {table['instance'].nunique()} blocks of {table['n'].min()} to "
        f"{table['n'].max()} weights, at most {table['time_limit'].max():g} s each; "
        f"{table['seconds'].sum() / 60.0:.1f} minutes in solvers, {table['cpu_seconds'].sum() / 60.0:.1f} of "
        f"processor time. {CLOCKS[clock(table)]} counts; runs of .1 s and more had {share:.0%} of a "
        "processor in the median."
    )


def _methods(own: pd.DataFrame) -> str:
    """Return the table of methods, cut to those that proved most and fastest where there are many."""
    order = ranking(own)
    shown = sorted(order, key=order.__getitem__)[:MOST_METHODS] if len(order) > MOST_METHODS else list(order)
    text = methods_table(own[own["label"].isin(shown)]).markdown()
    left = len(order) - len(shown)
    return f"{text}\n\nThe {left} other methods proved fewer blocks, or took longer." if left else text


def _effects(own: pd.DataFrame) -> str:
    """Return the effects whose interval leaves out "none"."""
    found = effects(own)
    clear = [effect for effect in found if not effect.ratio.low <= 1.0 <= effect.ratio.high]
    table = effects_table(clear)
    words = f"{len(clear)} of {len(found)} effects have an interval without 1."
    return words if table is None else f"{table.markdown()}\n\n{words}"


def main(
    results: Annotated[Path, typer.Option(help="Folder with a folder for each study, named as its file.")],
    page: Annotated[Path, typer.Option(help="The page to bring up to date.")] = PAGE,
    figures: Annotated[Path, typer.Option(help="Folder for the pictures.")] = FIGURES,
) -> None:
    """Replace what the page shows of each study whose results are there."""
    text = page.read_text(encoding="utf-8")
    for name in EXCERPTS:
        if not (results / name).is_dir():
            typer.echo(f"{name}: no results in {results}", err=True)
            continue
        shown, picture = excerpt(name, read_results(results / name))
        text = between_marks(text, name, shown)
        write_atomically(figures / f"study_{name}.svg", picture)
    write_atomically(page, text.encode())


if __name__ == "__main__":
    typer.run(main)
