"""Bounds of a sample of rows: below the optimum of enumeration, checked from files, said as what they are."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cbs_opt as cbs
from cbs_opt.layers.certificates import DATA, LayerBounds, RowSample, bound_rows, check_layers
from cbs_opt.layers.sequential import prune_layers
from cbs_opt.select.layer_program.methods import layer_method
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, InstanceFormatError
from formulations.files import read_container, write_container
from formulations.problem import BlockProblem
from tests.cbs_opt.layers.networks import Network, tokens
from tests.cbs_opt.select.layer_program.layers import layer_program

FEW = RowSample(rows=2, seed=3)


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("method", ["wanda", "exchanges"])
def test_no_set_of_any_row_is_better_than_its_bound(sparsity: float | str, method: str) -> None:
    program = layer_program(6, 8, sparsity=sparsity)
    solution = layer_method(method)(program)
    bounds = bound_rows(program, solution.keep, solution.weights, RowSample(rows=6), (0, 0))
    assert bounds.rows == tuple(range(6))
    most = program.dense_losses() / program.hessian.unit
    for row in range(6):
        problem = BlockProblem(
            weights=program.weights[row].double().numpy(),
            hessian=program.hessian.values.numpy(),
            support=program.support.of_row(int(solution.keep[row].sum())),
        )
        best = enumerate_optimum(problem, "joint").objective
        assert best is not None
        assert bounds.bounds[row] <= best / float(most[row]) * (1 + 1e-9)
        assert best / float(most[row]) <= bounds.losses[row] * (1 + 1e-6)
    relative = solution.losses / program.dense_losses()
    assert np.allclose(bounds.losses, relative.numpy(), rtol=1e-4)
    assert bounds.interval == (bounds.mean, bounds.mean)


def test_the_sample_is_that_of_its_seed_and_the_interval_holds_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    gaps = draw.uniform(0.1, 0.3, 60)
    held = 0
    for _ in range(400):
        rows = draw.permutation(60)[:8]
        bounds = LayerBounds(
            rows=tuple(rows.tolist()), of=60, losses=(1.0,) * 8, bounds=tuple(1.0 - gaps[rows]), seed=0
        )
        low, high = bounds.interval
        assert low <= bounds.mean <= high
        assert bounds.largest == pytest.approx(gaps[rows].max())
        held += low <= gaps.mean() <= high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert LayerBounds(rows=(1,), of=9, losses=(1.0,), bounds=(0.9,), seed=0).interval == (0.0, 1.0)
    program = layer_program(30, 8, sparsity=0.5)
    solution = layer_method("wanda")(program)
    drawn = [
        bound_rows(program, solution.keep, solution.weights, replace(FEW, seed=seed), (0, place)).rows
        for seed, place in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_the_report_says_what_is_a_sample_and_evidence_can_be_checked(tmp_path: Path) -> None:
    network = Network(2)
    sample = replace(FEW, evidence_dir=tmp_path / "evidence")
    recipe = cbs.LayerRecipe(budget="network")
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe, certify=sample)
    assert "12 rows drawn at random from 6 layers" in str(report)
    assert set(report.table["bounded"]) == {2}
    assert bool((report.table["gap"] <= report.table["largest_gap"]).all())
    checked = list(check_layers(tmp_path / "evidence"))
    assert len(checked) == 12
    assert all(row.ok for row in checked)
    stated = {
        (one.name, row): bound
        for one in report.layers
        if one.bounds is not None
        for row, bound in zip(one.bounds.rows, one.bounds.bounds, strict=True)
    }
    assert {(row.layer, row.row): row.bound for row in checked} == pytest.approx(stated)
    assert "drawn by seed 3" in str(report.layers[0].bounds)
    report.save(tmp_path / "saved", network)
    assert '"bounds"' in (tmp_path / "saved" / "layers.json").read_text()
    weights = load_file(tmp_path / "saved" / "model.safetensors")["layers.0.left.weight"]
    _, arrays = read_container(
        tmp_path / "evidence" / f"block_0000_layer_00{DATA}", "cbs-opt bounded rows", 1, 10**9
    )
    bounds = report.layers[0].bounds
    assert bounds is not None
    assert np.array_equal(arrays["after"], weights[list(bounds.rows)].double().numpy())


@pytest.mark.parametrize(
    ("tampered", "said"),
    [("bounds", "the bound is"), ("losses", "the loss is"), ("after", "are not 0"), ("hessian", "block")],
)
def test_what_is_not_so_is_found(tampered: str, said: str, tmp_path: Path) -> None:
    prune_layers(Network(2), tokens(), sparsity=0.5, certify=replace(FEW, evidence_dir=tmp_path))
    path = tmp_path / f"block_0001_layer_01{DATA}"
    header, arrays = read_container(path, "cbs-opt bounded rows", 1, 10**9)
    header.pop("arrays")
    if tampered in header:
        header[tampered][0] *= 1.001
    else:
        arrays[tampered] = arrays[tampered] + 0.1 * np.eye(*arrays[tampered].shape)
        arrays[tampered] += 0.01 if tampered == "after" else 0.0
    write_container(path, header, arrays)
    if tampered == "hessian":
        with pytest.raises(InstanceFormatError, match=said):
            list(check_layers(tmp_path))
        return
    wrong = [row for row in check_layers(tmp_path) if not row.ok]
    assert {row.layer for row in wrong} == {"layers.1.right.weight"}
    assert said in " ".join(note for row in wrong for note in row.notes)


def test_a_killed_run_keeps_its_bounds(tmp_path: Path) -> None:
    one = prune_layers(Network(2), tokens(), sparsity=0.5, certify=FEW, run_dir=tmp_path)
    two = prune_layers(Network(2), tokens(), sparsity=0.5, certify=FEW, run_dir=tmp_path)
    assert [layer.bounds for layer in one.layers] == [layer.bounds for layer in two.layers]
    assert all(layer.bounds is not None for layer in two.layers)


def test_rows_that_lose_nothing_and_bad_input() -> None:
    program = layer_program(3, 8, sparsity=0.0)
    keep = torch.ones(3, 8, dtype=torch.bool)
    bounds = bound_rows(program, keep, program.weights, FEW, (0, 0))
    assert bounds.losses == (0.0, 0.0) == bounds.bounds
    assert bounds.mean == 0.0
    assert math.isfinite(bounds.interval[1])
    with pytest.raises(ArgumentError, match=r"certify\.rows"):
        RowSample(rows=0)
    with pytest.raises(ArgumentError, match="evidence_dir"):
        check_layers("no such folder")
