"""Pages are made of the committed results beside them, which new cells join."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import language_structure, structure_figure, structured
from experiments.comparators import page as comparators
from experiments.known import BESIDE, commits, keep_known, seeds, with_known
from experiments.ledger import Ledger, settings_key

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the pages with the results behind them."""
    for file in (*(ROOT / BESIDE).glob("*.jsonl"), *(ROOT / BESIDE).glob("*.md")):
        shutil.copy(file, tmp_path)
    for module in (structured, language_structure):
        monkeypatch.setattr(module, "PAGE", tmp_path / "structure.md")
    return tmp_path


def of_comparator(folder: Path, ledgers: Path, name: str) -> int:
    options = ["--ledgers", str(ledgers), "--pages", str(folder), "--figures", str(folder)]
    return comparators.main([name, *options])


def of_structured(_: Path, ledgers: Path) -> int:
    return structured.main(["--page", "--out", str(ledgers)])


def of_language_model(_: Path, ledgers: Path) -> int:
    return language_structure.main(["--page", "--out", str(ledgers)])


def of_figure(folder: Path, ledgers: Path) -> int:
    options = ["--structured", str(ledgers), "--ledgers", str(ledgers), "--figures", str(folder)]
    return structure_figure.main([*options, "--page", str(folder / "structure.md")])


@pytest.mark.parametrize("write", [of_structured, of_language_model, of_figure])
def test_without_the_ledger_of_a_run_the_page_of_structure_comes_out_as_it_is(
    folder: Path, tmp_path: Path, write: Callable[[Path, Path], int]
) -> None:
    assert write(folder, tmp_path / "no") == 0
    for name in ("structure.md", "structured.jsonl", "language_structure.jsonl", "widths.jsonl"):
        assert (folder / name).read_text() == (ROOT / BESIDE / name).read_text()


@pytest.mark.parametrize("name", comparators.PAGE)
def test_without_the_ledger_of_a_run_the_page_of_a_comparator_comes_out_as_it_is(
    folder: Path, tmp_path: Path, name: str
) -> None:
    assert of_comparator(folder, tmp_path / "no", name) == 0
    for file in (f"{name}.md", f"{name}.jsonl"):
        assert (folder / file).read_text() == (ROOT / BESIDE / file).read_text()


def test_a_new_cell_joins_a_page_and_takes_the_place_of_one_of_the_same_settings(
    folder: Path, tmp_path: Path
) -> None:
    known = folder / structured.KNOWN
    before = with_known(known)
    old = next(entry for entry in before if (entry["contender"], entry["budget"]) == ("ours", "flops"))
    ledger = Ledger(tmp_path / "run" / "structured.jsonl")
    fresh = {**old, "budget": "keep", "share": 0.125, "accuracy": 12.5, "commit": "newest"}
    ledger.add(settings_key(fresh), fresh)
    ledger.add(old["key"], {**old, "accuracy": 11.5})
    assert of_structured(folder, tmp_path / "run") == 0
    text = (folder / "structure.md").read_text()
    assert "0.125 of every set of groups" in text
    assert "commit newest." in text
    assert "| ours | 12.50 |" in text
    assert "| ours | 11.50 |" in text
    after = with_known(known)
    assert [entry["key"] for entry in after[:-1]] == [entry["key"] for entry in before]
    assert [entry["accuracy"] for entry in after if entry["key"] == old["key"]] == [11.5]
    assert of_structured(folder, tmp_path / "no") == 0
    assert (folder / "structure.md").read_text() == text


def test_what_is_kept_is_read_by_a_ledger(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"key": "a", "seed": 0}, {"key": "b", "seed": 1}]
    keep_known(tmp_path / "known.jsonl", entries)
    assert Ledger(tmp_path / "known.jsonl").results() == entries == with_known(tmp_path / "known.jsonl")
    assert with_known(tmp_path / "none.jsonl") == []


def test_commits_and_seeds_of_means_count_once() -> None:
    results = [{"commit": "b, a", "seed": 0, "seeds": [0, 1, 2]}, {"commit": "a", "seed": 0}]
    assert commits(results) == "a, b"
    assert seeds(results) == 3
