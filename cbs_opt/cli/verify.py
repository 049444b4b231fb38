"""`cbs-opt verify`: a solution of a block, or every certificate of a pruning run, checked again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbs_opt.cli.blocks import AsJson, Debug, aligned, echo_json, load_block, lower, number, yes_no
from cbs_opt.cli.errors import ERROR, reported
from cbs_opt.cli.tables import MISSING, text_table

if TYPE_CHECKING:
    from formulations.loss import Verification

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
    """Recompute feasibility, objective and certified bound; exit code 1 if one is wrong.

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
        from formulations.loss import verify as verify_solution

        problem = load_block(block)
        result = verify_solution(problem, instances.read_solution(solution, problem))
        if as_json:
            echo_json(result)
        else:
            typer.echo("\n".join(aligned(_verification(result))))
        if not result.ok:
            raise typer.Exit(ERROR)


def _verify_run(directory: Path, as_json: bool) -> None:
    from tqdm import tqdm

    from cbs_opt.report.verification import check_certificates

    blocks = list(tqdm(check_certificates(directory), desc="blocks", unit="block", disable=None))
    if as_json:
        echo_json(blocks)
    else:
        rows = [
            (
                *(block.name, yes_no(block.ok), number(block.objective), lower(block.bound)),
                *(yes_no(block.proved), "; ".join(block.notes) or MISSING),
            )
            for block in blocks
        ]
        headings = ("block", "ok", "objective", "bound", "proved", "notes")
        typer.echo("\n".join(text_table(headings, rows, left=2)))
    if not all(block.ok for block in blocks):
        raise typer.Exit(ERROR)


def _verification(result: Verification) -> Mapping[str, str]:
    return {
        "ok": yes_no(result.ok),
        "feasible": yes_no(result.feasible),
        "objective": number(result.objective),
        "bound": lower(result.bound),
        "bound checked": yes_no(result.bound_checked),
        "notes": "; ".join(result.notes) or MISSING,
    }
