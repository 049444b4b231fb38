"""Structure side by side: points are means of what ledgers hold, and times are those of smaller networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.ledger import Ledger, settings_key
from experiments.structure_figure import FIGURE, main, measured_widths, points, width_cells

UNITS = {"fc1.weight": 4, "fc2.weight": 2}
FACTS = {"network": "mlpnet_mnist", "dense_accuracy": 94.0, "commit": "abc"}


def structured(accuracy: float, seed: int) -> dict[str, Any]:
    says = {"contender": "ours", "budget": "keep", "share": 0.5, "seed": seed, "accuracy": accuracy}
    return {**FACTS, **says, "parameters": [100, 50], "milliseconds": [9.0, 6.0]}


ADMM = {
    **FACTS,
    "contender": "admm",
    "method": {"seed": 0},
    "units": UNITS,
    "n": 90,
    "kept": 30,
    "accuracy": 93.0,
}
AUTOPRUNE = {**FACTS, "contender": "autoprune", "method": {"seed": 0}, "n": 90, "kept": 9, "accuracy": 95.0}


def test_points_are_means_over_seeds_with_shares_of_what_there_was() -> None:
    times = [{**cell, "milliseconds": [8.0, 2.0]} for cell in width_cells([ADMM])]
    rows = points([structured(91.0, 0), structured(93.0, 1)], [ADMM], times, [AUTOPRUNE])
    shown = {row.label: (row.accuracy, row.parameters, row.milliseconds) for row in rows.itertuples()}
    assert shown == {
        "ours": (92.0, 0.5, pytest.approx(2 / 3)),
        "ADMM, trained": (93.0, pytest.approx(1 / 3), 0.25),
        "AutoPrune, trained": (95.0, pytest.approx(0.1), 1.0),
    }


def test_a_network_of_fewer_units_is_timed_beside_the_dense_one() -> None:
    units = {"conv1.weight": 2, "conv2.weight": 3, "fc1.weight": 10}
    dense, small = measured_widths({"network": "lenet5", "units": units, "images": 20})["milliseconds"]
    assert 0.0 < small < dense


def test_the_command_writes_page_and_picture_and_names_a_ledger_that_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "structure.md"
    page.write_text("Kept.\n\n<!-- side by side -->\n\n<!-- end of side by side -->\n", encoding="utf-8")
    folders = ["--structured", str(tmp_path), "--ledgers", str(tmp_path), "--figures", str(tmp_path)]
    command = [*folders, "--page", str(page)]
    assert main(command) == 1
    assert "python -m experiments.structured makes it" in capsys.readouterr().err
    for name, entry in (("structured", structured(92.0, 0)), ("admm", ADMM), ("autoprune", AUTOPRUNE)):
        Ledger(tmp_path / f"{name}.jsonl").add(settings_key(entry), entry)
    assert main(command) == 0
    text = page.read_text(encoding="utf-8")
    assert "Kept." in text
    assert "| ours | 92.00 | 2.00 | 0.500 | 0.67 |" in text
    assert "<svg" in (tmp_path / FIGURE).read_text(encoding="utf-8")
    before = (tmp_path / "widths.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "widths.jsonl").read_bytes() == before
