"""Certified gaps of pruned networks: what is proved, what is added up, what is written, what is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cbs_opt.certify import certificates as certification
from cbs_opt.certify.certificates import NOT_REACHED, certify_block
from cbs_opt.certify.files import CERTIFICATES, block_path, certificate_path
from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Certify, Weights, absolute
from cbs_opt.recipe.select import Exact, SwapSearch
from cbs_opt.report.files import load_report, save_report
from cbs_opt.report.parts import MEANING
from cbs_opt.report.record import PruneReport
from cbs_opt.report.verification import check_certificates
from cbs_opt.select.saliency import magnitude, without_lowest
from formulations import BlockProblem, NofM, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, InstanceFormatError
from formulations.loss import objective
from tests.cbs_opt.fisher import fisher_block
from tests.cbs_opt.recipes import arguments
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

pytestmark = pytest.mark.usefixtures("without_pictures")

PROGRAMS = ("selection", "joint")
PARTITIONS = ("global", "layer", "row", 7)


def run(model: nn.Module, **options: Any) -> PruneReport:
    """Prune by swap search on the selection program unless told otherwise."""
    plain = {"damping": absolute(0.01), "layer_inputs": 0.0, "curvature": EmpiricalFisher(samples=40)}
    select = {"select": SwapSearch(program=options.pop("program", "selection"))}
    options = {"sparsity": 0.5, "progress": False} | plain | select | options
    return prune(model, options.pop("data", data()), **arguments(**options))


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
        curvature=EmpiricalFisher(samples=40),
        damping=0.01,
        progress=False,
    )
    return blocks if gradient else [replace(block, gradient=None) for block in blocks]


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_certifying_changes_no_weight_and_bounds_every_block(program: str, partition: str | int) -> None:
    plain, certified = network(), network()
    before = run(plain, program=program, weights=Weights(blocks=partition))
    report = run(certified, program=program, weights=Weights(blocks=partition), certify=True)
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
    report = run(network(), weights=Weights(blocks="row"), program="joint", certify=True)
    total = report.certified
    assert total is not None
    assert total.bound is not None
    exact = sum(Fraction(block.bound) for block in report.blocks if block.bound is not None)
    assert Fraction(total.bound) <= exact
    assert total.bound == pytest.approx(float(exact), rel=1e-15)
    assert total.objective == pytest.approx(sum(block.objective or 0.0 for block in report.blocks))
    assert total.gap == pytest.approx((total.objective - total.bound) / total.objective)
    assert (total.blocks, total.bounded) == (len(report.blocks), len(report.blocks))
    assert MEANING in report.summary()
    layers = report.to_frame()
    assert layers["bound"].sum() == pytest.approx(total.bound)
    assert (layers.loc[layers.left_out == "", "gap"] >= 0.0).all()


@pytest.mark.parametrize("program", PROGRAMS)
def test_no_bound_exceeds_the_enumerated_optimum(program: str) -> None:
    model = network()
    trained = blocks_of(model, "row")
    report = run(model, weights=Weights(blocks="row", budget="uniform"), program=program, certify=True)
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
    report = run(
        model, data=data(dtype=dtype), weights=Weights(blocks="layer"), program="joint", certify=True
    )
    for block, solution, summary in zip(trained, report.certificates, report.blocks, strict=True):
        problem = block.to_problem(summary.n_prune)
        assert problem.fingerprint() == summary.fingerprint
        found = verify(problem, replace(solution))
        assert found.ok
        assert found.bound_checked


def test_the_gradient_is_in_the_bound_if_it_is_in_the_model() -> None:
    model = network()
    trained = blocks_of(model, "layer", gradient=True)
    report = run(model, weights=Weights(blocks="layer"), program="joint", gradient=True, certify=True)
    for block, summary, solution in zip(trained, report.blocks, report.certificates, strict=True):
        problem = block.to_problem(summary.n_prune)
        assert problem.gradient is not None
        assert problem.fingerprint() == summary.fingerprint
        assert solution.keep is not None
        assert summary.objective == pytest.approx(objective(problem, solution.keep, "joint"))


def test_selection_is_certified_at_the_damping_of_the_selection() -> None:
    report = run(network(), selection_damping=absolute(0.05), damping=absolute(0.01), certify=True)
    own = replace(blocks_of(network(), "global")[0], damping=0.05)
    assert own.to_problem(report.blocks[0].n_prune).fingerprint() == report.blocks[0].fingerprint


def test_a_proof_of_the_method_is_not_lost() -> None:
    report = run(network(), weights=Weights(blocks=12), select=Exact(), certify=True)
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
    report = run(network(), sparsity=sparsity, weights=Weights(blocks="row"), certify=True)
    for block in report.blocks:
        if block.n_prune in (0, block.n):
            assert block.gap is not None
            assert block.gap < 1e-9
            assert block.bound is not None
            assert block.bound <= block.objective


def test_a_time_limit_leaves_blocks_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(network(), weights=Weights(blocks="row"), certify=Certify(time_limit=0.0))
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
    report = run(network(), weights=Weights(blocks="row"), certify=Certify(time_limit=0.5))
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
        run(model, weights=Weights(blocks="row"), certify=True)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        (lambda: {"certify": "yes"}, "certify"),
        (lambda: {"certify": 1}, "certify"),
        (lambda: {"certify": Certify(time_limit=-1.0)}, "certify.time_limit"),
        (lambda: {"certify": Certify(time_limit=math.nan)}, "certify.time_limit"),
        (lambda: {"certify": Certify(time_limit="1")}, "certify.time_limit"),
        (lambda: {"certify": Certify(block_dir=3)}, "certify.block_dir"),
    ],
)
def test_bad_arguments_are_refused(options: Callable[[], dict[str, Any]], argument: str) -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(ArgumentError) as caught:
        run(model, **options())
    assert caught.value.argument == argument
    assert_untouched(model, before)


@pytest.mark.parametrize("limit", [-1.0, math.nan, "1"])
def test_a_time_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ArgumentError) as caught:
        Certify(time_limit=limit)
    assert caught.value.argument == "certify.time_limit"


def test_certificates_need_data() -> None:
    with pytest.raises(ArgumentError, match="data"):
        run(network(), data=None, select="magnitude", update=None, certify=True)


def test_saved_certificates_are_checked_again(tmp_path: Path) -> None:
    model = network()
    report = run(
        model,
        weights=Weights(blocks="layer"),
        program="joint",
        certify=Certify(block_dir=tmp_path / CERTIFICATES),
    )
    save_report(report, tmp_path)
    read = load_report(tmp_path)
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
    report = run(
        network(), weights=Weights(blocks="layer"), program="joint", certify=Certify(block_dir=directory)
    )
    save_report(report, tmp_path)

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
    save_report(replace(report, blocks=(better, *report.blocks[1:])), tmp_path)
    assert "other values" in next(check_certificates(tmp_path)).notes[0]

    masks = {name: keep.flip(0) for name, keep in report.masks.items()}
    save_report(replace(report, masks=masks), tmp_path)
    assert "not that of the masks" in next(check_certificates(tmp_path)).notes[0]

    save_report(run(network(), weights=Weights(blocks="layer")), tmp_path)
    assert not certificate_path(directory, 0).exists()
    with pytest.raises(ArgumentError, match="certify=True"):
        list(check_certificates(tmp_path))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_proved_bound_is_capped(program: str) -> None:
    """What an exact method proved may exceed the value of the set by its rounding, and is lowered to it."""
    rng = np.random.default_rng(0)
    problem = BlockProblem(weights=rng.normal(size=6), rows=rng.normal(size=(9, 6)), damping=0.1, n_prune=3)
    best = enumerate_optimum(problem, program)
    assert best.keep is not None
    assert best.objective is not None
    above = math.nextafter(best.objective, math.inf)
    certified = certify_block(problem, best.keep, program, proved=above).solution
    assert certified.bound == certified.objective


def test_blocks_with_a_support_are_bounded_over_its_sets(tmp_path: Path) -> None:
    """A bound over 2:4 is no lower than one over all sets of as many weights, and its file says so."""
    blocks = [fisher_block("flat", n, 10, seed=n) for n in (12, 16)]
    support = NofM(2, 4)
    kept = [without_lowest(magnitude(block), support) for block in blocks]
    for program in PROGRAMS:
        chosen = [certification.Chosen(keep, support=support) for keep in kept]

        def path_of(number: int, program: str = program) -> Path:
            return tmp_path / f"{program}_{number}.npz"

        found = certification.certify_blocks(blocks, chosen, program, path_of=path_of)
        plain = certification.certify_blocks(blocks, [(keep, None) for keep in kept], program)
        again = certification.certify_blocks(blocks, chosen, program, path_of=path_of)
        for block, each, by_count, stored in zip(blocks, found, plain, again, strict=True):
            problem = block.to_problem(support)
            assert each.solution.support == "2:4"
            assert by_count.solution.bound <= each.solution.bound + 1e-12
            assert each.solution.bound <= enumerate_optimum(problem, program).objective + 1e-12
            assert not verify(problem, each.solution).wrong
            assert stored.solution.bound == each.solution.bound
