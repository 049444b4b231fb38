"""`cbs-opt solve`, `bound`, `export`, `library`: one block, one program."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.cli.errors import ERROR, INTERRUPTED, reported
from cbs_opt.cli.streams import solver_messages_on_stderr
from cbs_opt.cli.tables import MISSING, text_table

if TYPE_CHECKING:
    from formulations.problem import BlockProblem
    from formulations.solution import BlockSolution
    from formulations.verification import Verification

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
    with reported(debug):
        limits = {"time_limit": time_limit, "node_limit": node_limit, "iteration_limit": iteration_limit}
        options: dict[str, Any] = {**limits, "rel_gap": rel_gap, "threads": threads, "seed": seed}
        options |= _free_options(option or [])
        problem, solution = _solved(block, method, incumbent, program=program, **options)
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
    with reported(debug):
        options: dict[str, Any] = {"time_limit": time_limit, "iteration_limit": iteration_limit}
        options |= {"relaxation": relaxation, "fix": fix, **_free_options(option or [])}
        problem, solution = _solved(block, "lower_bound", incumbent, program=program, **options)
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
    with reported(debug):
        from cbs_opt.system.plain import plain
        from formulations import instances

        problem, warm = _loaded(block, incumbent)
        written = instances.export_model(problem, model, out, format, incumbent=warm)
        if as_json:
            echo_json(written)
            return
        lines = {name.replace("_", " "): str(value) for name, value in plain(written).items()}
        typer.echo("\n".join(aligned(lines)))


def library(as_json: AsJson = False) -> None:
    """List the shipped blocks with their proven optima, or the best values known."""
    with reported(debug=False):
        from formulations import instances
        from formulations.problem import PROGRAMS

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
    """Return the block in a file, or a shipped one.

    Raises
    ------
    typer.BadParameter
        If there is neither.
    InstanceFormatError
        If the file is not a block.
    """
    from formulations import instances

    if Path(name).is_file():
        return instances.read_instance(name)[0]
    if name in instances.library():
        return instances.load_library(name)[0]
    found = f"there is no file and no shipped block {name!r}; `cbs-opt library` lists the latter"
    raise typer.BadParameter(found, param_hint="BLOCK")


def _loaded(block: str, incumbent: Path | None) -> tuple[BlockProblem, BlockSolution | None]:
    """Return a block and the warm start."""
    from formulations import instances

    problem = load_block(block)
    return problem, None if incumbent is None else instances.read_solution(incumbent, problem)


def _solved(
    block: str, method: str, incumbent: Path | None, **options: Any
) -> tuple[BlockProblem, BlockSolution]:
    """Return a block and its solution."""
    from cbs_opt import solving

    problem, warm = _loaded(block, incumbent)
    with solver_messages_on_stderr():
        return problem, solving.solve(problem, method, incumbent=warm, **options)


def number(value: float | None) -> str:
    """Return an objective to nine digits, as many as a gap of 1e-6 needs and some more."""
    return MISSING if value is None else f"{value:.9g}"


def lower(bound: float | None) -> str:
    """Return a lower bound to nine digits, rounded down: what is printed is a bound too."""
    from cbs_opt.report.numbers import bound_text

    return MISSING if bound is None else bound_text(bound, 9)


def _free_options(pairs: list[str]) -> dict[str, Any]:
    """Return options of the method itself; those that `solve` names have their own switches."""
    from cbs_opt import solving

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
    from formulations import instances
    from formulations.solution import Limit
    from formulations.verification import verify

    checked = verify(problem, solution)
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
    answer = ("program", "method", "termination", "limit", "objective", "bound", "rel_gap")
    effort = ("seconds", "nodes", "iterations", "message")
    return {
        "block": problem.name,
        "n": problem.n,
        "n_prune": problem.n_prune,
        **{name: getattr(solution, name) for name in answer},
        "gap": None if solution.bound is None else solution.gap,
        "pruned": None if solution.keep is None else solution.pruned.tolist(),
        **certificate_values(problem, solution),
        "verification": checked,
        **{name: getattr(solution.stats, name) for name in effort},
    }


def _solution_lines(
    problem: BlockProblem, solution: BlockSolution, checked: Verification
) -> Mapping[str, str]:
    from cbs_opt import solving

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
    """Return kind and numbers of the certificate; None where there is none."""
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
    from cbs_opt.system.plain import plain

    typer.echo(json.dumps(plain(value), allow_nan=False))


def parse_options(pairs: list[str], hint: str = "--option") -> dict[str, Any]:
    """Return ``NAME=VALUE`` pairs as a dict; a value that is not JSON is a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r}; write NAME=VALUE", param_hint=hint)
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
    return options
