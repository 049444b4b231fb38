"""Neurons and heads of a small Llama are taken out by contenders, timed, and shown on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import language_model, language_structure
from experiments.language_structure import DENSE, LABELS, MARK, main
from experiments.ledger import Ledger
from tests.experiments.small_llama import WIDTH, small_cache

WITHIN = ("ours_fitted", "reconstruction", "magnitude_moved", "magnitude_fitted")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as `prepare` leaves it, with a small network."""
    folder = small_cache(tmp_path, heads=4, keys=2)
    monkeypatch.setattr(language_structure, "data_file", lambda name, *_, **__: tmp_path / name)
    monkeypatch.setattr(language_structure, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(language_model, "TEST_SEQUENCES", 1)
    for name, few in (("PASSES", 2), ("PROMPT", 16), ("BEHIND", 8), ("GENERATED", 3)):
        monkeypatch.setattr(language_structure, name, few)
    return folder


def test_contenders_have_our_widths_and_the_page_shows_them(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", str(cache), "--out", str(tmp_path / "out"), "--sequences", "2"]
    assert main([*options, "--contenders", "magnitude"]) == 1
    assert "measure ours" in capsys.readouterr().err
    assert main([*options, "--contenders", *WITHIN]) == 0
    dense, *results = Ledger(tmp_path / "out" / "results.jsonl").results()
    assert dense["contender"] == DENSE
    assert [entry["contender"] for entry in results] == [*WITHIN]
    weights = {entry["contender"]: entry["parameters"][1] for entry in results}
    # Layers that are fitted get a bias.
    assert weights["ours_fitted"] == weights["reconstruction"] == weights["magnitude_fitted"]
    assert weights["ours_fitted"] - weights["magnitude_moved"] == 2 * 2 * WIDTH
    for entry in results:
        assert entry["perplexity"] > 1.0
        assert entry["parameters"][1] < entry["parameters"][0]
        assert all(seconds > 0.0 for pair in entry["seconds_a_token"].values() for seconds in pair)
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n<!-- {MARK} -->\n<!-- end of {MARK} -->\n")
    assert main(["--page", "--out", str(tmp_path / "out")]) == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert all(f"| {label} |" in text for label in map(LABELS.__getitem__, WITHIN))


def test_the_folder_of_the_network_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "--cache: name the folder" in capsys.readouterr().err
