"""Tables: the same columns under the same headings everywhere, nothing lost, nothing that breaks out."""

from __future__ import annotations

from dataclasses import fields, replace

import pandas as pd
import pytest

from cbs_opt.cli.tables import comparison_lines
from cbs_opt.report import tables
from cbs_opt.report.numbers import MISSING
from cbs_opt.report.parts import BlockSummary
from cbs_opt.report.tables import COLUMNS, Column, Table
from tests.cbs_opt.reports import made_report


@pytest.mark.parametrize("value", [None, float("nan"), ""])
def test_what_is_missing_has_an_empty_cell(value: object) -> None:
    assert {column.cell(value) for column in COLUMNS.values()} == {MISSING}


def test_zero_and_false_are_not_missing() -> None:
    assert COLUMNS["seconds"].cell(0.0) == "0.00 s"
    assert COLUMNS["locally_optimal"].cell(False) == "no"
    assert COLUMNS["n_prune"].cell(0) == "0"


def test_markdown_keeps_cells_within_their_columns() -> None:
    frame = pd.DataFrame({"label": ["a|b", "c\nd"], "loss": [0.5, None]})
    text = replace(Table.of(frame, ("label", "loss")), best=frozenset({(0, 1)})).markdown()
    assert text.splitlines() == [
        "| Method | Loss |",
        "| --- | ---: |",
        "| a\\|b | **0.5** |",
        f"| c d | {MISSING} |",
    ]


def test_the_terminal_shows_columns_of_the_page() -> None:
    reports = [made_report(), made_report("obs", sparsity=0.5)]
    page = tables.results_table(reports)
    lines = comparison_lines(reports)
    assert "97.00 %" in lines[0]
    names = [column.name for column in page.columns]
    for row, line in zip(page.rows, lines[3:], strict=True):
        for name in ("Method", "Sparsity", "Accuracy", "Loss", "Measured loss increase", "Time"):
            assert row[names.index(name)] in line


def test_a_block_without_any_number_is_still_a_row() -> None:
    empty = {field.name: None for field in fields(BlockSummary)} | {"name": "b", "n": 3, "n_prune": 1}
    block = BlockSummary(**{**empty, "iterations": 0, "seconds": 0.0, "status": "", "fingerprint": ""})
    report = replace(made_report(), blocks=(block,))
    (row,) = tables.blocks_table(report).rows
    assert row[:3] == ("b", "3", "1")
    assert row.count(MISSING) == 7


def test_a_column_shows_text_as_it_is_by_default() -> None:
    assert Column(name="Value").cell({"a": 1}) == "{'a': 1}"
