"""What is compiled ahead: the kernels of every method, on counts and in cells."""

from __future__ import annotations

import itertools

import pytest
from typer.testing import CliRunner

from cbs_opt.cli import app
from cbs_opt.select import preparation
from cbs_opt.structure import leaps
from formulations.problem import PROGRAMS


def test_every_method_is_prepared_on_counts_and_in_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(
        "formulations.preparation.prepare",
        lambda method, program, cells=False: ready.append((method, program, cells)),
    )
    monkeypatch.setattr(
        preparation, "prepare", lambda method, program: ready.append((method, program, False))
    )
    preparation.prepare_all()
    searches = {(method, program, False) for method, program in preparation.KERNELS}
    wanted = set(itertools.product(preparation.preparation.KERNELS, PROGRAMS, (False, True)))
    assert set(ready) >= wanted | searches


def test_the_command_prepares_methods_and_the_search_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[str] = []
    monkeypatch.setattr(preparation, "prepare_all", lambda: ready.append("methods"))
    monkeypatch.setattr(leaps, "prepare", lambda: ready.append("groups"))
    result = CliRunner().invoke(app, ["prepare"])
    assert result.exit_code == 0, result.output
    assert ready == ["methods", "groups"]
