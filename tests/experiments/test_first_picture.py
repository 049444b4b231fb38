"""The picture of the README is made of the figures that its table states."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.first_picture import FIGURES, LINES, PANELS, RESULTS, THEMES, draw, drawn, main, spread
from experiments.published import published_accuracy

ROOT = Path(__file__).parents[2]
TABLE = pd.read_csv(ROOT / RESULTS)


def test_every_row_says_where_it_comes_from() -> None:
    assert set(TABLE["method"]) == set(LINES)
    assert set(TABLE["network"]) >= set(PANELS)
    for row in TABLE.itertuples():
        quoted = published_accuracy(row.network, row.method, row.sparsity)
        if row.seeds == "published":
            assert row.accuracy == quoted
            assert "ICML" in row.source
        else:
            assert row.source.startswith("python -m experiments.")
            assert f"--network {row.network} --recipes {row.method} " in row.source
            assert re.fullmatch("[0-9a-f]{7}( [0-9a-f]{7})*", row.commit)


@pytest.mark.parametrize("theme", THEMES)
def test_lines_have_the_points_of_the_table_and_names_do_not_overlap(theme: str) -> None:
    figure = draw(TABLE, THEMES[theme])
    figure.canvas.draw()
    for axes, network in zip(figure.axes, PANELS, strict=True):
        rows = drawn(TABLE)
        heights = [float(value) for line in axes.lines for value in line.get_ydata()]
        assert sorted(heights) == sorted(rows["accuracy"][rows["network"] == network])
        boxes = [text.get_window_extent() for text in axes.texts]
        boxes += [label.get_window_extent() for label in axes.get_xticklabels()]
        for number, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:number])


@pytest.mark.parametrize("theme", THEMES)
def test_the_picture_that_is_kept_states_the_figures_of_the_table(theme: str) -> None:
    kept = (ROOT / FIGURES / f"accuracy_{theme}.svg").read_text()
    names = [text.get_text() for axes in draw(TABLE, THEMES[theme]).axes for text in axes.texts]
    assert len(names) >= len(PANELS)
    assert [name for name in names if f"<!-- {name} -->" not in kept] == []


def test_the_picture_shows_what_there_is_a_published_figure_beside() -> None:
    shown = drawn(TABLE)
    beyond = TABLE[(TABLE["network"] == "resnet20_cifar10") & (TABLE["sparsity"] > 0.9)]
    assert set(shown["method"]) == set(LINES)
    assert not beyond.empty
    assert float(shown.loc[shown["network"] == "resnet20_cifar10", "sparsity"].max()) == 0.9
    assert "kept" not in set(shown["statistics"])


@settings(deadline=None)
@given(st.lists(st.floats(10, 100), min_size=1, max_size=8))
def test_spread_names_keep_their_order_and_their_distance(heights: list[float]) -> None:
    placed = spread(heights, 5.0)
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    for low, high in pairwise(order):
        assert placed[high] - placed[low] >= 5.0 - 1e-9


def test_the_same_table_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert main(["--results", str(ROOT / RESULTS), "--out", str(tmp_path / name)]) == 0
    for theme in THEMES:
        name = f"accuracy_{theme}.svg"
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
