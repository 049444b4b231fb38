"""Exact against heuristic on a tiny network: the optimum is below everything, counts are equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from experiments import exact_vs_heuristic
from experiments.exact_vs_heuristic import (
    EXACT,
    METHODS,
    RANDOM,
    Subject,
    choose,
    compare_on,
    random_near,
    row_problems,
)
from experiments.exact_vs_heuristic_page import page, worth_of_a_per_cent, write_page
from formulations.enumeration import enumerate_optimum
from formulations.loss import objective
from formulations.problem import BlockProblem


@pytest.fixture(scope="module")
def tiny() -> Subject:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 9, generator=generator)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 1).long()
    model = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator)
    return Subject(model=model, train=(x[:80], y[:80]), test=(x[80:], y[80:]))


@pytest.fixture(scope="module")
def rows(tiny: Subject) -> pd.DataFrame:
    made = compare_on(tiny, 0.5, samples=80, damping=1e-3, time_limit=20.0, draws=2, seed=0)
    return pd.DataFrame(made)


def test_the_exact_choice_is_the_optimum_of_every_row(tiny: Subject) -> None:
    partition, problems = row_problems(tiny, 0.5, samples=80, damping=1e-3, seed=0)
    assert sum(problem.n_prune for problem in problems) == round(0.5 * partition.n)
    for problem in problems:
        best = enumerate_optimum(problem, "joint").objective
        chosen = choose(problem, EXACT, time_limit=20.0, seed=0)
        assert best is not None
        assert chosen.objective == pytest.approx(best, rel=2e-4)
        assert chosen.bound is not None
        assert chosen.bound <= best * (1.0 + 1e-9)
        assert int(chosen.keep.sum()) == problem.n_keep


def test_no_method_is_better_than_the_optimum_or_the_bound(rows: pd.DataFrame) -> None:
    assert list(rows["method"][: len(METHODS)]) == list(METHODS)
    assert (rows["excess"] >= -1e-4).all()
    assert (rows["gap"] >= 0.0).all()
    assert rows["objective"].notna().all()
    assert rows["accuracy"].between(0.0, 100.0).all()


def test_random_sets_keep_their_distance(tiny: Subject, rows: pd.DataFrame) -> None:
    drawn = rows[rows["method"] == RANDOM]
    assert (drawn["excess"] <= drawn["level"] + 1e-9).all()
    _, problems = row_problems(tiny, 0.5, samples=80, damping=1e-3, seed=0)
    problem = next(p for p in problems if 0 < p.n_prune < p.n)
    best = choose(problem, EXACT, time_limit=20.0, seed=0)
    wide = random_near(problem, best, 1e9, np.random.default_rng(0))
    assert int(wide.keep.sum()) == problem.n_keep
    assert not np.array_equal(wide.keep, best.keep)
    assert wide.objective == pytest.approx(objective(problem, wide.keep, "joint"))


@pytest.mark.parametrize("count", [0, 4])
def test_a_row_without_a_choice_has_one_set(count: int) -> None:
    problem = BlockProblem(weights=np.ones(4), n_prune=count, hessian=np.eye(4), damping=0.1)
    chosen = choose(problem, "magnitude", time_limit=1.0, seed=0)
    assert int(chosen.keep.sum()) == 4 - count
    assert chosen.bound == chosen.objective
    assert random_near(problem, chosen, 1.0, np.random.default_rng(0)) is chosen


def test_the_worth_of_a_per_cent_is_the_slope() -> None:
    made = []
    for seed in range(4):
        made.append({"method": EXACT, "seed": seed, "excess": 0.0, "accuracy": 90.0 + seed})
        for excess in (0.01, 0.05, 0.5):
            accuracy = 90.0 + seed - 30.0 * excess
            made.append({"method": RANDOM, "seed": seed, "excess": excess, "accuracy": accuracy})
    worth = worth_of_a_per_cent(pd.DataFrame(made), "accuracy")
    assert worth is not None
    assert (worth.value, worth.low, worth.high) == pytest.approx((-0.3, -0.3, -0.3))
    assert worth_of_a_per_cent(pd.DataFrame(made[:1]), "accuracy") is None


def test_the_page_has_every_method_and_a_picture(rows: pd.DataFrame, tmp_path: Path) -> None:
    text = write_page(rows, {"network": "tiny"}, tmp_path)
    assert text == page(rows, {"network": "tiny"})
    assert all(f"| {name} |" in text for name in METHODS)
    assert f"| {RANDOM} |" not in text
    assert "proved" not in text.split("##")[1]
    exact = rows["method"] == EXACT
    assert (rows.loc[exact, "proved"] == 1.0).all()
    short = rows.assign(proved=rows["proved"].where(~exact, 0.25))
    assert "proved 25.0% of the blocks" in page(short, {"network": "tiny", "sparsity": [0.5, 0.9]})
    assert "--sparsity 0.5 --sparsity 0.9" in page(short, {"network": "tiny", "sparsity": [0.5, 0.9]})
    assert (tmp_path / "exact_vs_heuristic_tiny.svg").read_text().startswith("<?xml")
    assert len(pd.read_csv(tmp_path / "exact_vs_heuristic_tiny.csv")) == len(rows)


def test_what_was_measured_is_not_measured_again(
    tiny: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def once(given: Subject, share: float, **how: object) -> list[dict[str, object]]:
        asked.append(share)
        return list(compare_on(given, share, samples=40, damping=1e-3, time_limit=5.0, draws=0, seed=0))

    monkeypatch.setattr(exact_vs_heuristic, "subject", lambda *_: tiny)
    monkeypatch.setattr(exact_vs_heuristic, "compare_on", once)
    options = {"seeds": 1, "draws": 0, "out": tmp_path, "results": tmp_path / "results.jsonl"}
    exact_vs_heuristic.main(sparsity=[0.5], **options)
    first = (tmp_path / "exact_vs_heuristic.csv").read_text()
    exact_vs_heuristic.main(sparsity=[0.5], **options)
    assert asked == [0.5]
    assert (tmp_path / "exact_vs_heuristic.csv").read_text() == first
    exact_vs_heuristic.main(sparsity=[0.5, 0.7], **options)
    assert asked == [0.5, 0.7]
