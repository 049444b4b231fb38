"""`cbs-opt verify`: a solution of a block, or every certificate of a pruning run, checked again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbs_opt.cli.blocks import AsJson, Debug, aligned, echo_json, load_block, lower, number, yes_no
from cbs_opt.cli.errors import ERROR, UNCHECKED, reported
from cbs_opt.cli.tables import MISSING, text_table

if TYPE_CHECKING:
    from formulations.verification import Verdict, Verification

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
    with reported(debug):
        if Path(block).is_dir():
            if solution is not None:
                raise typer.BadParameter("a directory has its own", param_hint="SOLUTION")
            _verify_run(Path(block), as_json)
            return
        if solution is None:
            raise typer.BadParameter("name the solution of this block", param_hint="SOLUTION")
        from formulations import instances
        from formulations.verification import verify as verify_solution

        problem = load_block(block)
        result = verify_solution(problem, instances.read_solution(solution, problem))
        if as_json:
            echo_json(result)
        else:
            typer.echo("\n".join(aligned(_verification(result))))
        _leave([result.verdict])


def _verify_run(directory: Path, as_json: bool) -> None:
    from tqdm import tqdm

    from cbs_opt.report.verification import check_certificates

    blocks = list(tqdm(check_certificates(directory), desc="blocks", unit="block", disable=None))
    if as_json:
        echo_json(blocks)
    else:
        rows = [
            (
                *(block.name, block.verdict.value, number(block.objective), lower(block.bound)),
                *(yes_no(block.proved), "; ".join(block.notes) or MISSING),
            )
            for block in blocks
        ]
        headings = ("block", "verdict", "objective", "bound", "proved", "notes")
        typer.echo("\n".join(text_table(headings, rows, left=2)))
    _leave([block.verdict for block in blocks])


def _leave(verdicts: Sequence[Verdict]) -> None:
    """End with the exit code of the worst verdict."""
    from formulations.verification import Verdict

    if Verdict.WRONG in verdicts:
        raise typer.Exit(ERROR)
    if Verdict.UNCHECKED in verdicts:
        raise typer.Exit(UNCHECKED)


def _verification(result: Verification) -> Mapping[str, str]:
    return {
        "verdict": result.verdict.value,
        "feasible": yes_no(result.feasible),
        "objective": number(result.objective),
        "bound": lower(result.bound),
        "bound checked": yes_no(result.bound_checked),
        "notes": "; ".join(result.notes) or MISSING,
    }
