"""`cbs-opt study`: work through a study file, stop and go on; `cbs-opt report`: what came of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.cli.errors import INTERRUPTED, Debug, reported
from cbs_opt.cli.tables import show, text_table

if TYPE_CHECKING:
    from cbs_opt.study.expansion import Plan, Run
    from cbs_opt.study.results import Row
    from cbs_opt.study.runner import Outcome, Progress

OPTIONS = {"jobs": "--jobs", "filter": "--filter", "out": "--out"}
BAR = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A study, FILE.toml.")]
Out = Annotated[Path, typer.Option(help="Folder for the results; what it holds of this study is kept.")]
Jobs = Annotated[int, typer.Option(help="Worker processes.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would run, and how long at most.")]
Filters = Annotated[
    list[str] | None,
    typer.Option(
        "--filter",
        help="NAME=GLOB: only those runs. NAME is instance, program, method, seed, n, n_prune, damping or "
        "option.NAME; several globs by commas. Repeatable: all must match.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Run again what was made from other data or limits.")]
Retry = Annotated[bool, typer.Option("--retry", help="Run again what failed, was killed or unavailable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="The folder that `cbs-opt study` was given with --out.")
]
ReportOut = Annotated[
    Path | None, typer.Option(help="Folder for the report; DIR by default, made if missing.")
]
Pictures = Annotated[
    str | None, typer.Option(help="png, svg or pdf: write every picture to a file of its own too.")
]
RowsAsJson = Annotated[bool, typer.Option("--json", help="Print the rows of the study as JSON on stdout.")]


def run(
    study: StudyFile,
    out: Out,
    jobs: Jobs = 1,
    dry_run: DryRun = False,
    filter: Filters = None,
    force: Force = False,
    retry: Retry = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a study: instances x methods x options x seeds, each in a process with hard limits.

    Every run that ends adds a row to the folder. Stopped in any way, the same command goes on with
    the runs that have no row. `cbs-opt report` shows the results, also those of a study that is
    still running.
    """
    with reported(debug, OPTIONS.get):
        from tqdm import tqdm

        from cbs_opt.study.config import read_study
        from cbs_opt.study.expansion import expand, select
        from cbs_opt.study.results import read_rows
        from cbs_opt.study.runner import is_to_do, run_study

        described = read_study(study)
        if dry_run:
            plan = expand(described)
            chosen = select(plan.runs, filter or [])
            rows = read_rows(out)
            _echo_plan(plan, chosen, [run for run in chosen if is_to_do(run, rows, retry)], jobs, as_json)
            return
        with tqdm(desc="runs", bar_format=BAR, disable=None) as bar:

            def advance(_: Row, progress: Progress) -> None:
                bar.total, bar.n = progress.total, progress.done
                bar.set_postfix_str(f"about {duration(progress.seconds_left)} left")

            outcome = run_study(
                described, out, jobs=jobs, filters=filter or [], force=force, retry=retry, on_row=advance
            )
        show(outcome, _outcome_lines(outcome), as_json)
        if outcome.interrupted:
            typer.echo("stopped; the same command goes on where it was", err=True)
            raise typer.Exit(INTERRUPTED)
        typer.echo(f"pictures and tables: cbs-opt report {out}", err=True)


def report(
    folder: Folder,
    out: ReportOut = None,
    pictures: Pictures = None,
    as_json: RowsAsJson = False,
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
            found = f"{pictures!r}; use one of {', '.join(FORMATS)}"
            raise typer.BadParameter(found, param_hint="--pictures")
        results = read_results(folder)
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        written = write_report(results, target, pictures=pictures)
        rows = json.loads(results.table.to_json(orient="records"))
        show(rows, [render_markdown(results).removesuffix("\n")], as_json)
        typer.echo(f"written: {', '.join(str(path) for path in written)}", err=True)


def duration(seconds: float) -> str:
    """Return a time in words, to two digits or so."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60.0:
        return f"{seconds / 60.0:.0f} min"
    return f"{seconds / 3600.0:.1f} h"


def _outcome_lines(outcome: Outcome) -> list[str]:
    lines = [f"{outcome.done} of {outcome.selected} runs done, {outcome.new} of them now"]
    if outcome.selected < outcome.planned:
        lines[0] += f"; the filters left out {outcome.planned - outcome.selected}"
    counts = sorted(outcome.statuses.items(), key=lambda pair: -pair[1])
    return [*lines, *text_table(("status", "runs"), [(name, str(count)) for name, count in counts])]


def _echo_plan(plan: Plan, chosen: list[Run], todo: list[Run], jobs: int, as_json: bool) -> None:
    """Print what would run, by method and program, and the longest that it can take."""
    from cbs_opt.study.runner import longest

    at_most, done = longest(todo, jobs), len(chosen) - len(todo)
    content: dict[str, Any] = {"runs": [run.describe() for run in todo], "done": done}
    content |= {"left_out": plan.left_out, "longest_seconds": at_most}
    counts = Counter((run.program, run.method) for run in todo)
    limits = {(run.program, run.method): run.limits.time_limit for run in todo}
    rows = [(*what, str(count), f"{limits[what]:g}") for what, count in counts.items()]
    instances = len({run.recipe.name for run in todo})
    lines = [
        f"{len(todo)} runs on {instances} blocks, at most {duration(at_most)} with --jobs {jobs}",
        f"{done} are done already",
        *text_table(("program", "method", "runs", "limit (s)"), rows, left=2),
        *(f"left out: {reason}" for reason in plan.left_out),
    ]
    show(content, lines, as_json)
