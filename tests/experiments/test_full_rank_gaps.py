"""The benchmark of gaps over Hessians of full rank, on rows made by hand."""

from __future__ import annotations

import numpy as np

from experiments.benchmarks.full_rank_gaps import bounded, bounds_table, draw, proved, proved_table


def test_cells_and_tables_say_what_was_found() -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(60, 12)) @ (np.eye(12) + 0.3)
    rows = inputs.T @ inputs / 60, rng.normal(size=(5, 12))
    found = bounded(rows, 0.5)
    assert found["verified"]
    assert found["rows"] == 5
    assert 0.0 <= found["gap_alone"] < found["gap_damping"]
    cell = proved(rows, 0.5, 8)
    assert cell["verified"]
    assert cell["proved"] == cell["rows"] == 4
    assert -1e-6 <= cell["excess"] <= cell["gap"]
    table = bounds_table([{"layer": "made", "share": 0.5, **found}])
    assert f"| made | 12 | 0.5 | {100 * found['gap_damping']:.1f} |" in table
    assert "| 8 | 0.5 | 4 of 4 |" in proved_table([{"share": 0.5, **cell}])
    assert len(draw([{"share": 0.5, **cell}]).axes[0].lines) == 2
