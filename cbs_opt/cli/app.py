"""The application: global options, and the commands, each in its own module."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import metadata
from typing import Annotated

import typer

from cbs_opt.cli import blocks, compare, demo, prune, study

EPILOG = "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted."
COMMANDS: dict[str, Callable[..., None]] = {
    **{"demo": demo.run, "prune": prune.run, "methods": compare.methods, "solve": blocks.solve},
    **{"bound": blocks.bound, "compare": compare.compare, "verify": blocks.verify, "export": blocks.export},
    **{"solvers": compare.solvers, "library": compare.library, "study": study.run},
    **{"report": study.report, "prepare": compare.prepare},
}

app = typer.Typer(
    name="cbs-opt",
    help="Prune neural networks by combinatorial optimisation.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EPILOG)(_command)


def main() -> None:
    """Entry point of the `cbs-opt` script."""
    app(prog_name="cbs-opt")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cbs-opt {metadata.version('cbs-opt')}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
