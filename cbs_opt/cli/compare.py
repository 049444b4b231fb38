"""`cbs-opt compare`: every method on the same block; `methods`, `solvers`, `library`: what is installed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.cli.blocks import AsJson, Block, Program, RelGap, Seed, Threads, load_block
from cbs_opt.cli.errors import ERROR, INTERRUPTED, Debug, reported
from cbs_opt.cli.tables import MISSING, lower, number, show, solver_messages_on_stderr, text_table, yes_no

if TYPE_CHECKING:
    from formulations.solvers import SolverInfo

CHECK_BLOCK = "digits_12_s50"
CHECK_LIMITS: dict[str, Any] = {"time_limit": 60.0, "rel_gap": 1e-4}

Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "--method", help="Names as for `cbs-opt solve`, by commas. Repeatable."),
]
EachTimeLimit = Annotated[float, typer.Option("--time-limit", help="Wall-clock seconds for each method.")]
AllModels = Annotated[
    bool, typer.Option("--all-models", help="Each solver with each of its models, not its default alone.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Solve a small block on each; exit code 1 if one fails.")
]


def compare(
    block: Block,
    program: Program,
    method: Methods = None,
    time_limit: EachTimeLimit = 60.0,
    rel_gap: RelGap = 1e-4,
    threads: Threads = 1,
    seed: Seed = 0,
    all_models: AllModels = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run many methods on a block and judge them by the same evaluator.

    By default our own methods and every solver with the model it takes by default. Ctrl-C ends the
    table with the method that it stopped; the exit code is then 130.
    """
    with reported(debug):
        from tqdm import tqdm

        from cbs_opt import solving

        problem = load_block(block)
        names = [name.strip() for entry in method or () for name in entry.split(",") if name.strip()]
        total = len(names if method else solving.default_methods(program, all_models=all_models))
        with tqdm(total=total, desc="methods", disable=None) as bar, solver_messages_on_stderr():
            table = solving.compare(
                problem,
                program=program,
                methods=names if method else None,
                all_models=all_models,
                time_limit=time_limit,
                rel_gap=rel_gap,
                threads=threads,
                seed=seed,
                on_row=lambda _: bar.update(),
            )
        rows = [_without_nan(row) for row in table.to_dict("records")]
        show(rows, _comparison_lines(rows), as_json)
        if any(row["status"].endswith(solving.INTERRUPTED) for row in rows):
            raise typer.Exit(INTERRUPTED)


def methods(as_json: AsJson = False) -> None:
    """List the methods, the programs they take and their options."""
    with reported(debug=False):
        from cbs_opt.select.methods import available_methods

        found = available_methods()
        listed = [
            {"name": m.name, "kind": m.kind, "programs": m.programs}
            | {"options": dict.fromkeys(m.programs, m.options), "summary": m.summary}
            for m in found
        ]
        rows = [(m.name, m.kind, " ".join(m.programs), " ".join(m.options) or "-", m.summary) for m in found]
        headings = ("method", "kind", "programs", "options", "what it does")
        show(listed, text_table(headings, rows, left=len(headings)), as_json)


def solvers(check: Check = False, as_json: AsJson = False, debug: Debug = False) -> None:
    """List the solvers: versions, licences, size limits, what they can take."""
    with reported(debug):
        from cbs_opt.system.plain import plain
        from formulations.problem import PROGRAMS
        from formulations.solvers import available_solvers, models_for

        infos = available_solvers()
        with solver_messages_on_stderr():
            checks = {info.name: _check(info) for info in infos if check and info.available}
        listed = [
            plain(info)
            | {"models": {program: models_for(info.name, program) for program in PROGRAMS}}
            | ({"check": checks.get(info.name)} if check else {})
            for info in infos
        ]
        show(listed, _solver_lines(infos, checks if check else None), as_json)
        if any(answer != "ok" for answers in checks.values() for answer in answers.values()):
            raise typer.Exit(ERROR)


def library(as_json: AsJson = False) -> None:
    """List the shipped blocks with their proven optima, or the best values known."""
    with reported(debug=False):
        from formulations import instances
        from formulations.problem import PROGRAMS
        from formulations.solution import stated_support

        listed, rows = [], []
        for name in instances.library():
            problem, known = instances.load_library(name)
            optima = {program: known[program] for program in PROGRAMS}
            support = stated_support(problem)
            described = {"name": name, "n": problem.n, "n_prune": problem.n_prune, "support": support}
            listed.append({**described, **optima})
            rows.append([name, str(problem.n), support or str(problem.n_prune)])
            for program in PROGRAMS:
                objective, bound = known[program]["objective"], known[program]["bound"]
                gap = (objective - bound) / max(abs(objective), 1e-12)
                rows[-1] += [number(objective), f"{gap:.1g}", yes_no(known[program]["proved"])]
        headings = ["name", "weights", "pruned, or support"]
        for program in PROGRAMS:
            headings += [f"{program} objective", "gap", "proved"]
        show(listed, text_table(headings, rows), as_json)


def prepare() -> None:
    """Compile ahead, once after an installation: what exact methods and searches else do at first use."""
    with reported(debug=False):
        from cbs_opt.select.preparation import prepare_all
        from cbs_opt.structure import leaps

        prepare_all()
        leaps.prepare()
        typer.echo("ready", err=True)


def _without_nan(row: Mapping[Any, Any]) -> dict[str, Any]:
    import pandas as pd

    return {str(key): None if pd.isna(value) else value for key, value in row.items()}


def _comparison_lines(rows: list[dict[str, Any]]) -> list[str]:
    shown: dict[str, Callable[[Any], str]] = {
        **{"method": str, "status": str, "objective": number, "excess": "{:.1e}".format, "bound": lower},
        **{"gap": "{:.1e}".format, "seconds": "{:.2f}".format, "nodes": "{:.0f}".format},
    }
    cells = [
        [MISSING if row[name] is None else text(row[name]) for name, text in shown.items()] for row in rows
    ]
    reasons = [f"{row['method']}: {row['note']}" for row in rows if row["objective"] is None and row["note"]]
    return text_table(list(shown), cells, left=2) + ([""] if reasons else []) + reasons


def _check(info: SolverInfo) -> dict[str, str]:
    """Return "ok" for each program of which the solver proves the optimum, else what it did."""
    from cbs_opt import solving
    from formulations.instances import load_library
    from formulations.problem import PROGRAMS
    from formulations.solvers import models_for

    problem, optima = load_library(CHECK_BLOCK)
    answers: dict[str, str] = {}
    for program in filter(lambda program: models_for(info.name, program), PROGRAMS):
        table = solving.compare(problem, program=program, methods=[info.name], **CHECK_LIMITS)
        row = _without_nan(table.to_dict("records")[0])
        best = optima[program]["objective"]
        if row["status"] != "optimal":
            answers[program] = f"{row['status']} {row['note'] or ''}".strip()
        elif not math.isclose(row["objective"], best, rel_tol=CHECK_LIMITS["rel_gap"]):
            answers[program] = f"objective {number(row['objective'])}, the optimum is {number(best)}"
        else:
            answers[program] = "ok"
    return answers


def _solver_lines(infos: list[SolverInfo], checks: Mapping[str, Mapping[str, str]] | None) -> list[str]:
    headings = ["solver", "version", "licence", "takes"] + ([] if checks is None else ["check"])
    rows = []
    for info in infos:
        licence = "size-limited" if info.limits else "usable" if info.available else "unavailable"
        row = [info.name, info.version or MISSING, licence, ", ".join(sorted(info.capabilities))]
        if checks is not None:
            answers = checks.get(info.name, {})
            row.append("; ".join(f"{program} {answer}" for program, answer in answers.items()) or MISSING)
        rows.append(row)
    reasons = [f"{info.name}: {info.reason}" for info in infos if info.reason]
    return text_table(headings, rows, left=len(headings)) + ([""] if reasons else []) + reasons
