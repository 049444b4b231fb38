"""How a command ends.

==== ==================================================================================
code meaning
==== ==================================================================================
0    done
1    error: unusable model, data or weights, a full disk, a failure of our own
2    usage: unknown command or option, missing or impossible value, directory in use
3    `verify`: nothing is wrong, but not everything that is claimed could be checked
130  interrupted
==== ==================================================================================

Errors are one line on stderr. ``--debug`` shows the traceback instead, with the same exit code for
errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from formulations.errors import ArgumentError, CbsError

ERROR = 1
USAGE = 2
UNCHECKED = 3
INTERRUPTED = 130

FLAGS = {
    "curvature.samples": "--samples",
    "damping": "--damping",
    "method": "--method",
    "program": "--program",
    "recipe": "--recipe",
    "run_dir": "--resume, --run-dir",
    "seed": "--seed",
    "select.method": "--method",
    "select.program": "--program",
    "set": "--set",
    "sparsity": "--sparsity",
    "stages": "--stages",
    "stages.count": "--stages",
}
"""Options of `cbs-opt prune` that have a name of their own, by the field that they set."""
FIELDS = (
    "certify",
    "choice_samples",
    "curvature",
    "gradient",
    "layer_inputs",
    "recipe",
    "resources",
    "select",
    "selection_damping",
    "stages",
    "update",
    "weights",
)
"""What a dotted name of a field begins with."""

BLOCK_OPTIONS = {
    "fix": "--fix",
    "format": "--format",
    "iteration_limit": "--iteration-limit",
    "method": "--method",
    "method_options": "--option",
    "model": "--model",
    "model_name": "--model",
    "node_limit": "--node-limit",
    "options": "--option",
    "program": "--program",
    "rel_gap": "--rel-gap",
    "relaxation": "--relaxation",
    "seed": "--seed",
    "threads": "--threads",
    "time_limit": "--time-limit",
}
"""Options of the commands on one block, by the argument of `solve` or `export_model` that they set."""


NOTHING_WRITTEN = "nothing was written"
GOES_ON = "the same command goes on"


class UserCodeError(CbsError):
    """A file named on the command line could not be run, or gave something else than it should."""


def field_option(argument: str) -> str | None:
    """Return the option of `cbs-opt prune` that sets a field, or None for what no option sets."""
    if argument in FLAGS:
        return FLAGS[argument]
    root = argument.partition(".")[0].partition("[")[0]
    return f"--set {argument}" if root in FIELDS else None


@contextmanager
def reported(
    debug: bool,
    option_of: Callable[[str], str | None] = BLOCK_OPTIONS.get,
    stopped: str = NOTHING_WRITTEN,
) -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit code; leave them alone under `debug`.

    An `ArgumentError` about an argument that has an option is wrong usage of that option. `stopped` is
    what is said after Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo(f"interrupted; {stopped}", err=True)
        raise typer.Exit(INTERRUPTED) from stop
    except (typer.Exit, typer.BadParameter):
        raise
    except Exception as error:
        if debug:
            raise
        option = option_of(error.argument) if isinstance(error, ArgumentError) else None
        if isinstance(error, ArgumentError) and option is not None:
            raise typer.BadParameter(f"{error.found}; {error.remedy}", param_hint=option) from error
        known = isinstance(error, CbsError | OSError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        typer.echo(f"error: {' '.join(text.split())}", err=True)
        raise typer.Exit(ERROR) from error
