"""`cbs-opt methods`: what can be named after --method."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cbs_opt.cli.errors import reported
from cbs_opt.cli.tables import text_table

if TYPE_CHECKING:
    from cbs_opt.select.methods import Method

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def run(as_json: AsJson = False) -> None:
    """List the methods, the programs they take and their options."""
    with reported(debug=False):
        from cbs_opt.select.methods import available_methods
        from cbs_opt.system.plain import plain

        methods = available_methods()
        if as_json:
            listed = [
                {
                    "name": method.name,
                    "kind": method.kind,
                    "programs": method.programs,
                    "options": dict.fromkeys(method.programs, method.options),
                    "summary": method.summary,
                }
                for method in methods
            ]
            typer.echo(json.dumps(plain(listed), allow_nan=False))
            return
        rows = [(m.name, m.kind, " ".join(m.programs), _options(m), m.summary) for m in methods]
        headings = ("method", "kind", "programs", "options", "what it does")
        typer.echo("\n".join(text_table(headings, rows, left=len(headings))))


def _options(method: Method) -> str:
    return " ".join(method.options) or "-"
