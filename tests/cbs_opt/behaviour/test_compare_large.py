"""On a large block `compare` leaves out what forms the whole Hessian, and says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import cbs_opt as cbs
from cbs_opt import solving
from cbs_opt.select.methods import find_method
from formulations.problem import PROGRAMS


@pytest.mark.parametrize("program", PROGRAMS)
def test_dense_methods_are_left_out_unless_named(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def attempt(problem: cbs.BlockProblem, name: str, *_: Any) -> dict[str, Any]:
        tried.append(name)
        return {"method": name, "status": "feasible", "objective": 1.0}

    monkeypatch.setattr(solving, "_attempt", attempt)
    n = solving.LARGEST_DENSE + 1
    large = cbs.BlockProblem(weights=np.ones(n), rows=np.ones((1, n)), damping=1.0, n_prune=n // 2)
    table = cbs.compare(large, program=program).set_index("method")
    assert list(table.index) == solving.default_methods(program)
    left_out = [name for name in table.index if name not in tried]
    assert {"branch_and_bound", "enumeration"} <= set(left_out)
    assert not any(find_method(name, program).kind in ("exact", "solver") for name in tried)
    assert {"magnitude", "swap_search"} <= set(tried)
    assert table.loc[left_out, "note"].str.contains("Hessian").all()
    assert table.loc[left_out, "status"].eq("unavailable").all()
    tried.clear()
    cbs.compare(large, program=program, methods=["branch_and_bound"])
    assert tried == ["branch_and_bound"]
