"""`cbs-opt verify`: a solution of a block, or every certificate of a pruning run, checked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from cbs_opt.cli.blocks import AsJson, Debug, aligned, echo_json, load_block, lower, number, yes_no
from cbs_opt.cli.errors import BLOCK_OPTIONS, ERROR, UNCHECKED, reported
from cbs_opt.cli.tables import MISSING, text_table
from formulations import instances
from formulations.verification import Verdict, Verification
from formulations.verification import verify as verify_solution

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


def verify(block: Subject, solution: Solution = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """Recompute set, objective, bound and status; exit code 1 if one is wrong, 3 if one has no proof.

    Everything is computed anew in float64 from the data of the blocks; the run that wrote the
    solution is not trusted.
    """
    with reported(debug, BLOCK_OPTIONS):
        if Path(block).is_dir():
            if solution is not None:
                raise typer.BadParameter("a directory has its own", param_hint="SOLUTION")
            _verify_run(Path(block), as_json)
            return
        if solution is None:
            raise typer.BadParameter("name the solution of this block", param_hint="SOLUTION")
        problem = load_block(block)
        found = verify_solution(problem, instances.read_solution(solution, problem))
        if as_json:
            echo_json(found)
        else:
            typer.echo("\n".join(aligned(_verification(found))))
        _leave([found.verdict])


def _verify_run(directory: Path, as_json: bool) -> None:
    from cbs_opt.certify.files import check_certificates

    blocks = list(tqdm(check_certificates(directory), desc="blocks", unit="block", disable=None))
    if as_json:
        echo_json(blocks)
    else:
        headings = ("block", "verdict", "objective", "bound", "proved", "notes")
        rows = [
            (
                found.name,
                found.verdict.value,
                number(found.objective),
                lower(found.bound),
                yes_no(found.proved),
                "; ".join(found.notes) or MISSING,
            )
            for found in blocks
        ]
        typer.echo("\n".join(text_table(headings, rows, left=2)))
    _leave([found.verdict for found in blocks])


def _leave(verdicts: Sequence[Verdict]) -> None:
    """End with the exit code of the worst verdict."""
    if Verdict.WRONG in verdicts:
        raise typer.Exit(ERROR)
    if Verdict.UNCHECKED in verdicts:
        raise typer.Exit(UNCHECKED)


def _verification(found: Verification) -> Mapping[str, str]:
    return {
        "verdict": found.verdict.value,
        "feasible": yes_no(found.feasible),
        "objective": number(found.objective),
        "bound": lower(found.bound),
        "bound checked": yes_no(found.bound_checked),
        "notes": "; ".join(found.notes) or MISSING,
    }
