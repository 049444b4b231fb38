"""The application: global options, and the commands, each in its own module."""

from __future__ import annotations

import logging
from importlib import metadata
from typing import Annotated

import typer

from cbs_opt.cli import blocks, compare, demo, methods, prepare, prune, report, study, verify

EPILOG = "Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted."

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
app.command("demo", epilog=EPILOG)(demo.run)
app.command("prune", epilog=EPILOG)(prune.run)
app.command("methods", epilog=EPILOG)(methods.run)
app.command("solve", epilog=EPILOG)(blocks.solve)
app.command("bound", epilog=EPILOG)(blocks.bound)
app.command("compare", epilog=EPILOG)(compare.compare)
app.command("verify", epilog=EPILOG)(verify.verify)
app.command("export", epilog=EPILOG)(blocks.export)
app.command("solvers", epilog=EPILOG)(compare.solvers)
app.command("library", epilog=EPILOG)(blocks.library)
app.command("study", epilog=EPILOG)(study.run)
app.command("report", epilog=EPILOG)(report.run)
app.command("prepare", epilog=EPILOG)(prepare.run)


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
