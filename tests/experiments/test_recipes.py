"""The table of recipes by name: cells, resuming, and what it writes; on tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import recipes
from experiments.networks import MLPNet
from tests.experiments.tiny_data import write_mnist, write_network


def test_a_table_has_a_line_a_recipe_and_is_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    write_mnist(tmp_path, train=60, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    out = tmp_path / "out"
    command = ["--network", "mlpnet_mnist", "--recipes", "fast", "--sparsity", ".9", "--seeds", "2"]
    command += ["--data", str(tmp_path), "--out", str(out), "--no-verify"]
    assert recipes.main(command) == 0
    first = capsys.readouterr().out
    (line,) = [line for line in first.splitlines() if "fast" in line]
    assert line.count("±") == 1
    assert (out / "mlpnet_mnist.md").read_text() == first
    monkeypatch.setattr(recipes, "measure", None)
    assert recipes.main(command) == 0
    assert capsys.readouterr().out == first
    assert torch.get_num_threads() == threads


def test_the_smallest_weights_of_a_pattern_go_beside_the_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_mnist(tmp_path, train=60, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    command = ["--network", "mlpnet_mnist", "--recipes", "magnitude", "--sparsity", "2:4", "--seeds", "1"]
    command += ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify"]
    assert recipes.main(command) == 0
    assert "| mlpnet_mnist | magnitude |" in capsys.readouterr().out


def test_bad_arguments_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["--network", "mlpnet_mnist", "--data", str(tmp_path)]) == 1
    assert "data" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        recipes.main(["--network", "mlpnet_mnist", "--recipes", "quick"])
    assert caught.value.code == 2
