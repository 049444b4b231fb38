"""`cbs-opt prune` with rows on disk, and the plan that it tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cbs_opt.cli import app

pytestmark = pytest.mark.usefixtures("without_pictures")

MODEL = """
import torch

def make():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
"""
BUDGET = str(4 * 40 * 50)
"""The rows of the larger layer and not of both."""
LAYERS = ("--set", "weights.blocks=layer")
MEMORY = ("--set", f"resources.row_memory={BUDGET}")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network, data and a folder for rows."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    np.savez("train.npz", x=generator.normal(size=(60, 6)), y=generator.integers(3, size=60))
    Path("rows").mkdir()
    return tmp_path


def prune(out: str, *more: str) -> Result:
    common = ("--model", "net.py:make", "--data", "train.npz", "--sparsity", "0.5", "--samples", "40")
    options = ("--method", "obs", "--program", "selection", "--damping", "0.1")
    return CliRunner().invoke(app, ["prune", *common, *options, "--out", out, *more])


@pytest.mark.usefixtures("work")
def test_rows_on_disk_give_the_same_files_and_are_gone_afterwards() -> None:
    assert prune("memory", *LAYERS).exit_code == 0
    result = prune("disk", *LAYERS, *MEMORY, "--set", "resources.row_dir=rows")
    assert result.exit_code == 0, result.output
    told = prune("dry", *LAYERS, *MEMORY, "--set", "resources.row_dir=rows", "--dry-run").stdout
    assert "on disk in rows" in told
    assert "peak memory: " in told
    weights = [Path(out, "weights.safetensors").read_bytes() for out in ("memory", "disk")]
    assert weights[0] == weights[1]
    assert list(Path("rows").iterdir()) == []


@pytest.mark.usefixtures("work")
def test_a_dry_run_tells_and_writes_nothing() -> None:
    plain = prune("run", *LAYERS, "--dry-run")
    assert plain.exit_code == 0, plain.output
    assert "gradient rows: 40, " in plain.stdout
    told = json.loads(prune("run", *LAYERS, "--dry-run", "--json").stdout)
    assert (told["n"], told["blocks"], told["rows"]) == (72, 2, 40)
    assert told["peak_bytes"] > told["resident_bytes"] > 0
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--set", "resources.row_memory=lots"), 2, "write such as 2GB"),
        ((*MEMORY, "--set", "weights.blocks=global"), 2, "cut blocks of at most 50 weights"),
        ((*MEMORY, *LAYERS, "--set", "resources.row_dir=none"), 2, "none is not a folder"),
    ],
    ids=["no size", "one block", "no folder"],
)
@pytest.mark.usefixtures("work")
def test_what_cannot_be_is_said_in_a_line(options: tuple[str, ...], code: int, words: str) -> None:
    result = prune("run", *options)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert not Path("run").exists()
