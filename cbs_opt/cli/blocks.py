"""`cbs-opt solve`, `bound`, `export`, `library`: one block, one program."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cbs_opt import solving
from cbs_opt.cli.errors import BLOCK_OPTIONS, ERROR, INTERRUPTED, reported
from cbs_opt.cli.prune import parse_options
from cbs_opt.cli.streams import solver_messages_on_stderr
from cbs_opt.cli.tables import MISSING, text_table
from cbs_opt.report.files import plain
from cbs_opt.report.text import bound_text
from formulations import instances
from formulations.problem import PROGRAMS, BlockProblem
from formulations.solution import BlockSolution, Limit
from formulations.verification import Verification
from formulations.verification import verify as verify_solution

Block = Annotated[
    str,
    typer.Argument(
        metavar="BLOCK",
        help="A block, FILE.npz, or the name of a shipped one; `cbs-opt library` lists those.",
    ),
]
Program = Annotated[str, typer.Option(help="What is minimised: selection, or joint.")]
MethodName = Annotated[
    str,
    typer.Option(
        help="A name of `cbs-opt methods`, SOLVER or SOLVER:MODEL with a name of `cbs-opt solvers`."
    ),
]
TimeLimit = Annotated[float | None, typer.Option(help="Wall-clock seconds.")]
RelGap = Annotated[float, typer.Option(help="Relative gap at which a result counts as optimal.")]
NodeLimit = Annotated[int | None, typer.Option(help="Nodes of a tree search.")]
IterationLimit = Annotated[int | None, typer.Option(help="Iterations of a search or an outer loop.")]
Threads = Annotated[int, typer.Option(help="Threads that a solver may use.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Incumbent = Annotated[Path | None, typer.Option(help="Warm start: a solution of the same block.")]
MethodOption = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE for the method, VALUE as JSON. Repeatable.")
]
Relaxation = Annotated[
    str | None,
    typer.Option(
        help="perspective (joint), capped_simplex (selection), or mccormick, rlt (selection, small blocks)."
    ),
]
Fix = Annotated[
    bool, typer.Option("--fix", help="Fix weights by the bound and the best set known, and tighten the rest.")
]
SolutionOut = Annotated[Path | None, typer.Option(help="Write the solution to this .npz file.")]
Model = Annotated[str, typer.Option(help="A formulation, such as joint_perspective.")]
Format = Annotated[str, typer.Option(help="mps, lp or qplib.")]
Out = Annotated[Path, typer.Option(help="File to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def solve(
    block: Block,
    program: Program,
    method: MethodName = "swap_search",
    time_limit: TimeLimit = None,
    rel_gap: RelGap = 1e-6,
    node_limit: NodeLimit = None,
    iteration_limit: IterationLimit = None,
    threads: Threads = 1,
    seed: Seed = 0,
    incumbent: Incumbent = None,
    option: MethodOption = None,
    out: SolutionOut = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Solve a program on a block by any method, and check the result.

    A limit reached is a result. Ctrl-C ends the solve with the incumbent and the bound so far, which
    are printed and written as usual; the exit code is then 130.
    """
    with reported(debug, BLOCK_OPTIONS):
        problem = load_block(block)
        warm = None if incumbent is None else instances.read_solution(incumbent, problem)
        free = _free_options(option or [])
        with solver_messages_on_stderr():
            solution = solving.solve(
                problem,
                method,
                program=program,
                incumbent=warm,
                time_limit=time_limit,
                rel_gap=rel_gap,
                node_limit=node_limit,
                iteration_limit=iteration_limit,
                threads=threads,
                seed=seed,
                **free,
            )
        _finish(problem, solution, out, as_json)


def bound(
    block: Block,
    program: Program,
    time_limit: TimeLimit = None,
    iteration_limit: IterationLimit = None,
    incumbent: Incumbent = None,
    relaxation: Relaxation = None,
    fix: Fix = False,
    option: MethodOption = None,
    out: SolutionOut = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bound a program from below by its relaxation, with a certificate that `verify` recomputes.

    Prints the bound, the best set known with its gap, the kind of relaxation, how many weights are
    fixed, and what makes gaps small: rho (damping over the mean Fisher diagonal) and n over the
    effective rank.
    """
    with reported(debug, BLOCK_OPTIONS):
        problem = load_block(block)
        warm = None if incumbent is None else instances.read_solution(incumbent, problem)
        solution = solving.solve(
            problem,
            "lower_bound",
            program=program,
            time_limit=time_limit,
            iteration_limit=iteration_limit,
            incumbent=warm,
            **{"relaxation": relaxation, "fix": fix, **_free_options(option or [])},
        )
        _finish(problem, solution, out, as_json)


def export(
    block: Block,
    model: Model,
    out: Out,
    format: Format = "mps",
    incumbent: Incumbent = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write one formulation of a block for another solver."""
    with reported(debug, BLOCK_OPTIONS):
        problem = load_block(block)
        warm = None if incumbent is None else instances.read_solution(incumbent, problem)
        written = instances.export_model(problem, model, out, format, incumbent=warm)
        if as_json:
            echo_json(written)
            return
        lines = {name.replace("_", " "): str(value) for name, value in plain(written).items()}
        typer.echo("\n".join(aligned(lines)))


def library(as_json: AsJson = False) -> None:
    """List the shipped blocks with their proven optima, or the best values known."""
    with reported(debug=False):
        shipped = {name: instances.load_library(name) for name in instances.library()}
        if as_json:
            echo_json(
                [
                    {"name": name, "n": problem.n, "n_prune": problem.n_prune}
                    | {program: known[program] for program in PROGRAMS}
                    for name, (problem, known) in shipped.items()
                ]
            )
            return
        headings = ["name", "weights", "pruned"]
        for program in PROGRAMS:
            headings += [f"{program} objective", "gap", "proved"]
        rows = [
            [name, str(problem.n), str(problem.n_prune)]
            + [cell for program in PROGRAMS for cell in _known(known[program])]
            for name, (problem, known) in shipped.items()
        ]
        typer.echo("\n".join(text_table(headings, rows)))


def load_block(name: str) -> BlockProblem:
    """The block in a file, or a shipped one.

    Raises
    ------
    typer.BadParameter
        If there is neither.
    InstanceFormatError
        If the file is not a block.
    """
    if Path(name).is_file():
        return instances.read_instance(name)[0]
    if name in instances.library():
        return instances.load_library(name)[0]
    found = f"there is no file and no shipped block {name!r}; `cbs-opt library` lists the latter"
    raise typer.BadParameter(found, param_hint="BLOCK")


def number(value: float | None) -> str:
    """An objective to nine digits, as many as a gap of 1e-6 needs and some more."""
    return MISSING if value is None else f"{value:.9g}"


def lower(bound: float | None) -> str:
    """A lower bound to nine digits, rounded down: what is printed is a bound too."""
    return MISSING if bound is None else bound_text(bound, 9)


def _free_options(pairs: list[str]) -> dict[str, Any]:
    """Options of the method itself; those that `solve` names have their own switches."""
    options = parse_options(pairs, "--option")
    for name in options:
        if name in inspect.signature(solving.solve).parameters:
            switch = "--" + name.replace("_", "-")
            raise typer.BadParameter(
                f"{name!r} is no option of a method; use {switch}", param_hint="--option"
            )
    return options


def _finish(problem: BlockProblem, solution: BlockSolution, out: Path | None, as_json: bool) -> None:
    """Check, write and print a solution; an interrupted one ends with the exit code of an interrupt."""
    checked = verify_solution(problem, solution)
    if out is not None:
        instances.write_solution(out, problem, solution)
        typer.echo(f"written to {out}", err=True)
    if as_json:
        echo_json(_solution_values(problem, solution, checked))
    else:
        typer.echo("\n".join(aligned(_solution_lines(problem, solution, checked))))
    if checked.wrong:
        typer.echo(f"error: the solution contradicts itself: {'; '.join(checked.notes)}", err=True)
        raise typer.Exit(ERROR)
    if solution.limit is Limit.INTERRUPTED:
        raise typer.Exit(INTERRUPTED)


def _solution_values(problem: BlockProblem, solution: BlockSolution, checked: Verification) -> dict[str, Any]:
    stats = solution.stats
    return {
        "block": problem.name,
        "n": problem.n,
        "n_prune": problem.n_prune,
        "program": solution.program,
        "method": solution.method,
        "termination": solution.termination,
        "limit": solution.limit,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": None if solution.bound is None else solution.gap,
        "rel_gap": solution.rel_gap,
        "pruned": None if solution.keep is None else solution.pruned.tolist(),
        **certificate_values(problem, solution),
        "verification": checked,
        "seconds": stats.seconds,
        "nodes": stats.nodes,
        "iterations": stats.iterations,
        "message": stats.message,
    }


def _solution_lines(
    problem: BlockProblem, solution: BlockSolution, checked: Verification
) -> Mapping[str, str]:
    return {
        "block": f"{problem.name or 'unnamed'}: {problem.n} weights, {problem.n_prune} pruned",
        "program": solution.program,
        "method": solution.method,
        "status": solving.status_words(solution),
        "objective": number(solution.objective),
        "bound": lower(solution.bound),
        "gap": MISSING if solution.bound is None else f"{solution.gap:.2g}",
        **_certificate_lines(problem, solution),
        "seconds": f"{solution.stats.seconds:.3f}",
        "nodes": str(solution.stats.nodes),
        "message": solution.stats.message or MISSING,
        "verified": "; ".join((checked.verdict.value, *checked.notes)),
    }


def certificate_values(problem: BlockProblem, solution: BlockSolution) -> dict[str, Any]:
    """The kind of the certificate, and what it says of the block; None where there is none."""
    evidence = solution.certificate
    rank = None if evidence is None else evidence.effective_rank
    return {
        "certificate": None if evidence is None else evidence.kind,
        "rho": None if evidence is None else evidence.rho,
        "effective_rank": rank,
        "n_over_effective_rank": None if rank is None else problem.n / rank,
        "n_fixed": None if evidence is None else evidence.n_fixed,
    }


def _certificate_lines(problem: BlockProblem, solution: BlockSolution) -> Mapping[str, str]:
    if solution.certificate is None:
        return {}
    found = certificate_values(problem, solution)
    rank, ratio = found["effective_rank"], found["n_over_effective_rank"]
    return {
        "certificate": found["certificate"],
        "rho": MISSING if found["rho"] is None else f"{found['rho']:.3g}",
        "effective rank": MISSING if rank is None else f"{rank:.3g} (n is {ratio:.3g} times that)",
        "fixed": f"{found['n_fixed']} of {problem.n} weights",
    }


def _known(entry: Mapping[str, Any]) -> Sequence[str]:
    gap = (entry["objective"] - entry["bound"]) / max(abs(entry["objective"]), 1e-12)
    return number(entry["objective"]), f"{gap:.1g}", yes_no(entry["proved"])


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def aligned(lines: Mapping[str, str]) -> list[str]:
    width = max(map(len, lines))
    return [f"{name.ljust(width)}  {value}" for name, value in lines.items()]


def echo_json(value: Any) -> None:
    typer.echo(json.dumps(plain(value), allow_nan=False))
