"""What is written is read again; what is damaged is left out; what has no checksum yet is read."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from experiments.ledger import Ledger


def test_results_come_back_and_a_changed_digit_is_noticed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    ledger = Ledger(path)
    ledger.add("a", {"accuracy": 93.97})
    ledger.add("b", {"accuracy": 90.28})
    assert Ledger(path)["a"]["accuracy"] == 93.97
    path.write_bytes(path.read_bytes().replace(b"93.97", b"95.97"))
    with caplog.at_level(logging.WARNING):
        damaged = Ledger(path)
    assert "a" not in damaged
    assert damaged["b"]["accuracy"] == 90.28
    assert "line 1" in caplog.text


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    Ledger(path).add("a", {"x": 1})
    path.write_bytes(path.read_bytes()[:-5])
    torn = Ledger(path)
    assert "a" not in torn
    torn.add("b", {"x": 2})
    again = Ledger(path)
    assert "a" not in again
    assert again["b"]["x"] == 2


def test_a_ledger_from_before_checksums_is_read_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "old", "x": 1}\n{"key": "torn", "x"\n')
    ledger = Ledger(path)
    assert ledger["old"]["x"] == 1
    assert "torn" not in ledger
    ledger.add("new", {"x": 2})
    assert {key: Ledger(path)[key]["x"] for key in ("old", "new")} == {"old": 1, "new": 2}
