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
from typing import Annotated

import typer

from formulations.errors import ArgumentError, CbsError

ERROR = 1
USAGE = 2
UNCHECKED = 3
INTERRUPTED = 130

OWN_NAMES = ("damping", "method", "program", "recipe", "seed", "set", "sparsity", "stages")
FLAGS = {name: f"--{name}" for name in OWN_NAMES} | {
    **{"select.method": "--method", "select.program": "--program", "stages.count": "--stages"},
    **{"curvature.samples": "--samples", "run_dir": "--resume, --run-dir"},
}
"""Options of `cbs-opt prune` that have a name of their own, by the field that they set."""
BLOCK_OPTIONS = {
    **{name: f"--{name}" for name in ("fix", "format", "method", "model", "program", "relaxation", "seed")},
    **{"iteration_limit": "--iteration-limit", "node_limit": "--node-limit", "time_limit": "--time-limit"},
    **{"rel_gap": "--rel-gap", "threads": "--threads", "model_name": "--model"},
    **{"method_options": "--option", "options": "--option"},
}
"""Options of the commands on one block, by the argument of `solve` or `export_model` that they set."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

NOTHING_WRITTEN = "nothing was written"
GOES_ON = "the same command goes on"


class UserCodeError(CbsError):
    """A file named on the command line could not be run, or gave something else than it should."""


def field_option(argument: str) -> str | None:
    """Return the option of `cbs-opt prune` that sets a field, or None for what no option sets."""
    from cbs_opt.recipe.records import Recipe, Request

    known = {"resources", *FLAGS, *Recipe.__dataclass_fields__, *Request.__dataclass_fields__}
    root = argument.partition(".")[0].partition("[")[0]
    return FLAGS.get(argument, f"--set {argument}" if root in known else None)


@contextmanager
def reported(
    debug: bool, option_of: Callable[[str], str | None] = BLOCK_OPTIONS.get, stopped: str = NOTHING_WRITTEN
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
