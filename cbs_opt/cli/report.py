"""`cbs-opt report`: the results of a study as a page, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cbs_opt.cli.errors import reported

Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder that `cbs-opt study` was given with --out.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the report; DIR by default, made if missing.")]
Pictures = Annotated[
    str | None, typer.Option(help="png, svg or pdf: write every picture to a file of its own too.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows of the study as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def run(
    folder: Folder,
    out: Out = None,
    pictures: Pictures = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write report.html and report.md about a study, finished or not, and print the Markdown.

    Performance profiles, shifted geometric means, gaps against time, effects of options with
    confidence intervals, and the excess of each heuristic over the proved optimum.
    """
    with reported(debug):
        from cbs_opt.study.report import FORMATS, render_markdown, write_report
        from cbs_opt.study.results import read_results

        if pictures is not None and pictures not in FORMATS:
            raise typer.BadParameter(
                f"{pictures!r}; use one of {', '.join(FORMATS)}", param_hint="--pictures"
            )
        results = read_results(folder)
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        written = write_report(results, target, pictures=pictures)
        if as_json:
            typer.echo(json.dumps(json.loads(results.table.to_json(orient="records")), allow_nan=False))
        else:
            typer.echo(render_markdown(results), nl=False)
        typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)
