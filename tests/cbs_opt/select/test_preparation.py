"""What is compiled ahead: the kernels of every method, on counts and in cells."""

from __future__ import annotations

import itertools

import pytest

from cbs_opt.select import preparation
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
