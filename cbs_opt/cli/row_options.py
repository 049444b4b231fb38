"""Options of `cbs-opt prune` on where gradient rows are, and the plan that is told before a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbs_opt.system.sizes import parsed

if TYPE_CHECKING:
    from cbs_opt.run_size import RunSize

RowMemory = Annotated[
    str | None,
    typer.Option(
        help="Memory for gradient rows, such as 2GB; if they take more they go to disk and blocks are worked "
        "on one at a time. For --partition layer, row or a number."
    ),
]
RowDir = Annotated[Path | None, typer.Option(help="Folder for rows on disk; the system's temporary one.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="State sizes, disk space and peak memory, and stop there.")
]


def parse_size(text: str | None, hint: str) -> int | None:
    """A size such as 2GB in bytes."""
    try:
        return None if text is None else parsed(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=hint) from error


def state_plan(plan: RunSize, *, dry_run: bool, wanted: bool, as_json: bool) -> None:
    """Tell the plan before the run starts if it is wanted, or instead of it."""
    if dry_run:
        typer.echo(json.dumps(plan.to_dict(), allow_nan=False) if as_json else plan.summary())
        raise typer.Exit
    if wanted:
        typer.echo(plan.summary(), err=True)
