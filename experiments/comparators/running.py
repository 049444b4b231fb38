"""Cells of comparators: measured once, kept in a ledger, gone on with after a stop."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cbs_opt.system.threads import thread_limit
from experiments.command_line import add_no_verify, add_run_options, experiment_parser
from experiments.ledger import Ledger, commit, settings_key
from formulations.errors import CbsError

DEFAULT_OUT = Path("runs/comparators")

Cell = Mapping[str, Any]
"""The settings of one measurement, as plain values."""


def comparator_parser(name: str, description: str | None, networks: Iterable[str]) -> argparse.ArgumentParser:
    """Return the command line of a comparator, whose default is the first of the networks."""
    root = experiment_parser(f"comparators.{name}", description)
    choices = list(networks)
    root.add_argument("--network", choices=choices, default=choices[0], help=f"default {choices[0]}")
    add_run_options(root, seeds=1, out=DEFAULT_OUT)
    add_no_verify(root)
    return root


def measure_cells(
    path: Path, cells: Iterable[Cell], bench: Callable[[], Callable[[Cell], Mapping[str, Any]]]
) -> int:
    """Measure the cells that a ledger lacks, with one thread, and return the exit code.

    Parameters
    ----------
    path : Path
        Of the ledger.
    cells : iterable of mapping
    bench : callable
        Loads what all cells need and returns what measures one; not called where nothing is to be done.
    """
    ledger = Ledger(path)
    todo = [cell for cell in cells if settings_key(cell) not in ledger]
    if not todo:
        return 0
    try:
        with thread_limit(1):
            measure = bench()
            for cell in tqdm(todo, desc=path.stem, disable=None):
                ledger.add(settings_key(cell), {**cell, **measure(cell), "commit": commit()})
    except CbsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
