"""Public functions under arbitrary arguments: a right answer, or an error of ours that names the argument."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import cbs_opt as cbs
from cbs_opt.budget.counts import allocate
from cbs_opt.curvature.kinds import FISHERS, EmpiricalFisher
from cbs_opt.errors import MaskMismatchError
from cbs_opt.recipe.records import Absolute, Certify, Recipe, Stages, Update, Weights, absolute
from cbs_opt.recipe.select import SELECTS, Exact, select_by_name
from cbs_opt.system.resources import Resources
from formulations import BlockProblem, BlockSolution, CbsError, Termination, objective
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

FAST = ("magnitude", "randomized_magnitude", "obd", "obs", "greedy_obs", "swap_search", "enumeration")
EXACT = ("branch_and_bound", "outer_approximation", "lower_bound")
quick = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
long = settings(parent=quick, max_examples=500)

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.floats(), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.just(object()),
    st.complex_numbers(),
)
arrays = st.one_of(
    junk,
    hnp.arrays(
        dtype=st.sampled_from([np.float64, np.float32, np.int64, np.bool_, np.complex128, np.uint8]),
        shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    ),
)


@st.composite
def problems(draw: st.DrawFn, largest: int = 9) -> BlockProblem:
    """Valid blocks: full and low rank, dependent columns, zeros, with and without gradient, by rows or H."""
    n = draw(st.integers(1, largest))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = generator.normal(size=(draw(st.integers(1, 12)), n))
    if draw(st.booleans()):
        rows[:, n // 2 :] = rows[:, : n - n // 2]
    if draw(st.booleans()):
        rows[:, generator.random(n) < 0.3] = 0.0
    rows *= 10.0 ** draw(st.integers(-6, 6))
    weights = generator.normal(size=n) * 10.0 ** draw(st.integers(-6, 3))
    if draw(st.booleans()):
        weights[generator.random(n) < 0.3] = 0.0
    scale = float(np.mean(rows**2)) + 1e-12
    given_hessian = draw(st.booleans())
    return BlockProblem(
        weights=weights,
        rows=None if given_hessian else rows,
        hessian=rows.T @ rows if given_hessian else None,
        gradient=generator.normal(size=n) * math.sqrt(scale) if draw(st.booleans()) else None,
        damping=scale * 10.0 ** draw(st.integers(-5, 2)),
        n_prune=draw(st.integers(0, n)),
    )


def value_scale(problem: BlockProblem) -> float:
    """What two evaluations in float64 may differ by, over 1e-9."""
    return abs(problem.constant_term()) + float(np.abs(problem.gradient_or_zero) @ np.abs(problem.weights))


@quick
@given(
    weights=arrays,
    rows=arrays,
    hessian=arrays,
    gradient=arrays,
    n_prune=junk,
    damping=junk,
    name=st.text(max_size=3),
)
def test_a_problem_is_valid_or_refused(weights, rows, hessian, gradient, n_prune, damping, name):
    try:
        problem = BlockProblem(
            weights=weights,
            rows=rows,
            hessian=hessian,
            gradient=gradient,
            n_prune=n_prune,
            damping=damping,
            name=name,
        )
    except ArgumentError:
        return
    assert problem.n == problem.weights.size
    assert 0 <= problem.n_prune <= problem.n
    assert len(problem.fingerprint()) == 64


@quick
@given(
    n=st.integers(0, 3),
    weights=arrays,
    rows=arrays,
    damping=st.floats(allow_nan=True),
    n_prune=st.integers(-2, 5),
)
def test_a_problem_with_one_bad_part_is_refused(n, weights, rows, damping, n_prune):
    good: dict[str, Any] = {"weights": np.ones(n), "rows": np.ones((2, n)), "damping": 0.1, "n_prune": 0}
    for change in ({"weights": weights}, {"rows": rows}, {"damping": damping}, {"n_prune": n_prune}):
        try:
            problem = BlockProblem(**(good | change))
        except ArgumentError:
            continue
        assert np.isfinite(problem.weights).all()
        assert math.isfinite(problem.damping)


def check_solution(problem: BlockProblem, solution: BlockSolution) -> None:
    """Right count, honest objective and bound, verified independently."""
    assert solution.keep is not None
    assert solution.pruned.size == problem.n_prune
    assert not solution.weights[~solution.keep].any()
    verification = cbs.verify(problem, solution)
    assert not verification.wrong, verification
    if solution.bound is not None:
        assert solution.bound <= solution.objective + 1e-9 * value_scale(problem)


def check_method(problem: BlockProblem, method: str, program: str, seed: int) -> None:
    if method == "enumeration":
        assume(problem.n <= 8)
    solution = cbs.solve(problem, method, program=program, seed=seed)
    check_solution(problem, solution)
    again = cbs.solve(problem, method, program=program, seed=seed)
    np.testing.assert_array_equal(again.keep, solution.keep)
    warm = cbs.solve(problem, "magnitude", program=program)
    better = cbs.solve(problem, method, program=program, seed=seed, incumbent=warm)
    check_solution(problem, better)
    assert better.objective <= warm.objective


@quick
@given(
    problem=problems(),
    method=st.sampled_from(FAST),
    program=st.sampled_from(("selection", "joint")),
    seed=st.integers(0, 99),
)
def test_every_fast_method_answers_every_block(problem, method, program, seed):
    check_method(problem, method, program, seed)


@pytest.mark.slow
@long
@given(
    problem=problems(),
    method=st.sampled_from(FAST + EXACT),
    program=st.sampled_from(("selection", "joint")),
    seed=st.integers(0, 99),
)
def test_every_method_answers_every_block(problem, method, program, seed):
    check_method(problem, method, program, seed)


@quick
@given(problem=problems(), program=st.sampled_from(("selection", "joint")), seed=st.integers(0, 10**6))
def test_no_set_is_below_the_bound(problem, program, seed):
    solution = cbs.lower_bound(problem, program)
    check_solution(problem, solution)
    keep = np.ones(problem.n, dtype=np.bool_)
    keep[np.random.default_rng(seed).permutation(problem.n)[: problem.n_prune]] = False
    # Columns that depend on each other under little damping may leave nothing proved, which is honest.
    assume(solution.bound is not None)
    assert solution.bound <= objective(problem, keep, program) + 1e-9 * value_scale(problem)


@quick
@given(
    problem=problems(4),
    change=st.one_of(
        st.fixed_dictionaries({"program": junk}),
        st.fixed_dictionaries({"method": junk}),
        st.fixed_dictionaries({"time_limit": junk}),
        st.fixed_dictionaries({"rel_gap": junk}),
        st.fixed_dictionaries({"iteration_limit": junk}),
        st.fixed_dictionaries({"node_limit": junk}),
        st.fixed_dictionaries({"threads": junk}),
        st.fixed_dictionaries({"seed": junk}),
        st.fixed_dictionaries({"incumbent": junk}),
        st.fixed_dictionaries({"unheard_of": junk}),
    ),
)
def test_solve_takes_or_refuses_any_argument(problem, change):
    arguments = {"method": "swap_search", "program": "joint"} | change
    try:
        solution = cbs.solve(problem, **arguments)
    except CbsError:
        return
    check_solution(problem, solution)


@quick
@given(
    problem=problems(6),
    keep=arrays,
    weights=arrays,
    value=st.none() | st.floats(),
    bound=st.none() | st.floats(),
)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_verify_sees_through_any_solution(problem, keep, weights, value, bound):
    try:
        solution = BlockSolution(
            keep=keep, weights=weights, objective=value, bound=bound, program="joint", method="x",
            termination=Termination.OPTIMAL,
        )  # fmt: skip
    except (CbsError, TypeError, ValueError, OverflowError):
        return
    try:
        found = cbs.verify(problem, solution)
    except CbsError:
        return
    if not found.wrong:
        assert solution.keep.sum() == problem.n_keep
        assert solution.objective == pytest.approx(objective(problem, solution.keep, "joint"), rel=1e-5)


@quick
@given(problem=problems(6), method=st.sampled_from(("greedy_obs", "swap_search")), seed=st.integers(0, 99))
def test_blocks_together_are_as_blocks_alone(problem, method, seed):
    from cbs_opt.execution.blocks import block_seed

    together = cbs.solve_blocks([problem] * 3, method, program="selection", seed=seed)
    for index, solution in enumerate(together):
        alone = cbs.solve(problem, method, program="selection", seed=block_seed(seed, index))
        np.testing.assert_array_equal(solution.keep, alone.keep)


masks = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    hnp.arrays(dtype=np.bool_, shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    min_size=1,
    max_size=4,
)


@quick
@given(masks=masks, metadata=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3))
def test_masks_come_back_from_their_file(masks, metadata, tmp_path):
    tensors = {name: torch.from_numpy(np.array(keep)) for name, keep in masks.items()}
    if set(metadata) & {"format", "version", "sense", "sparsity", "checksum"}:
        return
    cbs.save_masks(tmp_path / "m", tensors, metadata=metadata)
    again = cbs.load_masks(tmp_path / "m")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], keep) for name, keep in tensors.items())


@quick
@given(value=junk)
def test_masks_that_are_none_are_refused_and_nothing_is_written(value, tmp_path):
    model = network()
    before = snapshot(model)
    for wrong in (
        value,
        {"0.weight": value},
        {"0.weight": torch.ones(8, 6)},
        {"0.weight": torch.ones(2, dtype=torch.bool)},
    ):
        with pytest.raises((ArgumentError, MaskMismatchError)):
            cbs.apply_masks(model, wrong)
        assert_untouched(model, before)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    sizes = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=draw(st.booleans())), nn.Tanh()]
    if draw(st.booleans()) and sizes[0] == sizes[-1] and len(sizes) > 2:
        layers.append(layers[0])
    return nn.Sequential(*layers).eval()


RULES = st.one_of(st.sampled_from(["global", "layer", "row"]), st.integers(1, 40))


@quick
@given(model=networks(), rule=RULES)
def test_a_partition_covers_every_weight_once(model, rule):
    partition = cbs.Partition.from_model(model, blocks=rule)
    distinct = {id(p): p for name, p in model.named_parameters() if name.endswith("weight")}
    assert partition.n == sum(p.numel() for p in distinct.values())
    assert sum(block.stop - block.start for block in partition.blocks) == partition.n
    flat = partition.flatten(model)
    assert all(
        torch.equal(piece, dict(model.named_parameters())[name])
        for name, piece in partition.split(flat).items()
    )


@quick
@given(model=networks(), rule=junk, target=junk, ignore=junk)
def test_a_partition_is_made_or_refused(model, rule, target, ignore):
    for arguments in ({"blocks": rule}, {"target": target}, {"ignore": ignore}):
        try:
            partition = cbs.Partition.from_model(model, **arguments)
        except CbsError:
            continue
        assert partition.n > 0


@quick
@given(
    model=networks(),
    rule=RULES,
    sparsity=st.floats(0, 1, exclude_max=True),
    uniform=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_budget_is_met_exactly(model, rule, sparsity, uniform, seed):
    partition = cbs.Partition.from_model(model, blocks=rule)
    scores = torch.rand(partition.n, generator=torch.Generator().manual_seed(seed))
    scores[scores < 0.2] = 0.0
    scores[scores > 0.9] = torch.inf
    counts = allocate(partition, sparsity, budget="uniform" if uniform else "global", scores=scores)
    assert sum(counts) == round(sparsity * partition.n)
    assert all(0 <= c <= b.stop - b.start for c, b in zip(counts, partition.blocks, strict=True))


@quick
@given(sparsity=junk, budget=junk, scores=arrays)
def test_a_budget_is_spent_or_refused(sparsity, budget, scores):
    partition = cbs.Partition.from_model(network(), blocks="row")
    for arguments in ((sparsity, "uniform", None), (0.5, budget, None), (0.5, "global", scores)):
        share, rule, values = arguments
        try:
            counts = allocate(partition, share, budget=rule, scores=values)
        except CbsError:
            continue
        assert sum(counts) >= 0


@settings(parent=quick, max_examples=15)
@given(
    sparsity=st.floats(0, 0.99),
    method=st.sampled_from(("magnitude", "obd", "obs", "swap_search", "greedy_obs")),
    program=st.sampled_from(("selection", "joint")),
    partition=st.sampled_from(("global", "layer", "row", 7)),
    budget=st.sampled_from(("global", "uniform")),
    update=st.booleans(),
    seed=st.integers(0, 99),
)
def test_prune_meets_its_budget_and_repeats_itself(
    sparsity, method, program, partition, budget, update, seed
):
    recipe = Recipe(
        curvature=EmpiricalFisher(samples=20),
        damping=absolute(1e-2),
        select=select_by_name(method, program=program),
        weights=Weights(blocks=partition, budget="global" if partition == "global" else budget),
        update=Update() if update else None,
    )
    options: dict[str, Any] = {"sparsity": sparsity, "recipe": recipe, "seed": seed, "progress": False}
    model, other = network(), network()
    report = cbs.prune(model, data(), **options)
    cbs.prune(other, data(), **options)
    zeros = sum(int((p == 0).sum()) for name, p in model.named_parameters() if name in report.masks)
    assert report.n_prune == round(sparsity * report.n)
    assert zeros >= report.n_prune
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def names_of(record: type[Any]) -> list[str]:
    return [entry.name for entry in fields(record)]


ARGUMENTS = (
    *("data", "sparsity", "recipe", "loss_fn", "stages", "certify", "evaluate", "resources", "seed"),
    *("run_dir",),
)
RECORDS: dict[str, Callable[..., dict[str, Any]]] = {
    "recipe": lambda **given: {"recipe": replace(FEW, **given)},
    "weights": lambda **given: {"recipe": replace(FEW, weights=Weights(**given))},
    "update": lambda **given: {"recipe": replace(FEW, update=Update(**given))},
    "damping": lambda **given: {"recipe": replace(FEW, damping=Absolute(**given))},
    "stages": lambda **given: {"recipe": FEW, "stages": Stages(**given)},
    "certify": lambda **given: {"recipe": FEW, "certify": Certify(**given)},
    "resources": lambda **given: {"recipe": FEW, "resources": Resources(**given)},
    **{
        kind: lambda record=record, **given: {"recipe": replace(FEW, curvature=record(**given))}
        for kind, record in FISHERS.items()
    },
    **{
        method: lambda record=record, **given: {"recipe": replace(FEW, select=record(**given))}
        for method, record in (*SELECTS.items(), ("exact", Exact))
    },
}
FEW = Recipe(curvature=EmpiricalFisher(samples=20))
FIELDS = [
    *(("recipe", name) for name in names_of(Recipe)),
    *(("weights", name) for name in names_of(Weights)),
    *(("update", name) for name in names_of(Update)),
    ("damping", "value"),
    *(("stages", name) for name in names_of(Stages)),
    ("certify", "time_limit"),
    *(("resources", name) for name in names_of(Resources)),
    *((kind, name) for kind, record in FISHERS.items() for name in names_of(record)),
    *((method, name) for method, record in SELECTS.items() for name in names_of(record)),
    *(("exact", name) for name in names_of(Exact)),
]
LONG = ("repeats", "samples", "count", "updates", "final_updates", "drops", "restarts", "steps", "workers")
"""Fields that take whole numbers of any size, and as long."""


@settings(parent=quick, max_examples=60)
@given(name=st.sampled_from(ARGUMENTS), value=junk)
def test_prune_takes_or_refuses_any_argument(name, value):
    assume(not (name == "stages" and isinstance(value, int) and value > 3))
    assume(not (name == "run_dir" and isinstance(value, str | bytes)))
    arguments: dict[str, Any] = {"data": data(30), "sparsity": 0.5, "recipe": FEW} | {name: value}
    pruned_or_refused(arguments)


@settings(parent=quick, max_examples=150)
@given(field=st.sampled_from(FIELDS), value=junk)
def test_prune_takes_or_refuses_any_field(field, value):
    record, name = field
    assume(not (name in LONG and isinstance(value, int) and value > 3))
    assume(not (name == "row_dir" and isinstance(value, str)))
    try:
        arguments = RECORDS[record](**{name: value})
    except CbsError:
        return
    pruned_or_refused({"data": data(30), "sparsity": 0.5} | arguments)


def pruned_or_refused(arguments: dict[str, Any]) -> None:
    model = network()
    before = snapshot(model)
    try:
        cbs.prune(model, arguments.pop("data"), progress=False, **arguments)
    except CbsError:
        assert_untouched(model, before)
