"""The directory that `cbs-opt prune` writes: when it may be written, and what is put there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import typer
from torch import nn

from cbs_opt.certify.files import BLOCK, CERTIFICATES
from cbs_opt.report.files import save_report
from cbs_opt.report.record import PruneReport

WEIGHTS_FILE = "weights.safetensors"
STATE = "state"
"""Directory within the output where a run that can be resumed keeps what it finds."""


def state_directory(out: Path, run_dir: Path | None, resume: bool) -> Path | None:
    """Return where results are kept; None for a run that cannot be resumed."""
    return out / STATE if resume and run_dir is None else run_dir


def require_free(directory: Path, force: bool, resume: bool) -> None:
    """Refuse a directory in use, unless it is that of the run which is to go on."""
    if directory.is_file():
        raise typer.BadParameter(f"{directory} is a file", param_hint="--out")
    if not directory.is_dir() or not any(directory.iterdir()) or force:
        return
    if resume and (directory / STATE).is_dir():
        return
    message = f"{directory} is not empty; choose another directory or pass --force"
    raise typer.BadParameter(message, param_hint="--out")


@contextmanager
def block_directory(out: Path, state: Path | None, wanted: bool) -> Iterator[Path | None]:
    """Yield where the data of blocks go until the run has succeeded; None unless wanted."""
    if not wanted:
        yield None
        return
    if state is not None:
        # What a killed run has written there is of use to the next one.
        yield state / "blocks"
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as directory:
        yield Path(directory)


def write_outputs(network: nn.Module, report: PruneReport, out: Path, block_dir: Path | None) -> None:
    """Write weights, masks, report and the data of blocks; report.json comes last but for the blocks."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{WEIGHTS_FILE}"
    safetensors.torch.save_model(network, str(temporary))
    temporary.replace(out / WEIGHTS_FILE)
    save_report(report, out)
    _keep_blocks(block_dir, out)


def _keep_blocks(block_dir: Path | None, out: Path) -> None:
    """Put the data of the blocks where their certificates are."""
    kept = out / CERTIFICATES
    for stale in kept.glob(f"*{BLOCK}"):
        stale.unlink()
    for path in sorted(block_dir.glob(f"*{BLOCK}")) if block_dir is not None else ():
        try:
            os.link(path, kept / path.name)
        except OSError:
            # Another file system, or one without links.
            shutil.copyfile(path, kept / path.name)
