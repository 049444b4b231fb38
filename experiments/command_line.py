"""The part of the command line that experiments with a ledger share."""

from __future__ import annotations

import argparse
from pathlib import Path


def experiment_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the command line of ``python -m experiments.<name>``, its description as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_run_options(root: argparse.ArgumentParser, *, seeds: int, out: Path) -> None:
    """Add how many seeds there are, where data are, and where results go."""
    root.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds (default {seeds})")
    root.add_argument("--data", type=Path, help="data directory (default: $CBS_OPT_DATA)")
    root.add_argument("--out", type=Path, default=out, help=f"default {out}")


def add_no_verify(root: argparse.ArgumentParser) -> None:
    """Add the option to take other data files than those that the tables were made with."""
    root.add_argument("--no-verify", action="store_true", help="accept data files with other checksums")
