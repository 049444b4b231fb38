"""Comparing recipes on training data: nothing of the test set is read, nothing set aside is pruned with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cbs_opt
from experiments import protocol_search, protocols
from experiments.datasets import load_dataset
from experiments.networks import MLPNet, load_network
from experiments.protocols import drops, prune_arguments
from experiments.row_cache import RowCache
from tests.experiments.tiny_data import write_mnist, write_network


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    write_mnist(tmp_path, train=60, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    few = {"curvature": "empirical_fisher", "samples": 20, "samples_per_row": 2, "choice_samples": 10}
    monkeypatch.setattr(protocols, "CURVATURE", {"mlpnet": {**few, "damping": (0.3, 1.0)}})
    monkeypatch.setattr(protocol_search, "HELD_OUT", 15)
    verified = protocol_search.load_dataset
    monkeypatch.setattr(
        protocol_search, "load_dataset", lambda *args, **kwargs: verified(*args, **kwargs, verify=False)
    )
    loaded = protocol_search.load_network
    monkeypatch.setattr(
        protocol_search, "load_network", lambda name, directory: loaded(name, directory, verify=False)
    )
    return tmp_path


def test_prints_and_writes_the_recipes_by_held_out_loss(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = ["as in the tables", "layer inputs 1"]
    given = [
        "--network",
        "mlpnet_mnist",
        "--method",
        "update_only",
        "--sparsity",
        ".8",
        "--recipes",
        *recipes,
    ]
    assert protocol_search.main([*given, "--data", str(data_dir), "--out", str(data_dir / "out")]) == 0
    printed = capsys.readouterr().out
    assert all(recipe in printed for recipe in recipes)
    table = pd.read_csv(data_dir / "out" / "mlpnet_mnist_update_only.csv")
    assert set(table["recipe"]) == set(recipes)
    assert table["loss"].is_monotonic_increasing
    assert table["loss"].nunique() == 2


def test_the_test_set_is_not_read(data_dir: Path) -> None:
    def losses() -> list[float]:
        frame = protocol_search.measure("mlpnet_mnist", "update_only", [0.8], ["damping 1"], 1, data_dir)
        return frame["loss"].tolist()

    before = losses()
    arrays = dict(np.load(data_dir / "mnist.npz"))
    arrays["test_images"] = 255 - arrays["test_images"]
    np.savez(data_dir / "mnist.npz", **arrays)
    assert losses() == before


def test_what_is_set_aside_is_the_end_of_the_training_set(data_dir: Path) -> None:
    data = load_dataset("mnist", data_dir, mean=(0.1307,), std=(0.3081,), verify=False)
    (x, y), (held_x, held_y) = protocol_search.split(data)
    assert len(y) == 45
    assert len(held_y) == 15
    assert torch.equal(torch.cat([x, held_x]), data.train_x)
    assert torch.equal(torch.cat([y, held_y]), data.train_y)


def test_missing_data_is_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--network", "mlpnet_mnist", "--method", "cbs", "--data", str(tmp_path), "--out", str(tmp_path)]
    assert protocol_search.main(given) == 1
    assert "mnist.npz" in capsys.readouterr().err


def test_rows_are_computed_once_for_equal_settings(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = cbs_opt.gradient_rows

    def counting(*args: object, **kwargs: object) -> cbs_opt.Rows:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(cbs_opt, "gradient_rows", counting)
    network = load_network("mlpnet_mnist", data_dir, verify=False)
    data = load_dataset("mnist", data_dir, mean=network.mean, std=network.std, verify=False)
    cache = RowCache((data.train_x, data.train_y), progress=False)
    arguments = prune_arguments("mlpnet_mnist", "cbs", 0.5, 0)
    rows = cache.get(network, arguments)
    assert cache.get(network, {**arguments, "sparsity": 0.9}) is rows
    term = cache.get(network, {**arguments, "layer_inputs": 1.0})
    assert term.rows is rows.rows
    assert term.channels is not None
    assert calls == 1
    cache.get(network, prune_arguments("mlpnet_mnist", "cbs", 0.5, 1))
    assert calls == 2


@pytest.mark.parametrize(("sparsity", "expected"), [(0.0, 1), (0.1, 1), (0.5, 5), (0.9, 15)])
def test_drops_keep_about_the_same_share(sparsity: float, expected: int) -> None:
    assert drops(sparsity) == expected
    assert (1.0 - sparsity) ** (1.0 / drops(sparsity)) >= protocols.DROP_FACTOR - 1e-9
