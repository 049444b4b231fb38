"""`cbs-opt solve`, `bound`, `export`, `verify`: one block, one program; or all blocks of a run, verified."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.cli import tables
from cbs_opt.cli.errors import ERROR, INTERRUPTED, UNCHECKED, Debug, reported
from cbs_opt.cli.tables import MISSING, aligned, lower, number, show, yes_no

if TYPE_CHECKING:
    from formulations.problem import BlockProblem
    from formulations.solution import BlockSolution
    from formulations.verification import Verdict, Verification

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
Subject = Annotated[
    str,
    typer.Argument(
        metavar="BLOCK",
        help="A block, FILE.npz, or a shipped one; or what `cbs-opt prune --certify --save-blocks` wrote.",
    ),
]
Solution = Annotated[
    Path | None,
    typer.Argument(
        metavar="SOLUTION", help="A solution of the block, as --out writes it; none for a directory."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


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
        written = plain(instances.export_model(problem, model, out, format, incumbent=warm))
        lines = {name.replace("_", " "): str(value) for name, value in written.items()}
        show(written, aligned(lines), as_json)


def verify(block: Subject, solution: Solution = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Recompute set, objective, bound and status; exit code 1 if one is wrong, 3 if one has no proof.

    Everything is computed anew in float64 from the data of the blocks; the run that wrote the
    solution is not trusted.
    """
    with reported(debug):
        if Path(block).is_dir() != (solution is None):
            found = "name the solution of this block" if solution is None else "a directory has its own"
            raise typer.BadParameter(found, param_hint="SOLUTION")
        if solution is None:
            _verify_run(Path(block), as_json)
            return
        from formulations.verification import verify as verify_solution

        problem, claimed = _loaded(block, solution)
        assert claimed is not None
        result = verify_solution(problem, claimed)
        lines = {
            "verdict": result.verdict.value,
            "feasible": yes_no(result.feasible),
            "objective": number(result.objective),
            "bound": lower(result.bound),
            "bound checked": yes_no(result.bound_checked),
            "notes": "; ".join(result.notes) or MISSING,
        }
        show(result, aligned(lines), as_json)
        _leave([result.verdict])


def _verify_run(directory: Path, as_json: bool) -> None:
    from tqdm import tqdm

    from cbs_opt.report.verification import check_certificates

    blocks = list(tqdm(check_certificates(directory), desc="blocks", unit="block", disable=None))
    headings = ("block", "verdict", "objective", "bound", "proved", "notes")
    rows = [
        (
            *(block.name, block.verdict.value, number(block.objective), lower(block.bound)),
            *(yes_no(block.proved), "; ".join(block.notes) or MISSING),
        )
        for block in blocks
    ]
    show(blocks, tables.text_table(headings, rows, left=2), as_json)
    _leave([block.verdict for block in blocks])


def _leave(verdicts: Sequence[Verdict]) -> None:
    from formulations.verification import Verdict

    if Verdict.WRONG in verdicts:
        raise typer.Exit(ERROR)
    if Verdict.UNCHECKED in verdicts:
        raise typer.Exit(UNCHECKED)


def load_block(name: str) -> BlockProblem:
    """Return the block in a file, or a shipped one."""
    from formulations import instances

    if Path(name).is_file():
        return instances.read_instance(name)[0]
    if name in instances.library():
        return instances.load_library(name)[0]
    found = f"there is no file and no shipped block {name!r}; `cbs-opt library` lists the latter"
    raise typer.BadParameter(found, param_hint="BLOCK")


def _loaded(block: str, incumbent: Path | None) -> tuple[BlockProblem, BlockSolution | None]:
    from formulations import instances

    problem = load_block(block)
    return problem, None if incumbent is None else instances.read_solution(incumbent, problem)


def _solved(
    block: str, method: str, incumbent: Path | None, **options: Any
) -> tuple[BlockProblem, BlockSolution]:
    from cbs_opt import solving

    problem, warm = _loaded(block, incumbent)
    with tables.solver_messages_on_stderr():
        return problem, solving.solve(problem, method, incumbent=warm, **options)


def _free_options(pairs: list[str]) -> dict[str, Any]:
    """Return ``NAME=VALUE`` pairs as a dict; a value that is not JSON is a string.

    They are options of the method itself; those that `solve` names have their own switches.
    """
    from cbs_opt import solving

    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise typer.BadParameter(f"{pair!r}; write NAME=VALUE", param_hint="--option")
        if name in inspect.signature(solving.solve).parameters:
            found = f"{name!r} is no option of a method; use --{name.replace('_', '-')}"
            raise typer.BadParameter(found, param_hint="--option")
        try:
            options[name] = json.loads(text)
        except json.JSONDecodeError:
            options[name] = text
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
    values = _solution_values(problem, solution, checked)
    show(values, aligned(_solution_lines(problem, solution, checked, values)), as_json)
    if checked.wrong:
        typer.echo(f"error: the solution contradicts itself: {'; '.join(checked.notes)}", err=True)
        raise typer.Exit(ERROR)
    if solution.limit is Limit.INTERRUPTED:
        raise typer.Exit(INTERRUPTED)


def _solution_values(problem: BlockProblem, solution: BlockSolution, checked: Verification) -> dict[str, Any]:
    """Return what is printed as JSON; kind and numbers of the certificate are None where there is none."""
    answer = ("program", "method", "termination", "limit", "objective", "bound", "rel_gap")
    effort = ("seconds", "nodes", "iterations", "message")
    evidence = solution.certificate
    rank = getattr(evidence, "effective_rank", None)
    return {
        "block": problem.name,
        "n": problem.n,
        "n_prune": problem.n_prune,
        "support": solution.support,
        **{name: getattr(solution, name) for name in answer},
        "gap": None if solution.bound is None else solution.gap,
        "pruned": None if solution.keep is None else solution.pruned.tolist(),
        "certificate": getattr(evidence, "kind", None),
        "rho": getattr(evidence, "rho", None),
        "effective_rank": rank,
        "n_over_effective_rank": None if rank is None else problem.n / rank,
        "n_fixed": getattr(evidence, "n_fixed", None),
        "verification": checked,
        **{name: getattr(solution.stats, name) for name in effort},
    }


def _solution_lines(
    problem: BlockProblem, solution: BlockSolution, checked: Verification, values: Mapping[str, Any]
) -> Mapping[str, str]:
    from cbs_opt import solving

    rho, rank, ratio = (values[name] for name in ("rho", "effective_rank", "n_over_effective_rank"))
    certificate = {
        "certificate": values["certificate"],
        "rho": MISSING if rho is None else f"{rho:.3g}",
        "effective rank": MISSING if rank is None else f"{rank:.3g} (n is {ratio:.3g} times that)",
        "fixed": f"{values['n_fixed']} of {problem.n} weights",
    }
    kept = f"{problem.n_prune} pruned" if problem.support is None else f"{problem.support} kept"
    return {
        "block": f"{problem.name or 'unnamed'}: {problem.n} weights, {kept}",
        "program": solution.program,
        "method": solution.method,
        "status": solving.status_words(solution),
        "objective": number(solution.objective),
        "bound": lower(solution.bound),
        "gap": MISSING if solution.bound is None else f"{solution.gap:.2g}",
        **({} if solution.certificate is None else certificate),
        "seconds": f"{solution.stats.seconds:.3f}",
        "nodes": str(solution.stats.nodes),
        "message": solution.stats.message or MISSING,
        "verified": "; ".join((checked.verdict.value, *checked.notes)),
    }
