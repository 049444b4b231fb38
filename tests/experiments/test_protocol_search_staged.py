"""Recipes in stages are compared on training samples that the runs do not see."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from cbs_opt.curvature.kinds import SketchedFisher
from cbs_opt.recipe.records import Recipe, Stages
from cbs_opt.recipe.select import OBS
from experiments import protocol_search_staged, trajectories
from experiments.datasets import Dataset
from experiments.networks import MLPNet
from tests.experiments.tiny_data import write_mnist, write_network

FEW = trajectories.Staged(
    recipe=Recipe(
        curvature=SketchedFisher(samples=20, per_row=2), choice_samples=10, select=OBS(), gradient=True
    ),
    dampings=(1.0,),
    stages=Stages(count=3, schedule=(0.5, 0.8, 0.9), updates=1, final_updates=1, gradient_samples=20),
)


def test_samples_are_set_aside_without_the_test_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol_search_staged, "HELD_OUT", 3)
    x, y = torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10)
    cut = protocol_search_staged.set_aside(Dataset(train_x=x, train_y=y, test_x=-x, test_y=-y))
    assert cut.train_y.tolist() == list(range(7))
    assert cut.test_y.tolist() == [7, 8, 9]
    assert cut.test_x.flatten().tolist() == [7.0, 8.0, 9.0]


def test_the_command_writes_a_line_a_recipe_and_sparsity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_mnist(tmp_path, train=40, test=5)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    read, load = protocol_search_staged.load_dataset, protocol_search_staged.load_network
    monkeypatch.setattr(
        protocol_search_staged, "load_network", lambda name, folder: load(name, folder, verify=False)
    )
    monkeypatch.setattr(
        protocol_search_staged,
        "load_dataset",
        lambda *given, **options: read(*given, **options, verify=False),
    )
    monkeypatch.setattr(protocol_search_staged, "HELD_OUT", 10)
    monkeypatch.setattr(trajectories, "STAGES", {"mlpnet": FEW})
    monkeypatch.setattr(protocol_search_staged, "STAGES", {"mlpnet": FEW})
    command = ["--network", "mlpnet_mnist", "--data", str(tmp_path), "--out", str(tmp_path), "--until", ".8"]
    assert protocol_search_staged.main([*command, "--recipes", "as in the tables", "magnitude"]) == 0
    table = pd.read_csv(tmp_path / "mlpnet_mnist_staged.csv")
    assert sorted(zip(table["recipe"], table["sparsity"], strict=True)) == [
        ("as in the tables", 0.5),
        ("as in the tables", 0.8),
        ("magnitude", 0.5),
        ("magnitude", 0.8),
    ]
    assert "held_out_loss" in capsys.readouterr().out
    assert protocol_search_staged.main([*command, "--until", ".1"]) == 1
    assert "until" in capsys.readouterr().err
