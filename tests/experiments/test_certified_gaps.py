"""Certified gaps as measured: cases that build what they say, results that verify, runs that resume."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from experiments.benchmarks import certified_gaps
from experiments.benchmarks.certified_cases import (
    CASES,
    Measurement,
    NetworkBlocks,
    Source,
    gaussian_block,
    grid,
    mlpnet,
    resnet20_layers,
    synthetic,
)
from experiments.benchmarks.certified_figures import FLOOR, cost_of_a_step, gap_over_grid
from experiments.benchmarks.certified_gaps import line, main, measure, met
from experiments.benchmarks.certified_page import gaps_page, machine_facts
from experiments.networks import NETWORKS, MLPNet
from formulations import BlockProblem, Limits
from formulations.enumeration import enumerate_optimum
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.solution import SolveStats
from tests.experiments.tiny_data import write_mnist, write_network


def measurement(n: int, m: int, rho: float = 0.5, **more: float) -> Measurement:
    return Measurement(
        block=f"synthetic rank {m}",
        sparsity=0.5,
        damping=rho,
        build=lambda: gaussian_block(n, m, rho, 0.5, seed=1),
        settings={"n": n, "rows": m},
        **more,
    )


@pytest.fixture
def tiny_case(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A case "grid" of three small blocks; the list counts how often one is built."""
    built: list[int] = []

    def counted(entry: Measurement) -> Measurement:
        def build():
            built.append(1)
            return entry.build()

        return replace(entry, build=build)

    def case(source: Source):
        yield counted(measurement(20, 4, mark_gap=1.0, mark_seconds=600.0))
        yield counted(measurement(20, 4, rho=5.0))
        yield counted(replace(measurement(20, 30), step_cost=True))

    monkeypatch.setitem(CASES, "grid", case)
    return built


@pytest.mark.parametrize("m", [5, 60])
def test_gaussian_blocks_have_the_damping_and_rank_they_say(m: int) -> None:
    problem = gaussian_block(40, m, 0.3, 0.5, seed=2)
    shape = fisher_shape(problem)
    assert shape.rho == pytest.approx(0.3)
    assert np.linalg.matrix_rank(problem.rows) == min(m, 40)
    assert shape.effective_rank == pytest.approx(m * 40 / (m + 40), rel=0.2)
    assert problem.fingerprint() == gaussian_block(40, m, 0.3, 0.5, seed=2).fingerprint()
    assert problem.fingerprint() != gaussian_block(40, m, 0.3, 0.5, seed=3).fingerprint()


def test_cases_cover_the_marks() -> None:
    source = Source()
    whole = list(mlpnet(source))
    assert {(entry.damping, entry.sparsity) for entry in whole} == {
        (damping, sparsity) for damping in (1e-3, 1e-2) for sparsity in (0.5, 0.9, 0.98)
    }
    assert all(entry.mark_gap and entry.mark_seconds == 120.0 for entry in whole)
    layers = list(resnet20_layers(source))
    assert len({entry.block for entry in layers}) == 18
    assert len(layers) == 36
    assert [entry.settings["n"] for entry in synthetic(source)][-1] == 1_000_000
    assert len({(entry.block, entry.damping) for entry in grid(source)}) == len(list(grid(source)))


def test_blocks_of_a_network_share_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, train=40)
    write_network(tmp_path, "mlpnet_mnist", MLPNet())
    monkeypatch.setattr("experiments.data_files._sha256", lambda path, size, modified: _digest_of(path.name))
    blocks = NetworkBlocks(
        "mlpnet_mnist", "layer", Source(rows=6, samples_per_row=3, data=tmp_path), default_samples_per_row=16
    )
    entries = list(blocks.measurements(1e-3, 0.5))
    assert [entry.block for entry in entries] == ["fc1.weight", "fc2.weight", "fc3.weight"]
    problems = [entry.build() for entry in entries]
    assert [problem.n for problem in problems] == [784 * 40, 40 * 20, 20 * 10]
    assert all(problem.rows.shape[0] == 6 for problem in problems)
    assert all(problem.gradient is None and problem.damping == 1e-3 for problem in problems)
    assert problems[1].n_prune == 400
    assert entries[0].settings["samples_per_row"] == 3
    assert NETWORKS["mlpnet_mnist"].target == blocks.target


def _digest_of(name: str) -> str:
    from experiments.data_files import DATA_FILES

    return DATA_FILES[name].sha256


@pytest.mark.parametrize("incumbent", certified_gaps.INCUMBENTS)
@pytest.mark.parametrize("fix", [True, False])
def test_a_measurement_brackets_the_optimum(incumbent: str, fix: bool) -> None:
    problem = gaussian_block(14, 10, 0.2, 0.5, seed=4)
    best = enumerate_optimum(problem, "joint").objective
    found = measure(problem, incumbent=incumbent, fix=fix)
    assert found["bound"] <= best <= found["objective"] * (1.0 + 1e-12)
    assert found["gap"] == pytest.approx((found["objective"] - found["bound"]) / found["objective"])
    assert found["first_bound"] <= found["bound"]
    assert found["objective"] <= found["rounded_objective"]
    assert found["verified"]
    assert found["rho"] == pytest.approx(0.2)
    assert found["seconds"] >= found["bound_seconds"] > 0.0


@pytest.mark.parametrize(("converged", "cost"), [(1000, 2.0), (12, 2.0), (5, None), (3, None)])
def test_a_step_costs_what_more_steps_take_longer(
    monkeypatch: pytest.MonkeyPatch, converged: int, cost: float | None
) -> None:
    clock = 100.0

    def relax(problem: BlockProblem, program: str, *, limits: Limits) -> SimpleNamespace:
        nonlocal clock
        assert limits.iteration_limit is not None
        taken = min(limits.iteration_limit, converged)
        clock += 50.0 + 2.0 * taken
        return SimpleNamespace(stats=SolveStats(seconds=0.0, iterations=taken))

    monkeypatch.setattr(certified_gaps.cbs_opt, "lower_bound", relax)
    monkeypatch.setattr(certified_gaps.time, "process_time", lambda: clock)
    assert certified_gaps.seconds_per_step(gaussian_block(4, 2, 0.1, 0.5, seed=0)) == cost


def test_runs_resume_and_write_every_file(
    tmp_path: Path, tiny_case: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--case", "grid", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main(arguments) == 0
    assert len(tiny_case) == 3
    first = capsys.readouterr().out
    assert first.count("verified") == 3
    assert main(arguments) == 0
    assert len(tiny_case) == 3
    assert capsys.readouterr().out == first
    table = pd.read_csv(tmp_path / "out" / "grid.csv")
    assert list(table.m) == [4, 4, 30]
    assert table.seconds_per_step.isna().all()  # the dense path of small blocks takes no such steps
    page = (tmp_path / "out" / "results" / "certified_gaps.md").read_text()
    assert page.count("| synthetic rank") == 3
    assert str(tmp_path) not in page
    assert (tmp_path / "out" / "figures" / "certified_grid.svg").read_text().startswith("<?xml")
    assert main([*arguments, "--damping", "5", "--no-fix"]) == 0
    assert len(tiny_case) == 4


def test_missed_marks_and_lost_checks_are_said(tmp_path: Path, tiny_case: list[int]) -> None:
    row = {"mark_gap": 1e-3, "mark_seconds": 5.0, "gap": 1e-3, "seconds": 5.0}
    assert met(row)
    assert not met(row | {"gap": 1.1e-3})
    assert not met(row | {"gap": None})
    assert not met(row | {"seconds": 5.1})
    whole = row | {"block": "b", "damping": 1.0, "sparsity": 0.5, "peak_bytes": 2**30, "verified": False}
    assert "NOT VERIFIED" in line(whole)
    assert line(whole | {"gap": 1.0}).endswith("MISSED")


def test_a_missing_data_directory_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CBS_OPT_DATA", raising=False)
    with pytest.raises(SystemExit, match="data_dir"):
        main(["--case", "resnet20_global", "--out", str(tmp_path), "--incumbent", "rounding", "--no-fix"])


def row_of(block: str, n: int, rho: float, gap: float, **more: object) -> dict[str, object]:
    plain = {"effective_rank": 8.0, "m": 500, "damping": rho, "sparsity": 0.9, "objective": 1.0}
    plain |= {"bound": 1.0 - gap, "verified": True, "n_fixed": 3, "bound_seconds": 1.0, "seconds": 2.0}
    plain |= {"mark_gap": None, "mark_seconds": None, "peak_bytes": 2**30, "machine": machine_facts()}
    return plain | {"block": block, "n": n, "rho": rho, "gap": gap} | more


def test_the_grid_picture_has_a_line_for_each_block_and_a_floor() -> None:
    rows = [row_of(f"synthetic rank {r}", 64, rho, 1e-3 * r * rho) for r in (8, 32) for rho in (0.1, 1.0)]
    rows += [row_of("digits 512", 512, rho, 0.0) for rho in (0.1, 1.0)]
    figure = gap_over_grid(rows)
    assert figure is not None
    left, right = figure.axes
    assert [list(axes.get_lines()[0].get_xdata()) for axes in (left, right)] == [[0.1, 1.0]] * 2
    assert len(left.get_lines()) == 2
    assert list(right.get_lines()[0].get_ydata()) == [FLOOR, FLOOR]
    assert len({artist.get_marker() for artist in left.get_lines()}) == 2
    assert left.get_yscale() == "log"
    assert gap_over_grid([]) is None


def test_the_step_picture_compares_with_proportionality() -> None:
    rows = [
        row_of(f"synthetic {n}", n, 0.1, 1e-3, seconds_per_step=2e-8 * n) for n in (1_000, 10_000, 100_000)
    ]
    figure = cost_of_a_step(rows)
    assert figure is not None
    reference, measured = figure.axes[0].get_lines()
    assert reference.get_ydata() == pytest.approx(measured.get_ydata())
    assert cost_of_a_step(rows[:1]) is None


def test_the_page_adds_layers_up_and_rounds_bounds_down() -> None:
    rows = [row_of(f"layer{i}", 100, 0.1, 1e-3 / 3.0) for i in range(3)]
    page = gaps_page({"resnet20_layers": (["--case", "resnet20_layers", "--data", "x", "--out", "y"], rows)})
    assert "--case resnet20_layers --out runs/gaps" in page
    assert "--data" not in page
    total = next(entry for entry in page.splitlines() if entry.startswith("| 0.1 | 0.9 | 3 |"))
    objective, bound = (float(cell) for cell in total.split("|")[4:6])
    assert objective == 3.0
    assert bound <= math.fsum(row["bound"] for row in rows)
    assert bound == pytest.approx(3.0 - 1e-3, rel=1e-5)
