"""TOML files of people: what is wrong is named, with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cbs_opt.system.documents import known_names, line_of, read_document
from formulations.errors import ArgumentError

TEXT = """name = "a"  # limits = 1
limits = { "time" = 1, rel_gap = 2 }
[[methods]]
program = "joint"
[[methods]]
options.depth = 3
limits.time = 4
"""


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        ("name", 1),
        ("limits", 2),
        ("limits.time", 2),
        ("limits.absent", 2),
        ("methods", 3),
        ("methods[0].program", 4),
        ("methods[1]", 5),
        ("methods[1].options.depth", 6),
        ("methods[1].limits.time", 7),
        ("methods[2].program", None),
        ("nothing", None),
    ],
)
def test_the_line_of_an_entry_is_that_of_its_last_part_that_is_there(entry: str, line: int | None) -> None:
    assert line_of(TEXT, entry) == line


def test_unknown_names_are_refused_with_a_hint_and_tables_are_tables() -> None:
    assert known_names("limits", {"time": 1}, ["time"]) == {"time": 1}
    with pytest.raises(ArgumentError, match=r"limits.tme: unknown; did you mean time\? known: time, gap"):
        known_names("limits", {"tme": 1}, ["time", "gap"])
    with pytest.raises(ArgumentError, match="write a table"):
        known_names("limits", 3, ["time"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"a = 1\nb = ]", "not TOML.*line 2"),
        (b"\xff", "cannot be read"),
        (b"b = 1", r"no \(line 1"),
    ],
)
def test_a_file_that_cannot_be_read_or_is_refused_is_named(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    def refuse(document: dict[str, object]) -> None:
        raise ArgumentError(next(iter(document)), "no", "write another")

    if content is not None:
        (tmp_path / "x.toml").write_bytes(content)
    with pytest.raises(ArgumentError, match=message) as caught:
        read_document(tmp_path / "x.toml", "recipe", refuse)
    assert "x.toml" in str(caught.value)
