"""Certifying on the command line: what `prune --certify` leaves, what `verify` finds, what `bound` says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cbs_opt.certify.files import CERTIFICATES, block_path, certificate_path
from cbs_opt.cli import app
from cbs_opt.report.files import load_report
from cbs_opt.report.parts import MEANING
from formulations import BlockProblem
from formulations.enumeration import enumerate_optimum
from formulations.instances import read_instance, write_instance

pytestmark = pytest.mark.usefixtures("without_pictures")

NETWORK = """
import torch

def make():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
"""


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network, data and a block."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORK)
    generator = np.random.default_rng(0)
    np.savez("train.npz", x=generator.normal(size=(60, 6)), y=generator.integers(3, size=60))
    rows = generator.normal(size=(20, 10)) / np.sqrt(20)
    block = BlockProblem(weights=generator.normal(size=10), n_prune=5, rows=rows, damping=0.1)
    write_instance("block.npz", block)
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def prune(*more: str) -> Result:
    common = ("--model", "net.py:make", "--data", "train.npz", "--sparsity", "0.5", "--samples", "40")
    return invoke("prune", *common, "--set", "weights.blocks=layer", "--out", "run", *more)


def test_a_certified_run_verifies_and_leaves_no_scratch(work: Path) -> None:
    result = prune("--certify", "--save-blocks")
    assert result.exit_code == 0, result.output
    assert MEANING in result.stdout
    assert not [path for path in work.iterdir() if path.name.startswith(".")]
    assert len(list(Path("run", CERTIFICATES).iterdir())) == 4
    checked = invoke("verify", "run")
    assert checked.exit_code == 0, checked.output
    said = json.loads(invoke("verify", "run", "--json").stdout)
    report = load_report("run")
    assert [block["name"] for block in said] == [block.name for block in report.blocks]
    assert all(block["verdict"] == "ok" and block["proved"] for block in said)
    for line, block in zip(checked.stdout.splitlines()[2:], report.blocks, strict=True):
        assert block.bound is not None
        assert Fraction(line.split()[3]) <= Fraction(block.bound)


def test_a_spoilt_run_does_not_verify() -> None:
    prune("--certify", "--save-blocks")
    directory = Path("run", CERTIFICATES)
    block_path(directory, 1).write_bytes(block_path(directory, 0).read_bytes())
    result = invoke("verify", "run")
    assert result.exit_code == 1
    assert "other data" in result.stdout
    certificate_path(directory, 0).unlink()
    result = invoke("verify", "run")
    assert result.exit_code == 1
    assert "1 certificates for 2 blocks" in result.stderr


def test_without_the_data_of_the_blocks_the_remedy_is_named() -> None:
    assert prune("--certify").exit_code == 0
    result = invoke("verify", "run")
    assert result.exit_code == 1
    assert "--save-blocks" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--save-blocks",), "--certify"),
        (("--set", "certify.time_limit=-1"), "--set certify.time_limit"),
    ],
)
def test_wrong_usage_writes_nothing(work: Path, arguments: tuple[str, ...], words: str) -> None:
    before = sorted(work.iterdir())
    result = prune(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert [path for path in sorted(work.iterdir()) if path.name != "__pycache__"] == before


def test_an_interrupted_certification_writes_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cbs_opt.certify.certificates.lower_bound", stop)
    result = prune("--certify", "--save-blocks")
    assert result.exit_code == 130
    assert not Path("run").exists()
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


def test_verify_wants_a_solution_for_a_block_and_none_for_a_run() -> None:
    assert "SOLUTION" in invoke("verify", "block.npz").stderr
    prune("--certify", "--save-blocks")
    assert invoke("verify", "run", "block.npz").exit_code == 2


@pytest.mark.parametrize("program", ["selection", "joint"])
@pytest.mark.parametrize("switches", [(), ("--fix",), ("--option", "diagonal_split=false")])
def test_bound_says_what_makes_the_gap(program: str, switches: tuple[str, ...]) -> None:
    result = invoke("bound", "block.npz", "--program", program, *switches, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    problem = read_instance("block.npz")[0]
    best = enumerate_optimum(problem, program).objective
    assert best is not None
    assert said["bound"] <= best <= said["objective"] + 1e-15
    assert said["gap"] == pytest.approx((said["objective"] - said["bound"]) / said["objective"])
    assert problem.rows is not None
    assert said["rho"] == pytest.approx(0.1 * 10 / (problem.rows**2).sum())
    assert said["n_over_effective_rank"] == pytest.approx(10 / said["effective_rank"])
    assert 0 <= said["n_fixed"] <= 10
    text = invoke("bound", "block.npz", "--program", program, *switches).stdout
    shown = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert Fraction(shown["bound"]) <= Fraction(said["bound"])
    assert shown["certificate"] == said["certificate"]


def test_bound_names_its_relaxations() -> None:
    said = json.loads(
        invoke("bound", "block.npz", "--program", "selection", "--relaxation", "mccormick", "--json").stdout
    )
    assert said["certificate"] == "mccormick"
    refused = invoke("bound", "block.npz", "--program", "joint", "--relaxation", "mccormick")
    assert refused.exit_code == 2
    assert "perspective" in refused.stderr
