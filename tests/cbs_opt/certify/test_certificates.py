"""Certified gaps of pruned networks: what is proved, what is added up, what is written, what is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cbs_opt.certify import certificates as certification
from cbs_opt.certify.certificates import MEANING, NOT_REACHED, certify_block
from cbs_opt.certify.files import CERTIFICATES, block_path, certificate_path, check_certificates
from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.pruning import prune
from cbs_opt.report.record import PruneReport
from cbs_opt.report.text import bound_text, gap_text
from formulations import BlockProblem, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, InstanceFormatError
from formulations.loss import objective
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

PROGRAMS = ("selection", "joint")
PARTITIONS = ("global", "layer", "row", 7)


def run(model: nn.Module, **options: Any) -> PruneReport:
    plain = {"program": "selection", "damping": 0.01, "layer_inputs": 0.0}
    options = {"sparsity": 0.5, "samples": 40, "progress": False} | plain | options
    return prune(model, options.pop("data", data()), **options)


def blocks_of(
    model: nn.Module,
    partition: str | int,
    dtype: torch.dtype = torch.float32,
    *,
    gradient: bool = False,
) -> list[Any]:
    blocks = fisher_blocks(
        model,
        data(dtype=dtype),
        loss_fn=nn.functional.cross_entropy,
        partition=partition,
        samples=40,
        damping=0.01,
        progress=False,
    )
    return blocks if gradient else [replace(block, gradient=None) for block in blocks]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_certifying_changes_no_weight_and_bounds_every_block(program: str, partition: str | int) -> None:
    plain, certified = network(), network()
    before = run(plain, program=program, partition=partition)
    report = run(certified, program=program, partition=partition, certify=True)
    weights = certified.state_dict()
    assert all(value.equal(weights[name]) for name, value in plain.state_dict().items())
    assert before.certified is None
    assert before.certificates == ()
    assert len(report.certificates) == len(report.blocks)
    for block, solution in zip(report.blocks, report.certificates, strict=True):
        assert block.bound is not None
        assert block.objective is not None
        assert block.bound <= block.objective
        assert block.gap == pytest.approx(solution.gap)
        assert solution.program == program
        assert solution.weights is not None
        assert solution.weights.dtype == np.float64
        wanted = block.updated_loss if program == "joint" else block.selection_loss
        assert block.objective == pytest.approx(wanted, rel=1e-4)


def test_the_sum_is_that_of_the_blocks_and_says_what_it_is() -> None:
    report = run(network(), partition="row", program="joint", certify=True)
    total = report.certified
    assert total is not None
    assert total.bound is not None
    exact = sum(Fraction(block.bound) for block in report.blocks if block.bound is not None)
    assert Fraction(total.bound) <= exact
    assert total.bound == pytest.approx(float(exact), rel=1e-15)
    assert total.objective == pytest.approx(sum(block.objective or 0.0 for block in report.blocks))
    assert total.gap == pytest.approx((total.objective - total.bound) / total.objective)
    assert (total.blocks, total.bounded) == (len(report.blocks), len(report.blocks))
    for text in (report.summary(), report.to_markdown()):
        assert MEANING in text
    layers = report.to_frame()
    assert layers["bound"].sum() == pytest.approx(total.bound)
    assert (layers["gap"] >= 0.0).all()


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_bound_exceeds_the_enumerated_optimum(program: str) -> None:
    model = network()
    trained = blocks_of(model, "row")
    report = run(model, partition="row", program=program, budget="uniform", certify=True)
    for block, summary in zip(trained, report.blocks, strict=True):
        best = enumerate_optimum(block.to_problem(summary.n_prune), program)
        assert best.objective is not None
        assert summary.bound is not None
        assert summary.objective is not None
        assert summary.bound <= best.objective <= summary.objective + 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certificates_are_in_float64_whatever_the_network(dtype: torch.dtype) -> None:
    model = network(dtype=dtype)
    trained = blocks_of(model, "layer", dtype)
    report = run(model, data=data(dtype=dtype), partition="layer", program="joint", certify=True)
    for block, solution, summary in zip(trained, report.certificates, report.blocks, strict=True):
        problem = block.to_problem(summary.n_prune)
        assert problem.fingerprint() == summary.fingerprint
        found = verify(problem, replace(solution))
        assert found.ok
        assert found.bound_checked


def test_the_gradient_is_in_the_bound_if_it_is_in_the_model() -> None:
    model = network()
    trained = blocks_of(model, "layer", gradient=True)
    report = run(model, partition="layer", program="joint", gradient_term=True, certify=True)
    for block, summary, solution in zip(trained, report.blocks, report.certificates, strict=True):
        problem = block.to_problem(summary.n_prune)
        assert problem.gradient is not None
        assert problem.fingerprint() == summary.fingerprint
        assert solution.keep is not None
        assert summary.objective == pytest.approx(objective(problem, solution.keep, "joint"))


def test_selection_is_certified_at_the_damping_of_the_selection() -> None:
    report = run(network(), selection_damping=0.05, damping=0.01, certify=True)
    own = replace(blocks_of(network(), "global")[0], damping=0.05)
    assert own.to_problem(report.blocks[0].n_prune).fingerprint() == report.blocks[0].fingerprint


def test_a_proof_of_the_method_is_not_lost() -> None:
    report = run(network(), partition=12, method="branch_and_bound", program="joint", certify=True)
    assert report.certified is not None
    assert report.certified.gap is not None
    assert report.certified.gap <= 2e-6
    assert all(block.gap is not None and block.gap <= 2e-6 for block in report.blocks)


def test_a_better_set_is_mentioned() -> None:
    rows = np.random.default_rng(0).normal(size=(30, 12))
    problem = BlockProblem(weights=np.linspace(0.1, 1.2, 12), n_prune=6, rows=rows, damping=1.0)
    keep = np.arange(12) < 6
    found = certify_block(problem, keep, "joint")
    assert "lower was found" in found.status
    assert found.solution.keep is not None
    assert np.array_equal(found.solution.keep, keep)
    assert found.solution.bound is not None
    assert found.solution.bound <= objective(problem, keep, "joint")


@pytest.mark.parametrize("sparsity", [0.0, 0.9999])
def test_blocks_without_a_choice_are_optimal(sparsity: float) -> None:
    report = run(network(), sparsity=sparsity, partition="row", certify=True)
    for block in report.blocks:
        if block.n_prune in (0, block.n):
            assert block.gap is not None
            assert block.gap < 1e-9
            assert block.bound is not None
            assert block.bound <= block.objective


def test_a_time_limit_leaves_blocks_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(network(), partition="row", certify=True, certify_time_limit=0.0)
    assert all(block.bound is None for block in report.blocks)
    assert {block.certificate_status for block in report.blocks} == {NOT_REACHED}
    assert report.certified is not None
    assert report.certified.bound is None
    assert "0 of 11 blocks have a bound" in report.summary()

    slow = certification.lower_bound

    def slowly(*args: Any, **options: Any) -> Any:
        time.sleep(0.2)
        return slow(*args, **options)

    monkeypatch.setattr(certification, "lower_bound", slowly)
    report = run(network(), partition="row", certify=True, certify_time_limit=0.5)
    known = [block for block in report.blocks if block.bound is not None]
    assert 0 < len(known) < len(report.blocks)
    assert report.certified is not None
    assert report.certified.bounded == len(known)
    assert report.certified.gap is None


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_certification_leaves_the_network_as_it_was(
    monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    calls: Iterator[int] = iter(range(100))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise stop
        return bound(*args, **options)

    bound = certification.lower_bound
    monkeypatch.setattr(certification, "lower_bound", interrupted)
    model = network()
    before = snapshot(model)
    with pytest.raises(stop):
        run(model, partition="row", certify=True)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"certify": "yes"}, "certify"),
        ({"certify": True, "certify_time_limit": -1.0}, "certify_time_limit"),
        ({"certify": True, "certify_time_limit": math.nan}, "certify_time_limit"),
        ({"certify": True, "certify_time_limit": "1"}, "certify_time_limit"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], argument: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(ArgumentError) as caught:
        run(model, **options)
    assert caught.value.argument == argument
    assert_untouched(model, before)


def test_certificates_need_data() -> None:
    with pytest.raises(ArgumentError, match="data"):
        run(network(), data=None, method="magnitude", update=False, certify=True)


def test_saved_certificates_are_checked_again(tmp_path: Path) -> None:
    model = network()
    report = run(model, partition="layer", program="joint", certify=True, block_dir=tmp_path / CERTIFICATES)
    report.save(tmp_path)
    read = PruneReport.load(tmp_path)
    assert read.to_dict() == report.to_dict()
    assert [s.bound for s in read.certificates] == [s.bound for s in report.certificates]
    found = list(check_certificates(tmp_path))
    assert [block.name for block in found] == [block.name for block in report.blocks]
    assert all(block.ok and block.proved for block in found)
    rebuilt = [
        block.to_problem(summary.n_prune)
        for block, summary in zip(blocks_of(network(), "layer"), report.blocks, strict=True)
    ]
    assert all(block.ok for block in check_certificates(tmp_path, rebuilt))
    with pytest.raises(ArgumentError, match="only 1"):
        list(check_certificates(tmp_path, rebuilt[:1]))
    with pytest.raises(ArgumentError, match="more than 2"):
        list(check_certificates(tmp_path, [*rebuilt, rebuilt[0]]))


def test_a_changed_block_set_or_bound_is_found(tmp_path: Path) -> None:
    directory = tmp_path / CERTIFICATES
    report = run(network(), partition="layer", program="joint", certify=True, block_dir=directory)
    report.save(tmp_path)

    block_path(directory, 1).write_bytes(block_path(directory, 0).read_bytes())
    first, second = check_certificates(tmp_path)
    assert first.ok
    assert not second.ok
    assert "other data" in second.notes[0]

    block_path(directory, 1).unlink()
    with pytest.raises(InstanceFormatError, match=r"00001\.block\.npz"):
        list(check_certificates(tmp_path))

    assert report.blocks[0].bound is not None
    better = replace(report.blocks[0], bound=report.blocks[0].bound * 1.5)
    replace(report, blocks=(better, *report.blocks[1:])).save(tmp_path)
    assert "other values" in next(check_certificates(tmp_path)).notes[0]

    masks = {name: keep.flip(0) for name, keep in report.masks.items()}
    replace(report, masks=masks).save(tmp_path)
    assert "not that of the masks" in next(check_certificates(tmp_path)).notes[0]

    run(network(), partition="layer").save(tmp_path)
    assert not certificate_path(directory, 0).exists()
    with pytest.raises(ArgumentError, match="certify=True"):
        list(check_certificates(tmp_path))


@given(st.floats(-1e9, 1e9), st.integers(2, 12))
def test_what_is_printed_of_a_bound_is_a_bound(bound: float, digits: int) -> None:
    printed = bound_text(bound, digits)
    assert Fraction(printed) <= Fraction(bound)
    assert float(printed) == pytest.approx(bound, rel=10.0 ** (1 - digits), abs=1e-300)


@given(st.floats(0.0, 10.0))
def test_what_is_printed_of_a_gap_is_no_smaller(gap: float) -> None:
    number = gap_text(gap).removeprefix("< ").removesuffix(" %")
    assert Fraction(number) >= Fraction(gap) * 100 * (1 - Fraction(1, 10**12))
