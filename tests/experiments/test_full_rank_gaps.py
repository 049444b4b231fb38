"""The benchmark of gaps over Hessians of full rank, on rows made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.benchmarks import full_rank_gaps
from experiments.benchmarks.full_rank_gaps import (
    bounded,
    bounds_table,
    draw,
    main,
    model_rows,
    pattern_table,
    patterned,
    proved,
    proved_table,
    solved,
    solved_table,
)
from tests.experiments.small_llama import WIDTH, small_cache


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
    exact = solved(rows, 0.5, 8)
    assert exact["verified"]
    assert exact["proved"]
    assert f"| made | 8 | 0.5 | {exact['nodes']} |" in solved_table(
        [{"layer": "made", "share": 0.5, **exact}]
    )
    assert "| 12.5 |" in solved_table(
        [{"layer": "made", "share": 0.5, **exact, "proved": False, "gap": 0.125}]
    )


def test_patterns_are_bounded_by_blocks() -> None:
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(60, 12)) @ (np.eye(12) + 0.3)
    found = patterned((inputs.T @ inputs / 60, rng.normal(size=(2, 12))))
    assert found["verified"]
    assert -1e-6 <= found["gap_blocks"] <= found["gap_diagonal"]
    expected = f"| made | 12 | {100 * found['gap_diagonal']:.1f} | {100 * found['gap_blocks']:.1f} |"
    assert expected in pattern_table([{"layer": "made", **found}])


def test_rows_of_a_language_model_come_with_their_moments(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(full_rank_gaps, "MODULES", {"small": "model.layers.1.mlp.gate_proj"})
    hessian, weights = model_rows("small", small_cache(tmp_path, heads=2, keys=1))
    assert hessian.shape == (WIDTH, WIDTH)
    assert np.diagonal(hessian).mean() == pytest.approx(1.0)
    assert np.linalg.eigvalsh(hessian)[0] > 0.0
    norms = np.linalg.norm(weights, axis=1)
    assert norms[0] == np.sort(norms)[len(norms) // 2]


def test_layers_of_a_language_model_want_its_folder(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path), "--layers", "SmolLM2 layer 10 o_proj"])
    assert ended.value.code == 2
    assert "--cache" in capsys.readouterr().err
