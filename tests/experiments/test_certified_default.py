"""Certificates of the default recipe: cells that verify, resuming, and a line a block; on tiny data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import certified_default
from experiments.networks import MLPNet, load_network
from tests.experiments.tiny_data import write_mnist, write_network


def test_cells_verify_and_are_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    write_mnist(tmp_path, train=60, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    small = replace(load_network("mlpnet_mnist", tmp_path, verify=False), target=("fc[23].weight",))
    monkeypatch.setattr(certified_default, "load_network", lambda *_, **__: small)
    command = ["--network", "mlpnet_mnist", "--sparsity", ".8", "--blocks", "layer"]
    command += ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify"]
    assert certified_default.main(command) == 0
    first = capsys.readouterr().out
    lines = first.splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines] == ["sum of 2", "fc2.weight", "fc3.weight"]
    assert all(line.endswith("yes |") for line in lines)
    monkeypatch.setattr(certified_default, "measure", None)
    assert certified_default.main(command) == 0
    assert capsys.readouterr().out == first


def test_what_does_not_verify_is_said() -> None:
    block = {"name": "a", "n": 4, "objective": 2.0, "bound": 1.0, "gap": 0.5, "verified": True}
    costs = {"processor_seconds": 3.0, "certificate_processor_seconds": 1.0, "peak_memory_bytes": 2**30}
    cell = {"network": "net", "sparsity": 0.5, **block, **costs}
    wrong = {**block, "name": "b", "bound": None, "gap": None, "verified": False}
    text = certified_default.table([{**cell, "verified": False, "blocks_certified": [block, wrong]}])
    total, good, bad = text.splitlines()[2:]
    assert total.endswith("| 50.0 | 3 | 1 | 1.0 | NO |")
    assert good.endswith("yes |")
    assert "| none |" in bad
    assert bad.endswith("NO |")
