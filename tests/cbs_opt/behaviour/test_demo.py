"""The embedded example: deterministic, well trained, and honest about what it prunes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cbs_opt.cli import app
from cbs_opt.demo import CURVATURE, Contender, compare_on_digits, digits_data, digits_network
from cbs_opt.network.evaluation import evaluate
from cbs_opt.recipe.records import Recipe
from cbs_opt.recipe.select import select_by_name


def contender(method: str, program: str = "selection", **others: Any) -> Contender:
    certify = others.pop("certify", False)
    select = select_by_name(method, program=program)
    recipe = Recipe(curvature=CURVATURE, layer_inputs=0.0, select=select, **others)
    return Contender(recipe=recipe, certify=certify)


FAST = (contender("magnitude", update=None), contender("obd", update=None))
CONTENDERS = (contender("magnitude", update=None), contender("obs"))


@pytest.fixture(scope="module")
def trained() -> Any:
    return digits_network(seed=0)


@pytest.fixture
def trained_once(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every comparison from a copy of one training."""
    monkeypatch.setattr("cbs_opt.demo.digits_network", lambda seed: copy.deepcopy({0: trained}[seed]))


def test_training_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (digits_network(seed=seed, epochs=2)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.float32
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_the_network_is_trained_well(trained: Any) -> None:
    model, train, test = trained
    accuracy = evaluate(model, test, torch.nn.functional.cross_entropy).accuracy
    assert accuracy is not None
    assert accuracy > 0.9
    assert not model.training
    assert len(train[1]) + len(test[1]) == 1797


def test_training_and_test_images_do_not_overlap() -> None:
    (x, _), (held_out, _) = digits_data(seed=0)
    assert 0.0 <= float(x.min()) <= float(x.max()) <= 1.0
    seen = {tuple(row.tolist()) for row in x}
    assert not any(tuple(row.tolist()) in seen for row in held_out)


@pytest.mark.usefixtures("trained_once")
def test_every_run_starts_from_the_same_network_and_meets_its_count() -> None:
    made = []
    reports = compare_on_digits(sparsities=(0.3, 0.8), contenders=CONTENDERS, on_report=made.append)
    assert made == reports
    assert [r.label for r in reports] == ["magnitude"] * 2 + ["obs + update"] * 2
    assert len({r.before for r in reports}) == 1
    for report in reports:
        assert report.n_prune == round(report.requested_sparsity * report.n)
    magnitude, obs = reports[1], reports[3]
    assert magnitude.after is not None
    assert obs.after is not None
    assert obs.after.loss < magnitude.after.loss


@pytest.mark.usefixtures("trained_once")
def test_the_command_prints_a_table_and_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbs_opt.demo.CONTENDERS", FAST)
    monkeypatch.setattr(
        "cbs_opt.demo.compare_on_digits",
        lambda **options: compare_on_digits(contenders=FAST, **options),
    )
    out = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--sparsity", "0.5", "--sparsity", "0.9"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("before pruning: accuracy 9")
    assert [line.split()[0] for line in lines[3:]] == ["magnitude", "magnitude", "obd", "obd"]
    assert "<html" in (out / "report.html").read_text()
    # What is printed does not depend on the pictures of the page.
    monkeypatch.setattr("cbs_opt.report.html._embedded", lambda *drawings: [])
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--sparsity", "0.5", "--json"])
    rows = json.loads(result.stdout)
    assert [row["method"] for row in rows] == ["magnitude", "obd"]
    assert CliRunner().invoke(app, ["demo", "--out", str(out), "--sparsity", "1"]).exit_code == 2


@pytest.mark.usefixtures("trained_once")
def test_a_certified_contender_says_how_far_from_optimal_it_can_be() -> None:
    certifying = contender("obs", "joint", certify=True)
    (report,) = compare_on_digits(sparsities=(0.5,), contenders=(certifying,))
    assert report.program == "joint"
    assert report.certified is not None
    assert report.certified.bound is not None
    assert 0.0 < report.certified.bound <= report.certified.objective
    assert report.certified.objective == pytest.approx(report.predicted_loss_increase, rel=1e-4)
