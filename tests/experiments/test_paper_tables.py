"""The table command: cells, resuming, figures, and what it writes; on tiny data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cbs_opt import prune, recalibrate_batchnorm
from cbs_opt.curvature.kinds import EmpiricalFisher, SketchedFisher
from cbs_opt.network.evaluation import evaluate
from cbs_opt.recipe.records import Recipe, Stages
from experiments import paper_tables, protocols, trajectories
from experiments.augmentation import AugmentedImages, as_trained
from experiments.datasets import load_dataset
from experiments.ledger import Ledger, settings_key
from experiments.networks import NETWORKS, MLPNet, ResNet20, load_network
from experiments.protocols import METHODS, prune_arguments
from experiments.published import ACCURACY
from experiments.recalibration import recalibrated_accuracy
from formulations.errors import ArgumentError
from tests.experiments.tiny_data import needs_data, write_cifar10, write_mnist, write_network


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    write_mnist(tmp_path, train=40, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    return tmp_path


def recorded(out: Path) -> list[dict[str, Any]]:
    """What the ledger of a run holds: JSON behind a checksum, line by line."""
    lines = (out / "results.jsonl").read_text().splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines]


def command(data_dir: Path, *more: str) -> list[str]:
    out = data_dir / "out"
    fixed = ["--network", "mlpnet_mnist", "--data", str(data_dir), "--out", str(out), "--no-verify"]
    return [*fixed, *more]


def test_writes_a_table_with_exact_counts_beside_the_published_figures(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = command(
        data_dir, "--sparsity", ".9", "--methods", "magnitude", "update_only", "--seeds", "2", "--json"
    )
    assert paper_tables.main(wanted) == 0
    table = json.loads(capsys.readouterr().out)
    by_method = {row["method"]: row for row in table["rows"]}
    assert by_method["magnitude"]["seeds"] == 1
    assert by_method["update_only"]["seeds"] == 2
    assert by_method["magnitude"]["published"] == 90.30
    assert by_method["update_only"]["published"] is None
    for cell in table["cells"]:
        assert cell["n_prune"] == round(0.9 * 32_360)
    accuracies = [cell["accuracy"] for cell in table["cells"] if cell["method"] == "update_only"]
    assert by_method["update_only"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    markdown = (data_dir / "out" / "mlpnet_mnist.md").read_text()
    assert "| 0.9 | 90.30 | 91.69 | 93.14 |" in markdown
    assert (data_dir / "out" / "mlpnet_mnist.csv").read_text().count("\n") == 3


def test_a_second_run_measures_only_what_is_missing(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(kwargs["sparsity"])
        return prune(*args, **kwargs)

    monkeypatch.setattr(paper_tables.cbs_opt, "prune", counting)
    methods = ("--methods", "magnitude")
    assert paper_tables.main(command(data_dir, *methods, "--sparsity", ".5")) == 0
    assert paper_tables.main(command(data_dir, *methods, "--sparsity", ".5", ".6")) == 0
    assert calls == [0.5, 0.6]


def test_a_changed_setting_is_measured_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = command(data_dir, "--methods", "update_only", "--sparsity", ".5", "--seeds", "1")
    assert paper_tables.main(wanted) == 0
    monkeypatch.setattr(protocols, "STEP_LENGTHS", (0.5,))
    assert paper_tables.main(wanted) == 0
    assert len({cell["key"] for cell in recorded(data_dir / "out")}) == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs(method: str, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Recipe(curvature=EmpiricalFisher(samples=20, per_row=2), layer_inputs=0.0, choice_samples=10)
    monkeypatch.setattr(protocols, "BASELINE", {"mlpnet": Recipe.grid(few, damping=[0.3, 1.0])})
    monkeypatch.setattr(protocols, "CURVATURE", {"mlpnet": [replace(few, damping=0.3)]})
    monkeypatch.setattr(protocols, "JOINT", {"mlpnet": [replace(few, layer_inputs=1.0)]})
    monkeypatch.setattr(protocols, "SWAPS", {"mlpnet": (0, 5)})
    monkeypatch.setattr(trajectories, "STAGES", {"mlpnet": few_stages()})
    wanted = command(data_dir, "--methods", method, "--sparsity", ".8", "--seeds", "1")
    assert paper_tables.main(wanted) == 0
    (cell,) = recorded(data_dir / "out")
    assert cell["n_prune"] == round(0.8 * 32_360)


def few_stages() -> trajectories.Staged:
    staged = trajectories.STAGES["mlpnet"]
    few = SketchedFisher(samples=20, per_row=2)
    return trajectories.Staged(
        recipe=replace(staged.recipe, curvature=few, choice_samples=10),
        dampings=(1.0,),
        stages=Stages(count=2, schedule=(0.5, 0.8), updates=1, final_updates=1, gradient_samples=20),
    )


def test_one_run_in_stages_serves_every_sparsity_that_it_passes(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[float] = []

    def counting(*args: object, **kwargs: object) -> object:
        calls.append(kwargs["sparsity"])
        return prune(*args, **kwargs)

    monkeypatch.setattr(trajectories.cbs_opt, "prune", counting)
    monkeypatch.setattr(trajectories, "STAGES", {"mlpnet": few_stages()})
    wanted = command(data_dir, "--methods", "staged", "--sparsity", ".5", ".8", "--seeds", "2")
    assert paper_tables.main(wanted) == 0
    assert calls == [0.8, 0.8]
    lines = recorded(data_dir / "out")
    assert [(cell["seed"], cell["sparsity"]) for cell in lines] == [(0, 0.5), (0, 0.8), (1, 0.5), (1, 0.8)]
    for cell in lines:
        assert cell["n_prune"] == round(cell["sparsity"] * 32_360)
        assert len(cell["steps"]) == 1
    assert lines[0]["gradient_samples"] < lines[1]["gradient_samples"]
    assert lines[0]["seconds"] < lines[1]["seconds"]


def test_a_sparsity_that_no_run_in_stages_passes_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="sparsity"):
        prune_arguments("mlpnet_mnist", "staged", 0.123, 0)


@pytest.mark.parametrize("name", ["mlpnet_mnist", "resnet20_cifar10"])
def test_runs_in_stages_pass_the_published_sparsities(name: str) -> None:
    for sparsity in ACCURACY[name]:
        assert prune_arguments(name, "staged", sparsity, 0)["sparsity"] == max(ACCURACY[name])


def test_a_network_in_bfloat16_has_the_parameters_of_the_one_inside() -> None:
    torch.manual_seed(0)
    network = ResNet20().eval()
    fast = trajectories.BrainFloat(network).eval()
    x = torch.randn(4, 3, 32, 32)
    assert fast(x).dtype == torch.float32
    torch.testing.assert_close(fast(x), network(x), rtol=0.1, atol=0.1)
    inside = dict(network.named_parameters())
    for parameter_name, parameter in fast.named_parameters():
        assert parameter is inside[parameter_name.removeprefix(trajectories.PREFIX)]


def test_missing_data_is_an_error_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        paper_tables.main(["--network", "mlpnet_mnist", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    )
    assert "mnist.npz" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--sparsity", "1.0"], ["--seeds", "0"], ["--methods", "cleverness"]])
def test_usage_errors_exit_with_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        paper_tables.main(["--network", "mlpnet_mnist", *wrong])
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


def test_unknown_method_has_no_protocol() -> None:
    with pytest.raises(ArgumentError, match="magnitude"):
        prune_arguments("mlpnet_mnist", "cleverness", 0.5, 0)


def test_settings_are_plain_and_differ_between_cells() -> None:
    keys = set()
    for network in NETWORKS:
        for cell in paper_tables.cells(network, METHODS, [0.5, 0.9], range(2)):
            keys.add(settings_key(cell.settings()))
    assert len(keys) == len(NETWORKS) * 2 * (1 + 2 * (len(METHODS) - 1))


def test_ledger_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Ledger(path).add("a", {"value": 1})
    with path.open("a") as stream:
        stream.write('{"key": "b", "val')
    damaged = Ledger(path)
    assert "a" in damaged
    assert "b" not in damaged
    damaged.add("c", {"value": 3})
    again = Ledger(path)
    assert again["c"]["value"] == 3
    assert again["a"]["value"] == 1


@needs_data
@pytest.mark.slow
def test_magnitude_reproduces_the_published_row(tmp_path: Path) -> None:
    wanted = ["--network", "mlpnet_mnist", "--methods", "magnitude", "--sparsity", ".9", ".95", ".98"]
    assert paper_tables.main([*wanted, "--out", str(tmp_path)]) == 0
    found = {cell["sparsity"]: cell["accuracy"] for cell in recorded(tmp_path)}
    assert found == pytest.approx({0.9: 90.30, 0.95: 83.64, 0.98: 32.25}, abs=0.03)


def test_batch_norm_statistics_estimated_anew_have_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    write_cifar10(tmp_path, train=12, test=20)
    network = ResNet20().eval()
    write_network(tmp_path, "resnet20_cifar10", network)
    wanted = ["--network", "resnet20_cifar10", "--methods", "magnitude", "--sparsity", ".9", "--no-verify"]
    assert paper_tables.main([*wanted, "--data", str(tmp_path), "--out", str(tmp_path)]) == 0
    plain, anew = capsys.readouterr().out.split("Batch-norm statistics estimated anew")
    (cell,) = recorded(tmp_path)
    assert plain.rstrip().endswith(f"{cell['accuracy']:.2f} |")
    assert anew.rstrip().endswith(f"{cell['accuracy_recalibrated']:.2f} |")


def test_recalibration_leaves_the_network_alone_and_uses_training_data_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    write_cifar10(tmp_path, train=12, test=20)
    data = load_dataset("cifar10", tmp_path, mean=[0.5] * 3, std=[0.5] * 3, verify=False)
    write_network(tmp_path, "resnet20_cifar10", ResNet20().eval())
    network = load_network("resnet20_cifar10", tmp_path, verify=False)
    before = {name: value.clone() for name, value in network.model.state_dict().items()}
    found = recalibrated_accuracy(network, network.model, data)
    for name, value in network.model.state_dict().items():
        assert torch.equal(value, before[name])
    moved = as_trained(network, data, seed=0)
    assert isinstance(moved, AugmentedImages)
    recalibrate_batchnorm(network.model, moved)
    expected = evaluate(network.model, (data.test_x, data.test_y), torch.nn.functional.cross_entropy)
    assert expected.accuracy is not None
    assert found == pytest.approx(100.0 * expected.accuracy)
    assert recalibrated_accuracy(network, MLPNet(), data) is None
