"""The language model experiment on a network of two small blocks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from experiments import language_model
from experiments.data_files import DATA_FILES
from experiments.language_model import CALIBRATION_LENGTH, DENSE, Contest, main
from experiments.ledger import Ledger, settings_key
from tests.experiments.small_llama import WORDS, small_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `prepare` leaves it, with a small network."""
    folder = small_cache(tmp_path, heads=2, keys=1)
    monkeypatch.setattr(language_model, "data_file", lambda name, *_, **__: tmp_path / name)
    return folder


def test_cells_are_measured_once_and_the_page_shows_them(cache: Path, tmp_path: Path) -> None:
    options = ["--cache", str(cache), "--out", str(tmp_path / "out")]
    wanted = [
        "--methods",
        "wanda",
        "exchanges",
        "--sparsities",
        "0.5",
        "--sequences",
        "2",
        "--budgets",
        "rows",
    ]
    assert main([*options, *wanted]) == 0
    assert main([*options, *wanted, "--blocks", "1"]) == 0
    ledger = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert ledger.count(b"\n") == 5
    assert main([*options, *wanted]) == 0
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == ledger
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- language model -->\n<!-- end of language model -->\n\nafter\n")
    assert main([*options, "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    whole, block = "### The whole network, 0.5, 2 x 512 tokens", "### Block 1 alone, 0.5, 2 x 512 tokens"
    assert text.index(whole) < text.index(block)
    assert text.index("| wanda |") < text.index("| exchanges |")


def test_a_cell_has_perplexity_losses_and_costs(cache: Path) -> None:
    (dense,) = language_model.measure(cache, [{"method": DENSE}])
    assert dense["perplexity"] == pytest.approx(WORDS, rel=0.2)
    (found,) = language_model.measure(cache, [{"method": "sparsegpt", "sparsity": "2:4", "sequences": 1}])
    assert math.isfinite(found["perplexity"])
    assert found["perplexity"] != dense["perplexity"]
    assert len(found["loss"]) == 14
    assert found["zeros"] == 0.5
    assert 0.0 < found["program_seconds"] <= found["processor_seconds"]


def test_a_cell_with_passes_measures_the_one_without_on_its_way(cache: Path) -> None:
    cell = {"method": "wanda", "sparsity": "0.5", "sequences": 2, "budget": "network"}
    (alone,) = language_model.measure(cache, [cell])
    still, moved = language_model.measure(cache, [cell | {"passes": 1}])
    for same in ("perplexity", "loss", "zeros", "differentiated", "moved"):
        assert still[same] == alone[same]
    assert moved["passes"] == 1
    assert moved["differentiated"] > still["differentiated"] > 0
    assert 0.0 < still["processor_seconds"] < moved["processor_seconds"]


def test_cells_that_begin_alike_are_pruned_once_and_end_as_they_do_alone(cache: Path) -> None:
    cell = {"method": "wanda", "sparsity": "0.5", "sequences": 2}
    moves = [{"passes": 1}, {"passes": 2}, {"passes": 1, "rate": 1e-3}]
    together = list(language_model.measure(cache, [cell | move for move in moves]))
    assert [found.get("passes") for found in together] == [None, 1, 2, 1]
    for move, found in zip(moves, together[1:], strict=True):
        _, alone = language_model.measure(cache, [cell | move])
        for same in ("perplexity", "loss", "differentiated", "moved"):
            assert found[same] == alone[same]
    assert len({found["perplexity"] for found in together}) == 4


def test_more_sequences_than_there_are_is_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", str(cache), "--out", str(tmp_path / "out"), "--methods", "wanda"]
    assert main([*options, "--sequences", "9"]) == 1
    assert "ask for at most 2" in capsys.readouterr().err


def test_groups_hold_what_begins_alike_and_is_not_known(tmp_path: Path) -> None:
    contest = Contest(
        methods=["alps"], sparsities=["2:4"], budgets=["rows"], passes=(0, 1, 2), rates=(2e-4, 4e-4)
    )
    ledger = Ledger(tmp_path / "results.jsonl")
    assert [len(group) for group in contest.groups(ledger)] == [1, 1, 4]
    ledger.add(settings_key({"method": DENSE}), {})
    assert [len(group) for group in contest.groups(ledger)] == [1, 4]
    assert [cell.get("rate") for cell in contest.groups(ledger)[1]] == [None, 4e-4, None, 4e-4]


def test_cells_move_and_share_and_say_so(cache: Path, tmp_path: Path) -> None:
    options = [
        "--cache",
        str(cache),
        "--out",
        str(tmp_path / "out"),
        "--sequences",
        "2",
        "--sparsities",
        "0.5",
    ]
    wanted = ["--methods", "wanda", "--budgets", "network", "--passes", "0", "2", "--stages", "2"]
    assert main([*options, *wanted]) == 0
    page = tmp_path / "page.md"
    page.write_text("<!-- language model -->\n<!-- end of language model -->\n")
    assert main([*options[:4], "--page", str(page)]) == 0
    text = page.read_text()
    assert text.index("| wanda, network |") < text.index("| wanda, network, 2 passes in 2 stages |")
    assert f"| {2 * CALIBRATION_LENGTH} |" in text
    assert f"| {2 * CALIBRATION_LENGTH + 2 * CALIBRATION_LENGTH} |" in text


def test_patterns_and_single_blocks_have_no_budgets_to_share() -> None:
    some = Contest(methods=["wanda", "sparsegpt"], sparsities=["0.5", "2:4"], passes=(0, 1)).cells()
    assert [cell["sparsity"] for cell in some if cell.get("budget")] == ["0.5"] * 6
    blocks = Contest(methods=["wanda"], sparsities=["0.5"], blocks=(4,), passes=(0, 1)).cells()
    assert [cell.get("budget") for cell in blocks] == [None, "layer"]


def test_a_missing_package_and_a_page_without_marks_are_named(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_model, "PACKAGE", "no_such_package")
    assert main(["--cache", str(tmp_path / "empty")]) == 1
    assert "--gguf" in capsys.readouterr().err
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    assert main(["--cache", str(cache), "--page", str(page), "--out", str(tmp_path)]) == 1
    assert "no <!-- language model -->" in capsys.readouterr().err


def test_both_texts_are_known_by_their_checksums() -> None:
    assert all(len(DATA_FILES[name].sha256) == 64 for name in language_model.TEXTS.values())
