"""Stochastic steps on the kept weights: zeros stay, the loss on samples set aside never rises."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import repeat
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbs_opt.curvature.kinds import EmpiricalFisher, SketchedFisher
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.pruning import prune
from cbs_opt.recipe.files import request_from_plain, request_to_plain
from cbs_opt.recipe.records import FineTuning, Recipe, Request, Stages
from cbs_opt.recipe.select import GreedyOBS
from cbs_opt.report.record import PruneReport
from cbs_opt.stages.fine_tuning import PROBES, Descent, FineTuner, Rate, Span, rates
from cbs_opt.stages.largest_curvature import largest_curvature
from cbs_opt.stages.model import StageModel
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot

RECIPE = Recipe(
    curvature=SketchedFisher(samples=40),
    layer_inputs=1.0,
    damping=1.0,
    selection_damping=1.0,
    select=GreedyOBS(drops=2),
    choice_samples=20,
)
SETTLING = replace(RECIPE, recalibrate=True)
KINDS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "newton": {"momentum_rates": (), "newton_dampings": (0.1,)},
    "adam": {"momentum_rates": (), "adam_rates": (0.005,)},
}


def tuned(
    model: nn.Module, plan: FineTuning | None, *, count: int = 2, sparsity: float = 0.6, **options: Any
) -> PruneReport:
    stages = Stages(count=count, updates=1, final_updates=0, fine_tuning=plan)
    options = {"recipe": RECIPE, "stages": stages, "progress": False} | options
    return prune(model, options.pop("train", None) or data(200), sparsity=sparsity, **options)


def steps(report: PruneReport) -> list[Any]:
    return [record for record in report.stages if record.rate_kind]


@pytest.mark.parametrize("rate", [2.0, 4.0, 8.0])
def test_a_rate_that_runs_away_early_is_given_up_early(rate: float) -> None:
    """Steps too few for rates to be tried: what a rate that is too long leaves of them must do."""
    plan = FineTuning(samples=1_600, batch_size=16, rest=True, momentum_rates=(rate,))
    report = tuned(network(), plan, count=1, train=data(400))
    (record,) = steps(report)
    assert record.accepted
    # Taken to their end such steps are refused, or stop at .59 to .92; one of .2 ends at .46.
    assert record.loss < 0.55 < record.loss_before


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_lowers_the_loss_and_leaves_zeros(kind: str) -> None:
    model, plain = network(), network()
    report = tuned(model, FineTuning(samples=400, batch_size=16, **KINDS[kind]))
    without = tuned(plain, None)
    assert report.n_prune == without.n_prune == round(0.6 * report.n)
    for name, keep in report.masks.items():
        assert bool((model.get_parameter(name)[~keep] == 0.0).all())
    assert {record.rate_kind for record in steps(report)} == {kind}
    assert steps(report)[-1].loss <= steps(report)[-1].loss_before
    assert report.train_after is not None
    assert without.train_after is not None
    assert report.train_after.loss < without.train_after.loss


def test_nothing_but_the_weights_of_the_partition_moves() -> None:
    model = network()
    before = snapshot(model)
    tuned(model, FineTuning(samples=200, batch_size=16))
    after = model.state_dict()
    assert all(tensor.equal(after[name]) for name, tensor in before.items() if "weight" not in name)
    assert before["1.weight"].equal(after["1.weight"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_samples_are_counted_and_never_more_than_asked_for() -> None:
    report = tuned(network(), FineTuning(samples=300, final_samples=500, batch_size=32))
    rows = 40
    assert report.samples == 2 * rows + 300 + 500
    assert [record.tried for record in steps(report)] == [1, 1]


def test_rates_are_tried_once_where_there_are_steps_for_it() -> None:
    plan = FineTuning(samples=700, batch_size=2, momentum_rates=(0.5, 0.05))
    report = tuned(network(), plan)
    assert [record.tried for record in steps(report)] == [2, 1]
    assert report.samples == 2 * 40 + 1_400


def test_a_network_that_rests_finds_its_rate_anew_and_gains_in_every_stage() -> None:
    plan = FineTuning(samples=1_400, batch_size=2, momentum_rates=(0.5, 0.05), rest=True)
    found = steps(tuned(network(), plan))
    assert [record.tried for record in found] == [2, 2]
    assert all(record.loss <= record.loss_before for record in found)


def test_steps_that_are_too_long_after_a_sharp_stage_are_shortened_by_probes() -> None:
    plan = FineTuning(samples=1_600, batch_size=4, momentum_rates=(100.0,), rest=True)
    (found,) = steps(tuned(network(), plan, count=1))
    assert found.accepted
    assert 1 < found.tried <= PROBES
    blind = steps(tuned(network(), replace(plan, rest=False), count=1))[0]
    assert blind.tried == 1
    assert found.loss < blind.loss


def test_the_same_seed_gives_the_same_bits() -> None:
    models = [network(), network(), network()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        tuned(model, FineTuning(samples=200, batch_size=16), seed=seed)
    one, same, other = (model.state_dict()["0.weight"] for model in models)
    assert one.equal(same)
    assert not one.equal(other)


def test_rates_that_run_away_leave_the_network_as_it_was() -> None:
    plan = FineTuning(samples=200, batch_size=16, momentum_rates=(1e9,))
    report = tuned(network(), plan, count=1)
    without = tuned(network(), None, count=1)
    assert report.train_after == without.train_after
    assert not any(record.accepted for record in steps(report))


def test_a_loss_that_falls_as_weights_explode_takes_none_that_did() -> None:
    def rewards_size(output: Tensor, labels: Tensor) -> Tensor:
        return 1.0 / (1.0 + output.square().mean()) + 0.0 * labels.sum()

    plan = FineTuning(samples=400, batch_size=16, momentum_rates=(1e6,), decay=0.0)
    model = network()
    before = torch.linalg.vector_norm(torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]))
    recipe = replace(RECIPE, curvature=EmpiricalFisher(samples=40))
    report = tuned(model, plan, count=1, recipe=recipe, loss_fn=rewards_size)
    after = torch.linalg.vector_norm(torch.cat([model[0].weight.flatten(), model[3].weight.flatten()]))
    assert after < 100.0 * before
    (found,) = steps(report)
    assert found.loss <= found.loss_before


@pytest.mark.parametrize(
    "plan",
    [
        FineTuning(samples=200, batch_size=16),
        FineTuning(samples=800, batch_size=16, rest=True),
        FineTuning(samples=1_600, batch_size=4, rest=True),
        FineTuning(samples=800, batch_size=16, rest=True, batch_statistics=True),
        FineTuning(samples=200, batch_size=16, batch_statistics=True),
        FineTuning(samples=800, batch_size=16, rest=True, batch_statistics=True, vectors=True),
        FineTuning(samples=800, batch_size=16, rest=True, batch_statistics=True, surplus=2.0),
        FineTuning(samples=800, batch_size=16, rest=True, batch_statistics=True, matching=True),
    ],
    ids=[
        "one rate",
        "by curvature",
        "by probes",
        "by the way to go",
        "in batches",
        "vectors",
        "narrowing",
        "matching",
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(plan: FineTuning, tmp_path: Any) -> None:
    whole, resumed = network(), network()
    recipe = SETTLING if plan.batch_statistics else RECIPE
    tuned(whole, plan, recipe=recipe)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    before = snapshot(resumed)
    stages = Stages(count=2, updates=1, final_updates=0, fine_tuning=plan)
    stopped = replace(stages, on_stage=stop)
    with pytest.raises(KeyboardInterrupt):
        tuned(resumed, plan, recipe=recipe, stages=stopped, run_dir=tmp_path / "run")
    assert_untouched(resumed, before)
    tuned(resumed, plan, recipe=recipe, run_dir=tmp_path / "run")
    assert all(whole.state_dict()[name].equal(value) for name, value in resumed.state_dict().items())


def test_a_loss_of_sums_and_a_network_in_half_precision_are_tuned() -> None:
    sums = nn.CrossEntropyLoss(reduction="sum")
    report = tuned(network(), FineTuning(samples=200, batch_size=16), loss_fn=sums)
    assert any(record.accepted for record in steps(report))
    model = network(dtype=torch.bfloat16)
    report = tuned(model, FineTuning(samples=200, batch_size=16))
    assert model.get_parameter("0.weight").dtype == torch.bfloat16
    assert any(record.accepted for record in steps(report))


def test_the_solver_of_a_stage_is_the_inverse_of_its_damped_matrix() -> None:
    partition = Partition.from_model(network(), blocks="layer")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, partition.n, generator=generator, dtype=torch.float64)
    keep = torch.rand(partition.n, generator=generator) < 0.5
    model = StageModel(partition, keep, rows[:, keep])
    x = torch.randn(int(keep.sum()), generator=generator, dtype=torch.float64)
    solved = model.solver(0.3)(x)
    expected: list[Tensor] = []
    for block in partition.blocks:
        part = rows[:, block.start : block.stop][:, keep[block.start : block.stop]]
        matrix = part.T @ part + 0.3 * torch.eye(part.shape[1], dtype=torch.float64)
        begin = sum(len(piece) for piece in expected)
        expected.append(torch.linalg.solve(matrix, x[begin : begin + len(matrix)]))
    torch.testing.assert_close(solved, torch.cat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_steps_go_down_the_loss_and_the_penalty_of_the_kept_weights(kind: str) -> None:
    model, oracle = network(dtype=torch.float64), network(dtype=torch.float64)
    x, y = data(16, dtype=torch.float64)
    partition = Partition.from_model(model, target=["0.weight"])
    keep = torch.arange(partition.n) % 3 > 0
    objective = Objective(nn.CrossEntropyLoss())
    start = torch.where(keep, partition.flatten(model), 0.0)
    before = start.clone()
    rate = Rate(kind=kind, value=0.05, decay=0.3)
    descent = Descent(model, partition, objective, weights=start, keep=keep, rate=rate)
    batch = Batch(inputs=x, labels=y)
    descent.run(repeat(batch), samples=160, batch_size=16, span=Span(), advance=lambda _: None)
    assert start.equal(before)

    weight = oracle.get_parameter("0.weight")
    with torch.no_grad():
        weight.copy_(start.view_as(weight))
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam([weight], lr=1.0)
        if kind == "adam"
        else torch.optim.SGD([weight], lr=1.0, momentum=0.9, nesterov=True)
    )
    for step in range(10):
        optimizer.param_groups[0]["lr"] = 0.05 * Span().rate(step / 10)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(oracle(x), y) + 0.15 * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        weight.grad.mul_(keep.view_as(weight))
        optimizer.step()
    torch.testing.assert_close(descent.weights, weight.detach().flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalized", [True, False])
def test_batch_normalisation_goes_by_batches_if_it_is_to(normalized: bool) -> None:
    model, oracle = network(dtype=torch.float64), network(dtype=torch.float64)
    before = snapshot(model)
    x, y = data(16, dtype=torch.float64)
    partition = Partition.from_model(model, target=["0.weight"])
    start, keep = partition.flatten(model), torch.ones(partition.n, dtype=torch.bool)
    descent = Descent(
        model,
        partition,
        Objective(nn.CrossEntropyLoss()),
        weights=start,
        keep=keep,
        rate=Rate(kind="momentum", value=0.05),
        normalized=normalized,
    )
    batch = Batch(inputs=x, labels=y)
    descent.run(repeat(batch), samples=16, batch_size=16, span=Span(), advance=lambda _: None)
    assert_untouched(model, before)
    oracle.train(normalized)
    nn.functional.cross_entropy(oracle(x), y).backward()  # type: ignore[no-untyped-call]
    weight = oracle.get_parameter("0.weight")
    assert weight.grad is not None
    expected = (weight - 0.05 * Span().rate(0.0) * 1.9 * weight.grad).detach().flatten()
    torch.testing.assert_close(descent.weights, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rest", [True, False])
def test_statistics_are_new_after_steps_in_batches_and_stay_where_they_may_not_change(rest: bool) -> None:
    plan = FineTuning(samples=400, batch_size=16, rest=rest, batch_statistics=True)
    model, fixed, plain = network(), network(), network()
    before = snapshot(model)
    report = tuned(model, plan, recipe=SETTLING)
    assert any(record.accepted for record in steps(report))
    assert not before["1.running_mean"].equal(model.state_dict()["1.running_mean"])
    assert not any(module.training for module in model.modules())
    tuned(fixed, plan)
    tuned(plain, replace(plan, batch_statistics=False))
    after = fixed.state_dict()
    assert all(before[name].equal(after[name]) for name in before if name.startswith("1."))
    assert after["0.weight"].equal(plain.state_dict()["0.weight"])


@pytest.mark.parametrize("size", [1, 2])
def test_batches_without_statistics_of_their_own_are_those_of_the_network(size: int) -> None:
    x, y = data(48)
    loader = [(x[i : i + size], y[i : i + size]) for i in range(0, 48, size)]
    plan = FineTuning(samples=100, batch_size=size, batch_statistics=True)
    report = tuned(network(), plan, train=loader, recipe=SETTLING)
    assert report.n_prune == round(0.6 * report.n)
    assert all(record.samples > 0 for record in steps(report))


def test_steps_are_the_longer_the_further_there_is_to_go() -> None:
    plan, weights = FineTuning(samples=10), torch.tensor([3.0, 4.0])
    one, longer = (rates(plan, 2.0, weights, stretch=stretch)[0].value for stretch in (0.2, 0.6))
    assert longer == pytest.approx(3.0 * one)


def test_few_steps_from_far_off_are_the_shorter_the_fewer_they_are() -> None:
    plan = FineTuning(samples=160, batch_size=16, rest=True, batch_statistics=True, momentum_rates=(0.01,))
    few, more = (
        tuned(network(), replace(plan, samples=count), count=1, sparsity=0.9, recipe=SETTLING)
        for count in (160, 320)
    )
    assert steps(more)[0].rate == pytest.approx(2.0 * steps(few)[0].rate)


@pytest.mark.parametrize("normalized", [True, False])
def test_what_steps_passed_stands_for_an_end_that_is_no_gain(
    normalized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = FineTuner._run

    def jumping(*given: Any) -> tuple[Tensor, float, int]:
        reached, _, used = run(*given)
        return reached, math.inf, used

    monkeypatch.setattr(FineTuner, "_run", jumping)
    plan = FineTuning(samples=400, batch_size=16, rest=True, batch_statistics=normalized)
    (record,) = steps(tuned(network(), plan, count=1, sparsity=0.9, recipe=SETTLING))
    assert record.accepted == normalized
    assert (record.loss < record.loss_before) == normalized


def test_a_rate_is_tried_by_where_it_ends_and_shorter_after_an_end_that_is_no_gain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = FineTuner._run
    rates_taken: list[float] = []

    def jumping(tuner: FineTuner, descent: Descent, *given: Any) -> tuple[Tensor, float, int]:
        rates_taken.append(descent._rate.value)
        reached, loss, used = run(tuner, descent, *given)
        return reached, (math.inf if len(rates_taken) < 3 else loss), used

    monkeypatch.setattr(FineTuner, "_run", jumping)
    plan = FineTuning(samples=1_600, batch_size=4, rest=True, batch_statistics=True)
    (record,) = steps(tuned(network(), plan, count=1, sparsity=0.9, recipe=SETTLING))
    assert record.accepted
    ratios = [before / after for before, after in itertools.pairwise(rates_taken[:3])]
    assert ratios == pytest.approx([3.0, 3.0])


@pytest.mark.parametrize("normalized", [True, False])
def test_steps_are_looked_at_on_their_way_where_batches_are_normalised(normalized: bool) -> None:
    model = network()
    x, y = data(16)
    partition = Partition.from_model(model, target=["0.weight"])
    start = partition.flatten(model).double()
    keep = torch.arange(partition.n) % 3 > 0
    descent = Descent(
        model,
        partition,
        Objective(nn.CrossEntropyLoss()),
        weights=torch.where(keep, start, 0.0),
        keep=keep,
        rate=Rate(kind="momentum", value=0.01),
        normalized=normalized,
    )
    batch = repeat(Batch(inputs=x, labels=y))
    descent.run(batch, samples=320, batch_size=16, span=Span(), advance=lambda _: None)
    way = [float((passed - start)[keep].norm()) for passed in [descent.weights, *descent.passed]]
    assert len(way) == (4 if normalized else 1)
    assert way == sorted(way, reverse=True)
    assert way[-1] > 0.0
    assert all(not passed[~keep].any() for passed in descent.passed)


def test_shorter_steps_have_a_lower_rate_or_a_larger_damping() -> None:
    before = {kind: Rate(kind=kind, value=0.5, decay=0.1) for kind in ("momentum", "newton", "adam")}
    after = {kind: rate.shorter().value for kind, rate in before.items()}
    assert after["momentum"] == after["adam"] == pytest.approx(0.5 / 3.0)
    assert after["newton"] == pytest.approx(1.5)
    assert before["momentum"].shorter().decay == 0.1


def test_a_rate_that_ran_away_is_not_tried_again() -> None:
    plan = FineTuning(samples=200, batch_size=16, momentum_rates=(1e4,))
    first, second, third = steps(tuned(network(), plan, count=3))
    assert not first.accepted
    assert third.rate <= second.rate / 3.0 or second.accepted
    assert second.rate <= first.rate / 3.0


@pytest.mark.parametrize("m", [2, 21, 200])
def test_the_largest_curvature_is_that_of_the_matrix_that_rows_sample(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    scales = torch.ones(400, dtype=torch.float64)
    scales[0] = 20.0
    rows = torch.randn(m, 400, generator=generator, dtype=torch.float64) * scales / m**0.5
    if m == 2:
        rows = torch.cat([rows[:1]] * 2)
    found = largest_curvature(rows)
    top = float(torch.linalg.eigvalsh(rows @ rows.T)[-1])
    if m == 2:
        assert found == pytest.approx(top)
        assert largest_curvature(rows[:1]) == pytest.approx(top / 2.0)
    else:
        assert 0.4 * 400.0 < found < 1.6 * 400.0
        assert found < top
    assert largest_curvature(torch.zeros(3, 4)) == 0.0


def test_a_network_may_be_on_its_way_until_the_end() -> None:
    way, end = Span(begin=0.0, end=0.5), Span(begin=0.5, end=1.0)
    assert way.takes(0.4, 0.2, 2.2)
    assert not way.takes(0.8, 0.2, 2.2)
    assert way.takes(0.4, 0.5, 0.1)
    assert not way.takes(0.6, 0.5, 0.1)
    assert not end.takes(0.2, 0.2, 2.2)
    assert not any(span.takes(float("inf"), 0.2, 2.2) for span in (way, end))
    assert end.rate(0.0) < way.rate(0.5)
    assert end.rate(0.999) == pytest.approx(0.0, abs=1e-3)
    assert way.rate(0.999) == pytest.approx(0.5, abs=1e-2)
    assert end.rate(0.0) == pytest.approx(0.1 * 0.5)


@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_rates_go_by_the_scale_of_the_problem(factor: float) -> None:
    plan, weights = FineTuning(samples=10), torch.tensor([3.0, 4.0])
    plan = replace(plan, newton_dampings=(0.1,), adam_rates=(0.005,))
    before = {rate.kind: rate.value for rate in rates(plan, 2.0, weights)}
    curved = {rate.kind: rate.value for rate in rates(plan, 2.0 * factor, weights)}
    larger = {rate.kind: rate.value for rate in rates(plan, 2.0, factor * weights)}
    assert curved["momentum"] == pytest.approx(before["momentum"] / factor)
    assert curved["newton"] == pytest.approx(before["newton"] * factor)
    assert larger["adam"] == pytest.approx(before["adam"] * factor)
    assert curved["adam"] == before["adam"]
    assert larger["momentum"] == before["momentum"]
    decays = [rate.decay for rate in rates(plan, 2.0 * factor, weights)]
    assert decays == pytest.approx([2.0 * factor * plan.decay] * 3)


def test_records_are_checked_and_travel() -> None:
    stages = Stages(fine_tuning=FineTuning(samples=100, batch_size=8, momentum_rates=(0.1, 0.2)))
    request = Request(sparsity=0.5, recipes=(RECIPE,), stages=stages)
    assert request_from_plain(request_to_plain(request)) == request
    bad: list[dict[str, Any]] = [
        {"samples": 0},
        {"samples": 10, "batch_size": 0},
        {"samples": 10, "decay": -1e-4},
        {"samples": 10, "rest": 1},
        {"samples": 10, "batch_statistics": "yes"},
        {"samples": 10, "vectors": 1},
        {"samples": 10, "vectors": True, "newton_dampings": (0.1,)},
        {"samples": 10, "momentum_rates": (-1.0,)},
        {"samples": 10, "adam_rates": "fast"},
        {"samples": 10, "momentum_rates": (), "newton_dampings": (), "adam_rates": ()},
    ]
    for fields in bad:
        with pytest.raises(ArgumentError, match=r"stages\.fine_tuning"):
            FineTuning(**fields)
    with pytest.raises(ArgumentError, match=r"stages\.fine_tuning"):
        Stages(fine_tuning=100)  # type: ignore[arg-type]
