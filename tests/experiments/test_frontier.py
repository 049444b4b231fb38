"""The frontier: rivals prune and count exactly, runs are gone on with, the page says what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import experiments.frontier as frontier
import experiments.frontier_page as frontier_page
from cbs_opt.network.masks import apply_masks
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.named import Named
from experiments.datasets import Dataset
from experiments.ledger import Ledger, settings_key
from experiments.networks import MLPNet, Network
from experiments.rivals_training import (
    GRID,
    Cost,
    Sparsities,
    Training,
    batches,
    best_rate,
    gradual,
    magnitude_masks,
    one_shot,
    train,
)
from formulations.errors import ArgumentError
from tests.experiments.tiny_data import write_mnist, write_network

PAGE = Path(__file__).parents[2] / frontier_page.PAGE


class Small(nn.Module):
    """A convolution with batch norm before a classifier, for images of 3 x 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.norm(self.conv(x))).mean(dim=(2, 3)))
        return logits


def small(name: str = "resnet20_small") -> Network:
    torch.manual_seed(0)
    return Network(
        name=name,
        model=Small().eval(),
        dataset="none",
        target=("conv.weight", "fc.weight"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        dense_accuracy=0.0,
    )


def pictures(count: int = 70) -> Dataset:
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.arange(count) % 3
    return Dataset(train_x=x + y.view(-1, 1, 1, 1), train_y=y, test_x=x[:5], test_y=y[:5])


def trained(rule: Callable[[Training], Sparsities], **fields: Any) -> tuple[Network, Cost]:
    network = small()
    training = Training(**({"rate": 0.05, "samples": 100, "batch_size": 16} | fields))
    return network, train(network, pictures(), training, rule(training))


def zeros(network: Network) -> Tensor:
    return Partition.from_model(network.model, target=network.target).flatten(network.model) == 0.0


RULES = {"one_shot": lambda t: one_shot(0.7), "gradual": lambda t: gradual(0.7, t.samples)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("samples", [1, 15, 16, 100, 150])
def test_rivals_prune_exactly_and_differentiate_as_many_samples_as_they_say(
    rule: Callable[[Training], Sparsities], samples: int
) -> None:
    read = 0

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal read
        read += len(inputs[0])

    network = small()
    network.model.register_forward_pre_hook(count)
    training = Training(rate=0.05, samples=samples, batch_size=16)
    cost = train(network, pictures(), training, rule(training))
    assert cost.samples == samples == read
    assert cost.seconds >= 0.0
    assert int(zeros(network).sum()) == round(0.7 * 120)
    assert not network.model.training


def test_all_parameters_are_trained_and_batch_norm_sees_the_images() -> None:
    before = small().model.state_dict()
    after = trained(RULES["one_shot"])[0].model.state_dict()
    assert not [name for name, value in after.items() if value.equal(before[name])]


def test_a_fixed_mask_is_that_of_the_smallest_weights_and_of_a_pruned_network_its_own() -> None:
    dense = small()
    whole = Partition.from_model(dense.model, target=dense.target, blocks="global")
    weights = whole.flatten(dense.model).abs()
    least = weights <= weights.sort().values[83]
    network, _ = trained(RULES["one_shot"])
    assert zeros(network).equal(least)
    keep = magnitude_masks(network.model, whole, 0.7)
    for name, mask in keep.items():
        assert network.model.get_parameter(name).ne(0.0).equal(mask)
    train(network, pictures(), Training(rate=0.1, samples=60), one_shot(0.7))
    assert zeros(network).equal(least)


@pytest.mark.parametrize("samples", [100, 50_000])
def test_gradual_sparsities_rise_over_two_thirds_of_the_samples(samples: int) -> None:
    begins, shares = zip(*gradual(0.95, samples), strict=True)
    assert list(begins) == sorted(begins)
    assert list(shares) == sorted(shares)
    assert begins[0] == 0
    assert 0.6 * samples <= begins[-1] <= 2 * samples / 3
    assert shares[-1] == 0.95
    middle = [share for begin, share in zip(begins, shares, strict=True) if begin <= samples / 3][-1]
    assert middle == pytest.approx(0.95 * (1 - 0.5**3), abs=0.02)


def test_weights_that_go_gradually_stay_away_and_go_as_the_schedule_says() -> None:
    network, seen = small(), []
    network.model.register_forward_pre_hook(lambda *_: seen.append(zeros(network)))
    train(network, pictures(), Training(rate=0.05, samples=300, batch_size=10), gradual(0.7, 300))
    due = [[share for begin, share in gradual(0.7, 300) if begin <= 10 * step][-1] for step in range(30)]
    assert [int(gone.sum()) for gone in seen] == [round(share * 120) for share in due]
    assert all(bool((later | ~earlier).all()) for earlier, later in pairwise(seen))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_seed_decides_everything(rule: Callable[[Training], Sparsities]) -> None:
    def weights(**fields: Any) -> Tensor:
        model = trained(rule, **fields)[0].model
        return torch.cat([value.flatten() for value in model.parameters()])

    assert weights(seed=1).equal(weights(seed=1))
    assert not weights(seed=1).equal(weights(seed=2))


def test_a_run_that_diverges_ends_early_and_says_so() -> None:
    network, cost = trained(RULES["gradual"], rate=1e30, samples=10_000)
    assert 0 < cost.samples < 1_000
    assert not network.model.training


@pytest.mark.parametrize("name", ["resnet20_small", "mlpnet_small"])
def test_every_pass_has_all_images_once_in_another_order(name: str) -> None:
    data = pictures()
    data = replace(data, train_y=torch.arange(70))
    passes = batches(small(name), data, Training(rate=0.1, samples=1, batch_size=32))
    first, second = ([next(passes) for _ in range(3)] for _ in range(2))
    orders = [torch.cat([y for _, y in batch]) for batch in (first, second)]
    assert all(sorted(order.tolist()) == list(range(70)) for order in orders)
    assert not orders[0].equal(orders[1])
    moved = any(not x[0].equal(data.train_x[y[0]]) for x, y in first)
    assert moved == name.startswith("resnet20")


@pytest.mark.parametrize("best", GRID)
def test_a_rate_is_searched_beyond_the_ends_of_the_first_ones(best: float) -> None:
    tried = []

    def accuracy(rate: float) -> float:
        tried.append(rate)
        return -abs(GRID.index(rate) - GRID.index(best))

    assert best_rate(accuracy) == best
    assert len(tried) == len(set(tried)) >= 4
    assert best_rate(lambda rate: 10.0) == GRID[0]


@pytest.mark.parametrize(("field", "value"), [("rate", -0.1), ("samples", 0), ("samples", 1.5), ("seed", -1)])
def test_bad_training_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=rf"training\.{field}"):
        Training(**({"rate": 0.1, "samples": 10} | {field: value}))


def pruned(model: nn.Module, data: Any, *, sparsity: float, recipe: Named, **_: Any) -> SimpleNamespace:
    """Prune by magnitude, as if that took samples."""
    assert recipe.name == "fast"
    partition = Partition.from_model(model, target=recipe.weights.target, blocks=recipe.weights.blocks)
    apply_masks(model, magnitude_masks(model, partition, sparsity))
    return SimpleNamespace(samples=150, choices=("one",), notes=())


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command for MLPNet and a few digits, on a small plan, with a recipe that takes 150 samples."""
    torch.manual_seed(0)
    write_mnist(tmp_path, train=300, test=20)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    plan = frontier.Plan(sparsities=(0.9,), budgets=(100, 400))
    monkeypatch.setitem(frontier.PLANS, "mlpnet_mnist", plan)
    monkeypatch.setattr("cbs_opt.prune", pruned)
    command = ["--networks", "mlpnet_mnist", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    return [*command, "--no-verify"]


def results(command: list[str]) -> Path:
    return Path(command[command.index("--out") + 1]) / "results.jsonl"


def test_cells_are_measured_once_and_gone_on_with(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    command = [*tiny, "--contenders", "magnitude_sgd", "gradual_sgd", "fast_sgd", "fast"]
    assert frontier.main([*command, "--budgets", "400"]) == 0
    first = results(command).read_bytes()
    assert frontier.main(command) == 0
    assert results(command).read_bytes().startswith(first)
    ledger = Ledger(results(command))
    by_key = {
        (cell["contender"], cell["budget"]): ledger[settings_key(cell)]
        for cell in frontier.cells("mlpnet_mnist")
        if settings_key(cell) in ledger
    }
    assert len(by_key) == 7
    assert by_key.pop(("fast_sgd", 100))["accuracy"] is None
    for (contender, budget), entry in by_key.items():
        assert entry["n"] == 32_360
        assert entry["zeros"] == round(0.9 * 32_360)
        assert entry["samples"] == (budget or 150)
        assert ("rate" in entry) == contender.endswith("_sgd")
    monkeypatch.setattr("cbs_opt.prune", None)
    assert frontier.main([*command, "--budgets", "100", "140"]) == 0
    monkeypatch.setattr(frontier.Bench, "measure", None)
    assert frontier.main(command) == 0
    assert torch.get_num_threads() == threads


def test_rivals_do_not_depend_on_our_version_and_recipes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> dict[str, str]:
        return {
            name: settings_key(frontier.settings("mlpnet_mnist", name, 0.9, 1))
            for name in frontier.CONTENDERS
        }

    before = keys()
    monkeypatch.setattr(frontier, "__version__", "another")
    after = keys()
    same = {name for name in before if before[name] == after[name]}
    assert same == {"magnitude_sgd", "gradual_sgd"}
    assert len(set(before.values())) == len(before)


def test_data_that_are_not_there_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frontier.main(["--networks", "mlpnet_mnist", "--data", str(tmp_path)]) == 1
    assert "data" in capsys.readouterr().err


def ledger_with(path: Path, accuracies: dict[tuple[str, int | None], float | None]) -> Ledger:
    """A ledger of cells of MLPNet at .95, each of a second for every 1 000 samples."""
    ledger = Ledger(path)
    for (contender, budget), accuracy in accuracies.items():
        cell = frontier.settings("mlpnet_mnist", contender, 0.95, budget)
        samples = budget or 50_000
        entry = {**cell, "accuracy": accuracy, "samples": samples, "processor_seconds": samples / 1000}
        entry["commit"] = "abc1234" if contender == "balanced" else ""
        ledger.add(settings_key(cell), entry)
    return ledger


MEASURED: dict[tuple[str, int | None], float | None] = {
    ("balanced", None): 95.0,
    ("best_within", 30_000): 91.0,
    ("magnitude_sgd", 30_000): 90.0,
    ("magnitude_sgd", 60_000): 94.5,
    ("gradual_sgd", 60_000): 93.0,
    ("magnitude_sgd", 120_000): 96.0,
    ("balanced_sgd", 30_000): None,
    ("balanced_sgd", 120_000): 97.0,
}


def test_the_page_says_who_is_ahead_and_what_is_missing(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path / "results.jsonl", MEASURED)
    text = frontier_page.section(frontier_page.measured(ledger, "mlpnet_mnist"), "mlpnet_mnist")
    before, _, after = text.partition("### Sparsity 0.98")
    lines = {line.split("|")[1].strip(): line for line in before.splitlines() if line.startswith("| ")}
    cells = {name: [entry.strip() for entry in line.split("|")[2:-1]] for name, line in lines.items()}
    missing = frontier_page.MISSING
    assert cells["(b) magnitude, then SGD"] == [
        missing,
        "90.00 (30)",
        "94.50 (60)",
        "96.00 (120)",
        *[missing] * 3,
    ]
    assert cells['(d) "balanced", then SGD'][1:4] == ["no room", missing, "97.00 (120)"]
    assert cells["(a) above (b) and (c)"] == [missing, "+1.00", "+0.50", "-1.00", *[missing] * 3]
    assert cells["(d) above (b)"][1:4] == [missing, missing, "+1.00"]
    assert cells['"balanced"'] == ["95.00", "50 000", "50", "90.00", "90.00", "120 000"]
    assert cells['"best"'] == [missing] * 6
    assert "ahead of both rivals at 30 000, 60 000 samples, and not at 120 000 samples" in before
    assert text.startswith(f"{len(MEASURED)} of ")
    assert "Commits: abc1234." in text
    assert "Nothing was measured" in after
    assert "Nothing was measured" not in before


def test_figures_have_the_points_that_were_measured(tmp_path: Path) -> None:
    rows = frontier_page.measured(ledger_with(tmp_path / "results.jsonl", MEASURED), "mlpnet_mnist")
    left, right = frontier_page.figure(rows).axes
    for axes, scale in ((left, 1.0), (right, 1000.0)):
        drawn = {(scale * x, y) for line in axes.lines for x, y in zip(*line.get_data(), strict=True)}
        assert drawn == {(budget or 50_000, a) for (_, budget), a in MEASURED.items() if a is not None}


def test_several_seeds_are_averaged(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "results.jsonl")
    for seed, accuracy in enumerate((90.0, 92.0)):
        cell = frontier.settings("mlpnet_mnist", "fast", 0.95, None, seed)
        ledger.add(
            settings_key(cell), {**cell, "accuracy": accuracy, "samples": 10, "processor_seconds": 1.0}
        )
    text = frontier_page.section(frontier_page.measured(ledger, "mlpnet_mnist"), "mlpnet_mnist")
    assert "91.00 ± 1.41" in text
    assert "2 seeds" in text


def test_the_page_keeps_its_words_and_is_the_same_for_the_same_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, figures, path = tmp_path / "page.md", tmp_path / "figures", tmp_path / "results.jsonl"
    page.write_text(PAGE.read_text())
    command = ["--ledger", str(path), "--page", str(page), "--figures", str(figures)]
    assert frontier_page.main(command) == 1
    assert "--ledger" in capsys.readouterr().err
    assert page.read_text() == PAGE.read_text()
    ledger_with(path, MEASURED)
    assert frontier_page.main(command) == 0
    first = page.read_text(), (figures / "frontier_mlpnet_mnist.svg").read_bytes()
    assert first[0].startswith(PAGE.read_text().partition("<!-- mlpnet_mnist -->")[0])
    assert "figures/frontier_mlpnet_mnist.svg" in first[0]
    assert not (figures / "frontier_resnet20_cifar10.svg").exists()
    assert frontier_page.main(command) == 0
    assert (page.read_text(), (figures / "frontier_mlpnet_mnist.svg").read_bytes()) == first


def test_a_new_ledger_adds_to_what_was_measured_before(tmp_path: Path) -> None:
    page, ledger = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(PAGE.read_text())
    command = ["--page", str(page), "--figures", str(tmp_path), "--ledger", str(ledger)]
    ledger_with(ledger, MEASURED)
    assert frontier_page.main(command) == 0
    whole = page.read_text()
    ledger.unlink()
    assert frontier_page.main(command) == 0
    assert page.read_text() == whole
    ledger_with(ledger, {("balanced", None): 96.0, ("best", None): 97.0})
    assert frontier_page.main(command) == 0
    found = page.read_text()
    assert f"{len(MEASURED) + 1} of " in found
    assert "| 96.00 | 50 000 | 50 | 90.00 | 90.00 | 120 000 |" in found
    assert "91.00 (30)" in found
