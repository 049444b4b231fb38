"""Pages of comparators: what was measured replaces what stands between the marks, and says what was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.comparators import autoprune, gradient_flow, incremental
from experiments.comparators import page as module
from experiments.comparators.admm import cells as admm_cells
from experiments.comparators.page import NOTHING, PAGE, written
from experiments.ledger import Ledger, settings_key

ROOT = Path(__file__).parents[3]


def outcome(**fields: Any) -> dict[str, Any]:
    common = {"accuracy": 98.25, "dense_accuracy": 99.0, "n": 1_000, "kept": 20, "commit": "abc"}
    return {**common, "samples": 12_345, "processor_seconds": 7.0, **fields}


def autoprune_results() -> list[dict[str, Any]]:
    every = autoprune.cells("lenet5", prices=(1e-3,), coarse=("softplus",), times=(50.0,), seeds=2)
    return [
        {**cell, **outcome(**({"recovered": 3} if cell["contender"] == "autoprune" else {}))}
        for cell in every
        if cell["contender"] in ("autoprune", "gradual_sgd")
    ]


def admm_results() -> list[dict[str, Any]]:
    stages = [
        {"name": name, "weights": weights, "bits": bits, "accuracy": accuracy}
        for name, weights, bits, accuracy in (
            ("dense", 1_000, 32, 99.0),
            ("rows removed", 125, 32, 40.0),
            ("on levels", 100, 8, 98.5),
        )
    ]
    says = {"stages": stages, "units": {"conv1.weight": 7}, "distances": [0.1, 0.001]}
    return [
        {**cell, **outcome(**says)} for cell in admm_cells("lenet5", shares=(0.35, 0.2), bits=(8,), seeds=1)
    ]


def flow_results() -> list[dict[str, Any]]:
    says = {
        "accuracy_soon": 90.0,
        "loss_before": 0.2,
        "loss_after": 0.5,
        "norm_before": 1.0,
        "norm_after": 3.0,
    }
    every = gradient_flow.cells("mlpnet_mnist", sparsities=(0.9,), moments=(0.0, 1.0), seeds=1)
    return [{**cell, **outcome(**says)} for cell in every][:-1]


def incremental_results() -> list[dict[str, Any]]:
    says = {"table": [[94.0], [94.0, 70.0]], "added": 5, "forgetting": 1.5}
    every = incremental.cells(
        "mlpnet_mnist", contenders=incremental.CONTENDERS, ranks=(1, 5), tasks=2, seeds=1
    )
    return [{**cell, **outcome(**says)} for cell in every]


RESULTS = {
    "autoprune": (
        autoprune_results,
        ["| AutoPrune, softplus | 0.001 | 20 | 50.0 | 98.25 ± 0.00 | 0.75 | 3 |"],
    ),
    "admm": (admm_results, ["| on levels | 100 | 10.0 | 8 | 98.50 | 0.50 |", "Units left: conv1 7."]),
    "gradient_flow": (flow_results, ["| magnitude | 98.25 (90.00) |", "| 0.30 (3.00) |", "not run"]),
    "incremental": (incremental_results, ["| factors, rank 5 | 98.25 | 94.00 | 70.00 | 1.50 | 5 | 0.25 |"]),
}


@pytest.mark.parametrize("name", PAGE)
def test_a_page_shows_its_ledger_and_the_same_rows_give_the_same_files(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [name, "--ledgers", str(tmp_path), "--pages", str(tmp_path), "--figures", str(tmp_path / "svg")]
    page = tmp_path / f"{name}.md"
    by_hand = (ROOT / module.BESIDE / f"{name}.md").read_text()
    page.write_text(by_hand)
    assert module.main(command) == 1
    assert f"experiments.comparators.{name}" in capsys.readouterr().err
    make, lines = RESULTS[name]
    ledger = Ledger(tmp_path / f"{name}.jsonl")
    for result in make():
        ledger.add(settings_key({"is": result}), result)
    assert module.main(command) == 0
    (picture,) = (tmp_path / "svg").glob("*.svg")
    first = page.read_text(), picture.read_bytes()
    assert first[0].partition(f"<!-- {name} -->")[0] == by_hand.partition(f"<!-- {name} -->")[0]
    assert all(line in first[0] for line in lines), first[0]
    assert f"../figures/{picture.name}" in first[0]
    assert module.main(command) == 0
    assert (page.read_text(), picture.read_bytes()) == first


@pytest.mark.parametrize("name", PAGE)
def test_without_results_a_page_says_so(name: str) -> None:
    text, pictures = written(name, [], f"before\n<!-- {name} -->\nold\n<!-- end of {name} -->\n")
    assert NOTHING in text
    assert "old" not in text
    assert pictures == {}


def test_prices_with_other_images_are_another_series() -> None:
    results = []
    for samples in (300, 600):
        (cell,) = autoprune.cells("lenet5", prices=(1e-3,), coarse=("softplus",), times=())
        method = {**cell["method"], "samples": samples}
        results.append({**cell, "method": method, **outcome(recovered=3)})
    text = written("autoprune", results, "<!-- autoprune -->\n<!-- end of autoprune -->\n")[0]
    assert "| AutoPrune, softplus, 3 x 300 | 0.001 |" in text
    assert "| AutoPrune, softplus, 3 x 600 | 0.001 |" in text


def test_the_price_is_chosen_by_the_images_held_out_and_not_by_the_test_set() -> None:
    """The cheapest price loses nothing on the test set, and too much where it counts."""
    results = []
    for price, kept, held_out, accuracy in (
        (1e-3, 20, 98.8, 98.25),
        (2e-3, 10, 98.75, 98.0),
        (3e-3, 5, 98.6, 99.0),
    ):
        (cell,) = autoprune.cells("lenet5", prices=(price,), coarse=("softplus",), times=())
        says = {"kept": kept, "accuracy": accuracy, "held_out": [99.0, held_out]}
        results.append({**cell, **outcome(recovered=3), **says})
    text = written("autoprune", results, "<!-- autoprune -->\n<!-- end of autoprune -->\n")[0]
    assert "a price of 0.002 (softplus)" in text
    assert "100.0 times fewer, 1.00 points below it on the test set." in text
    text = written("autoprune", results[2:], "<!-- autoprune -->\n<!-- end of autoprune -->\n")[0]
    assert "No price is within 0.3 points" in text


def test_networks_have_sections_and_pictures_of_their_own() -> None:
    results = admm_results()
    other = [{**result, "network": "mlpnet_mnist"} for result in results]
    text, pictures = written("admm", results + other, "<!-- admm -->\n<!-- end of admm -->\n")
    assert text.index("## lenet5") < text.index("admm_lenet5.svg") < text.index("## mlpnet_mnist")
    assert list(pictures) == ["admm_lenet5.svg", "admm_mlpnet_mnist.svg"]
