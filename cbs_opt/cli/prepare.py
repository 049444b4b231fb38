"""`cbs-opt prepare`: compile ahead what the methods would compile at their first use."""

from __future__ import annotations

import typer

from cbs_opt.cli.errors import reported


def run() -> None:
    """Compile ahead, once after an installation: what exact methods and searches else do at first use."""
    with reported(debug=False):
        from cbs_opt.select.preparation import prepare_all

        prepare_all()
        typer.echo("ready", err=True)
