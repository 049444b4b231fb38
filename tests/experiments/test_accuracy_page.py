"""The table of accuracies: published figures as they are, ours with seeds, cost, command and commit."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments.accuracy_page import COLUMNS, frame, main, table
from experiments.first_picture import THEMES, draw
from experiments.ledger import Ledger, commit
from experiments.published import ACCURACY


def cell(
    accuracy: float,
    seed: int,
    recipe: str = "fast",
    recalibrate: bool = True,
    sparsity: float | str = 0.9,
) -> dict[str, object]:
    return {
        "network": "mlpnet_mnist",
        "recipe": recipe,
        "recalibrate": recalibrate,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": accuracy,
        "samples": 1_000 + seed,
        "processor_seconds": 2.0 + seed,
        "commit": "1234567",
    }


def test_figures_are_means_over_seeds_beside_the_published_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "results.jsonl")
    entries = [cell(92.0, 0), cell(94.0, 1), cell(91.0, 0, recalibrate=False)]
    for number, entry in enumerate(entries):
        ledger.add(str(number), entry)
    out = tmp_path / "accuracy.csv"
    assert main(["--ledger", str(ledger.path), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert '| `"fast"` |' in text
    assert '| `"fast"`, statistics kept |' in text
    assert "93.00 ± 1.41 (2)" in text
    assert "91.00 (1)" in text
    figures = pd.read_csv(out)
    assert tuple(figures.columns) == COLUMNS
    ours = figures[figures["seeds"] != "published"]
    assert list(ours["accuracy"]) == [91.0, 93.0]
    assert all(
        source.startswith("python -m experiments.recipes --network mlpnet_mnist") for source in ours["source"]
    )
    assert len(figures) - len(ours) == sum(
        len(row) for shares in ACCURACY.values() for row in shares.values()
    )


def test_cells_of_earlier_ledgers_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    out, found = tmp_path / "accuracy.csv", []
    for number, entries in enumerate([[cell(92.0, 0), cell(95.0, 0, "best")], [cell(91.0, 0)]]):
        ledger = Ledger(tmp_path / f"{number}.jsonl")
        for seed, entry in enumerate(entries):
            ledger.add(str(seed), entry)
        assert main(["--ledger", str(ledger.path), "--out", str(out)]) == 0
        figures = pd.read_csv(out)
        found.append(dict(figures[figures["seeds"] != "published"][["method", "accuracy"]].values))
    assert found == [{"best": 95.0, "fast": 92.0}, {"best": 95.0, "fast": 91.0}]
    published = figures[figures["seeds"] == "published"]
    assert published["accuracy"].equals(frame([])["accuracy"])


def test_a_run_that_two_ledgers_have_counts_once_as_the_last_one_has_it(tmp_path: Path) -> None:
    out, paths = tmp_path / "accuracy.csv", []
    for name, entries in (("old", [cell(90.0, 0), cell(93.0, 1)]), ("new", [cell(92.0, 0)])):
        ledger = Ledger(tmp_path / f"{name}.jsonl")
        for number, entry in enumerate(entries):
            ledger.add(str(number), entry)
        paths.append(str(ledger.path))
    assert main(["--ledger", *paths, "--out", str(out)]) == 0
    figures = pd.read_csv(out)
    ours = figures[figures["seeds"] != "published"]
    assert list(zip(ours["accuracy"], ours["seeds"].astype(int), strict=True)) == [(92.5, 2)]


def test_patterns_have_a_file_and_a_table_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger(tmp_path / "results.jsonl")
    entries = [cell(92.0, 0), cell(90.0, 0, sparsity="2:4"), cell(80.0, 0, "magnitude", sparsity="2:4")]
    for number, entry in enumerate(entries):
        ledger.add(str(number), entry)
    out = tmp_path / "accuracy.csv"
    assert main(["--ledger", str(ledger.path), "--out", str(out)]) == 0
    text = capsys.readouterr().out.split("mlpnet_mnist, patterns")[1]
    assert text.index("| magnitude | 80.00 (1) |") < text.index('| `"fast"` | 90.00 (1) |')
    patterns = pd.read_csv(tmp_path / "patterns.csv")
    assert list(patterns["sparsity"]) == ["2:4", "2:4"]
    assert pd.read_csv(out)["sparsity"].dtype == float
    assert main(["--ledger", str(ledger.path), "--out", str(out)]) == 0
    assert pd.read_csv(tmp_path / "patterns.csv").equals(patterns)


def test_published_figures_alone_make_a_table_and_a_picture() -> None:
    figures = frame([])
    assert "| cbs, published |" in table(figures, "resnet20_cifar10")
    draw(figures, THEMES["light"]).canvas.draw()


def test_no_ledger_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--ledger", str(tmp_path / "none.jsonl")])
    assert caught.value.code == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_the_commit_is_that_of_the_checkout() -> None:
    assert all(letter in "0123456789abcdef+" for letter in commit())
