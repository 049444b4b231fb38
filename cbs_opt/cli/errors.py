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

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from formulations.errors import ArgumentError, CbsError

ERROR = 1
USAGE = 2
UNCHECKED = 3
INTERRUPTED = 130

OPTIONS = {
    "blocks": "--partition",
    "budget": "--budget",
    "certify_time_limit": "--certify-time-limit",
    "curvature": "--curvature",
    "damping": "--damping",
    "executor": "--workers",
    "final_updates": "--final-updates",
    "gradient_samples": "--gradient-samples",
    "ignore": "--ignore",
    "method": "--method",
    "method_options": "--method-option",
    "partition": "--partition",
    "program": "--program",
    "restarts": "--restarts",
    "row_memory": "--row-memory",
    "run_dir": "--resume, --run-dir",
    "samples": "--samples",
    "samples_per_row": "--samples-per-row",
    "schedule": "--schedule",
    "seed": "--seed",
    "sparsity": "--sparsity",
    "stages": "--stages",
    "start_sparsity": "--start-sparsity",
    "target": "--target",
    "target, ignore": "--target, --ignore",
    "time_limit": "--time-limit",
    "update_scale": "--update-scale",
    "updates_per_stage": "--updates-per-stage",
}
"""Options of `cbs-opt prune` by the argument of `prune` that they set."""

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


@contextmanager
def reported(
    debug: bool, options: Mapping[str, str] = OPTIONS, stopped: str = NOTHING_WRITTEN
) -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit code; leave them alone under `debug`.

    An `ArgumentError` about a key of `options` is wrong usage of the option it maps to. `stopped` is what
    is said after Ctrl-C.
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
        if isinstance(error, ArgumentError) and error.argument in options:
            message = f"{error.found}; {error.remedy}"
            raise typer.BadParameter(message, param_hint=options[error.argument]) from error
        known = isinstance(error, CbsError | OSError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        typer.echo(f"error: {' '.join(text.split())}", err=True)
        raise typer.Exit(ERROR) from error
