"""A recipe by name made concrete for a network: its loss, its size, its data, the work of a gradient.

What is looked at is the same in every run, so that a run can be resumed and repeated: operations are counted,
not timed, unless the caller gives a budget in seconds. Learning rates, dampings and step lengths are left
open here; the run finds them on training samples that it sets aside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import add_gradient
from cbs_opt.curvature.gradients import NetworkFunction, require_evaluation_mode
from cbs_opt.curvature.kinds import EmpiricalFisher, Fisher, SketchedFisher
from cbs_opt.network.batchnorm import has_statistics
from cbs_opt.network.data import Batch, Data, device_of, forward, peeked, read, sample_count
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import PEEKED, Objective
from cbs_opt.network.operations import OperationCounter
from cbs_opt.network.partition import Partition
from cbs_opt.network.state import kept
from cbs_opt.network.trial import TrialNetwork, plain_attention
from cbs_opt.oneshot import Sample, draw_sample
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import FineTuning, Recipe, Request, Stages, Update
from cbs_opt.recipe.select import GreedyOBS
from cbs_opt.select.saliency import without_lowest
from cbs_opt.stages.fine_tuning import probe_samples
from cbs_opt.system.memory import readable
from formulations.support import NofM

BACKWARD = 3
"""Operations of a gradient over those of the forward pass."""
LEAST_SHARE = 0.25
"""Of the rows of a tier below which there are no stages for want of memory."""
COPIES = 6
"""Copies of the rows that a stage has at a time at most: rows, their channels' solves, those of a part."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What a name stands for, in operations, so that it costs about the same time for every network.

    `row_work`: of the gradients that the rows of all stages are made of. `rows`: how many those of one stage
    are at most, and `most_per_row` how many samples a row sums up. `tuned_row_work`, `tuned_rows`: the same
    where its own fine-tuning follows, which makes more of samples (ResNet20 at .9: 259 rows and 6 600 samples
    end at 85.7 %, 129 rows and 10 600 in the same time at 86.5). `tuning_work`: of the gradients of all
    fine-tuning, no more than `passes` over the data. `kept`: share of the weights that a stage keeps, about.
    `drop`: the same for one drop of greedy OBS. `selection_work`: multiplications, rows^2 x weights x drops,
    up to which there are more rows. `compared_work`: of the forward passes of the samples set aside.
    """

    row_work: float
    rows: int
    most_per_row: int
    tuned_row_work: float
    tuned_rows: int
    tuning_work: float
    passes: float
    kept: float
    drop: float
    selection_work: float
    compared_work: float


TIERS = {
    "fast": Tier(
        row_work=0.3e12,
        rows=100,
        most_per_row=12,
        tuned_row_work=0.3e12,
        tuned_rows=100,
        tuning_work=0.0,
        passes=0.0,
        kept=0.0,
        drop=0.8,
        selection_work=1.5e10,
        compared_work=0.015e12,
    ),
    "balanced": Tier(
        row_work=0.7e12,
        rows=280,
        most_per_row=12,
        tuned_row_work=0.3e12,
        tuned_rows=120,
        tuning_work=2.75e12,
        passes=20.0,
        kept=0.7,
        drop=0.85,
        selection_work=5e10,
        compared_work=0.05e12,
    ),
    "best": Tier(
        row_work=4e12,
        rows=280,
        most_per_row=12,
        tuned_row_work=4e12,
        tuned_rows=280,
        tuning_work=6e13,
        passes=30.0,
        kept=0.85,
        drop=0.85,
        selection_work=5e10,
        compared_work=0.05e12,
    ),
}
OVERHEAD = 8.7e6
"""Operations that the time of a step would do beside those of its gradient, for each of its samples."""
FEWEST_SAMPLES = 1_000
"""Samples for rows, and for fine-tuning, however large the network is; fewer if there are fewer."""
UNKNOWN = 2_000
"""Samples that a pass counts as for fine-tuning, where nothing tells how many there are."""
LEAST_STEPS = 20
"""Steps below which there is no fine-tuning."""
COMPARED = (64, 2_000)
"""Fewest and most samples set aside."""
BATCHES = (16, 64)
"""Smallest and largest batch of fine-tuning."""
STAGE_SAMPLES = 3_200
"""Samples of fine-tuning a stage below which there are fewer stages."""
STAGE_SHARE = 0.25
"""The same, over the number of weights: fewer do not make good what a selection without an update costs."""
GRADUAL_SHARE = 0.5
"""Of the weights that a stage has to keep, if the selections are to be gradual."""
SHARP_SHARE = 0.08
"""Of the weights that a stage keeps at least where they are not."""
SHARP_PASSES = 6.0
"""Passes over the data of fine-tuning below which there is one of those."""
NARROWING_STEPS = 5_000
"""Steps from which on a set that narrows begins with `SURPLUS` times as many weights as asked for; with fewer
it begins with less: see `_surplus`.

ResNet20 at .9, 188 steps by outputs: with 1, 1.25, 1.5, 2, 2.5 and 4 times as many it ends at 85.9, 86.9,
86.9, 86.5, 85.6 and 83.2 %, with 1 130 steps with 2 and 4 at 89.3 and 88.2; at .95, 188 steps, with 1 and 1.5
at 75.8 and 80.4. A residual network on digits at .95, 88 steps, with 1, 1.3, 2 and 4 at 93.5, 93.8, 85.8 and
85.1.
"""
SURPLUS = 4.0
"""Times as many weights as asked for that it begins with at most."""
NARROWING_SHARE = 0.125
"""Share of the weights that stays up to which a set narrows.

Where more is to stay there is little to gain: a residual network on digits at .8 ended at 98.7 % for each of
three seeds, and at 98.0 to 98.3 with a set that narrowed.
"""
METRIC_SHARE = 0.25
"""Of the operations of a step, what those of the metric of what layers are fed may be at most."""
GRADUAL_ROWS = (100, 8)
"""Rows of a stage, and the most samples of each, where there are several stages with fine-tuning."""
GRADUAL_DAMPING = 10.0
"""Damping of the selection there.

Long steps between the selections move the kept weights anyway: the model is asked which weights are large
beside the curvature, not for sets whose members make up for one another, and there are no updates while that
costs no more than `UPDATE_ABOVE`.
"""
UPDATE_ABOVE = 0.06
"""Of the way to the loss without weights, what a gradual selection may cost before there are updates."""
SCALES = (0.5, 1.0)
"""Step lengths of the update that are tried."""
ONE_SHOT_DAMPING = 0.03
"""Damping of one selection with nothing after it."""
UPDATE_DAMPINGS = (0.01, 0.03, 0.1)
"""Dampings that are tried for its update."""
BOUND_DAMPING = 0.1
"""The same where there is to be a bound, which is the tighter the larger the damping is."""
PROBED = 500
"""Samples that magnitude pruning is tried on."""
LITTLE = 0.15
"""Of the way to the loss without weights, what magnitude pruning may cost for fine-tuning to be left out."""
ROWS_FOR_TUNING = 0.7
"""Samples of rows that take the place of one of fine-tuning: each makes the selection longer too."""
FINAL_SHARE = 0.4
"""Of all fine-tuning for that after the last stage, if there are several."""
SHARP_FINAL_SHARE = 0.6
"""The same where each stage prunes much, the last one what is missed most."""
BLIND_RATE = 0.35
"""Learning rate over the largest curvature, where the network is far from rest and no rate can be tried."""
FAR_RATE = 5.0
"""The same where batch normalisation goes by batches: times how far from rest the network is."""
LEARNT = 0.05
"""Loss on the training data, over that without any weight, up to which a network has learnt their labels."""
MATCHED_SHARE = 0.03
"""Of the weights, that stays at least where outputs are matched: of fewer they ask too much.

At .98 labels end higher: ResNet20 with 25 000 samples at 64.1 in place of 62.5 %, a perceptron on MNIST with
200 000 at 96.1 in place of 94.7, a residual network on digits at 95.4 in place of 92.0 over three seeds.
"""
MATCHED_RATE = 2.0
"""`FAR_RATE` where outputs are matched: the curvature of their distance stays."""
MATCHED_WORK = (BACKWARD + 1) / BACKWARD
"""Operations of a step where outputs are matched over those of its gradient."""
MATCHED_BLIND_RATE = 0.2
"""`BLIND_RATE` where outputs are matched."""
STEPS = 100
"""Steps that a fine-tuning aims at before batches grow."""
MATCHED_STEPS = 175
"""Steps up to which a fine-tuning by outputs makes as many as one by labels, though they take longer."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A request with concrete recipes, and what each choice was made on, in sentences."""

    recipes: tuple[Recipe, ...]
    stages: Stages | None
    choices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a recipe is chosen by.

    `form`: that of the loss in the outputs, None if it has none that is known. `work`: floating-point
    operations of one gradient. `samples`: how many the data have, None if nothing tells. `seconds`: of one
    gradient, where it was timed.
    """

    form: str | None
    work: float
    samples: int | None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Division:
    """How the gradients of a run are divided.

    `row_samples`: those of the rows of one stage, of which there are `rows`, or as many as a selection of so
    little work allows; `most_per_row` is how many a row sums up at most. `tuning`:
    those of all fine-tuning. `count`: stages, `gradual` if they take few weights each. `staged`: whether
    there are stages at all, if only one, and not rows, a set and an update once. `matching`: whether
    fine-tuning goes by outputs in place of labels.
    """

    row_samples: float
    rows: int
    tuning: float
    count: int
    gradual: bool
    staged: bool
    most_per_row: int
    matching: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """What a recipe is made concrete for.

    `stages`: those that the caller asks for in place of those of the name. `certify`: bounds are of one
    stage, so that there are then no others. `free`: bytes of memory that the run may take. `pattern`:
    where the sparsity is that of n of every m inputs.
    """

    model: nn.Module
    data: Data
    objective: Objective
    partition: Partition
    sparsity: float
    stages: Stages | None
    certify: bool
    free: int
    pattern: NofM | None = None


def resolved(named: Named, scene: Scene) -> Resolved:
    """Return the concrete recipe of a name; the network is run on a few samples."""
    partition, sparsity, stages, certify = scene.partition, scene.sparsity, scene.stages, scene.certify
    facts = _facts(scene, timed=named.seconds is not None)
    tier = TIERS[named.name]
    available = math.inf if facts.samples is None else facts.samples
    choices = [
        f"recipe {named.name}",
        f"loss: {facts.form or 'of no known form in the outputs'}",
        f"data: {facts.samples or 'an unknown number of'} samples",
        f"work: {facts.work:.2g} operations a gradient",
    ]
    budget = _budget(named, facts, choices)
    normalized = named.recalibrate and has_statistics(scene.model)
    narrows = normalized and _may_narrow(scene)
    division = _division(tier, scene, facts, budget, choices, narrows=narrows)
    count, gradual, staged = division.count, division.gradual, division.staged
    fits = int(0.5 * scene.free / (COPIES * 4 * partition.n))
    drops = _drops(sparsity, count, tier.drop)
    most_rows = max(division.rows, int(math.sqrt(tier.selection_work / (partition.n * drops))))
    most_rows, most_per_row = GRADUAL_ROWS if gradual else (most_rows, division.most_per_row)
    samples = int(max(1, min(division.row_samples, available, most_rows * most_per_row)))
    rows = max(1, min(most_rows, samples, max(1, fits)))
    tuning = _tuning(named, division, budget, samples)
    if samples < FEWEST_SAMPLES and samples == available:
        choices.append(f"all {samples} samples are differentiated, as there are no more")
    compared = int(min(max(COMPARED[0], tier.compared_work * BACKWARD / facts.work), COMPARED[1]))
    per_row = math.ceil(samples / rows)
    curvature = _curvature(facts.form, samples, per_row)
    found = f"rows: {curvature.kind}, {max(1, samples // per_row)} of {samples} samples"
    choices.append(found + (" a stage" if count > 1 else ""))
    base = Recipe(
        curvature=curvature,
        weights=named.weights,
        select=GreedyOBS(drops=drops),
        recalibrate=named.recalibrate,
        choice_samples=compared,
        selection_damping=1.0 if staged else None if certify else ONE_SHOT_DAMPING,
        damping=1.0 if staged else BOUND_DAMPING if certify else ONE_SHOT_DAMPING,
    )
    plan = stages or (_stages(division, tuning, available, normalized) if staged else None)
    if gradual and plan is not None:
        plan = replace(plan, update_above=UPDATE_ABOVE)
    if stages is None and plan is not None:
        plan = _freed(plan, named, scene, facts.work)
    if staged and stages is None and fits < LEAST_SHARE * min(division.rows, samples):
        # Rows of a stage stay in memory; those of a single one may go to disk.
        plan = None
        base = Recipe(weights=named.weights, recalibrate=named.recalibrate)
        room = readable(COPIES * 4 * partition.n)
        choices.append(f"one stage without fine-tuning: a row of {partition.n:,} weights takes {room}")
    elif plan is not None:
        choices.append(_said(plan))
    elif certify and tier.tuning_work:
        choices.append("one stage without fine-tuning, as a bound holds for the model of one stage only")
    updates = [Update(scale=scale) for scale in SCALES]
    if staged or certify:
        recipes = tuple(Recipe.grid(base, update=updates))
    else:
        recipes = tuple(Recipe.grid(base, update=updates, damping=list(UPDATE_DAMPINGS)))
        tried = f"{len(UPDATE_DAMPINGS)} dampings of the update and {len(SCALES)} lengths of its step"
        choices.append(f"{tried}: the best on {compared} samples set aside")
    if gradual:
        recipes = (replace(base, update=None, selection_damping=GRADUAL_DAMPING), *recipes)
    return _changed(Resolved(recipes=recipes, stages=plan, choices=tuple(choices)), named, scene)


def _division(
    tier: Tier, scene: Scene, facts: Facts, budget: int | None, choices: list[str], *, narrows: bool
) -> Division:
    """Divide the gradients of a run among rows and fine-tuning, and those among stages; tell `choices`."""
    staged = not scene.certify and (tier.tuning_work > 0.0 or scene.stages is not None)
    tuned = staged and scene.stages is None
    row_samples, tuning = _samples(tier, facts, budget, tuned=tuned)
    count, gradual = 1, False
    if scene.stages is not None:
        count = scene.stages.count
    elif tier.kept and staged:
        # Rows of many stages are few beside it.
        spent = tuning if budget is None else budget
        most = spent / max(STAGE_SAMPLES, STAGE_SHARE * scene.partition.n)
        count, gradual = _counted(scene.sparsity, tier.kept, most, scene.pattern)
    a_pass = UNKNOWN if facts.samples is None else facts.samples
    short = tuning < a_pass
    whole = tuning if budget is None else max(tuning, budget)
    few = whole <= SHARP_PASSES * a_pass if gradual else tuning < SHARP_PASSES * a_pass
    learnt = cache(partial(_learnt, scene))
    one = few or narrows if not gradual else few and (narrows or learnt())
    if scene.stages is None and one:
        # What is little is not to be shared with a stage in between, nor where a set can narrow instead:
        # ResNet20 at .9, four stages with 300 000 samples ended at 88.2, one with 200 000 at 88.9; a residual
        # network on digits at .95, two sharp stages with 18 000 at 94.8, one at 98.0. Nor where outputs can
        # be matched: at .8, three with 203 000 at 90.1, one by outputs with 130 000 at 90.5.
        count, gradual = 1, False
    found = Division(
        row_samples=row_samples / count,
        rows=tier.tuned_rows if tuned else tier.rows,
        tuning=tuning,
        count=count,
        gradual=gradual,
        staged=staged,
        most_per_row=tier.most_per_row,
    )
    if not staged or scene.stages is not None or gradual:
        return found
    left = tuning if budget is None else max(tuning, budget - min(row_samples, a_pass))
    if left >= LEAST_STEPS * BATCHES[0] and learnt():
        # Each sample then takes a forward pass of the network before pruning as well. Few steps stay as many:
        # ResNet20 at .9 ends at 81.9 % with 57 of them, at 84.5 with 77.
        least = min(tuning, MATCHED_STEPS * BATCHES[1])
        return replace(found, matching=True, tuning=max(least, tuning / MATCHED_WORK))
    if not short or (harm := _harm(scene)) > LITTLE:
        return found
    # Less than a pass over the data repairs damage, if there is some.
    choices.append(
        f"without its smallest weights the network is {harm:.1%} of the way to none at all: little to "
        "repair, so that rows take the place of fine-tuning"
    )
    alone, _ = _samples(tier, facts, budget, tuned=False)
    return replace(
        found,
        row_samples=min(alone + ROWS_FOR_TUNING * tuning, math.inf if budget is None else budget),
        rows=tier.rows,
        tuning=0.0,
        staged=False,
        most_per_row=2 * tier.most_per_row,
    )


def _budget(named: Named, facts: Facts, choices: list[str]) -> int | None:
    """Return the gradients that the caller allows, None where nothing is said, and tell `choices`."""
    budget = named.samples
    if named.seconds is not None:
        assert facts.seconds is not None
        budget = max(1, int(named.seconds / facts.seconds))
        choices.append(f"{named.seconds:g} s are some {budget} gradients")
    if budget is not None and budget < FEWEST_SAMPLES:
        choices.append(f"a budget of {budget} gradients makes a poor model: {FEWEST_SAMPLES} are few")
    return budget


def _samples(tier: Tier, facts: Facts, budget: int | None, *, tuned: bool) -> tuple[float, float]:
    """Return the samples of the rows of all stages, and those of all fine-tuning, if there is some."""
    rows = float(max(FEWEST_SAMPLES, int((tier.tuned_row_work if tuned else tier.row_work) / facts.work)))
    a_pass = UNKNOWN if facts.samples is None else facts.samples
    tuning = min(max(FEWEST_SAMPLES, tier.tuning_work / (facts.work + OVERHEAD)), tier.passes * a_pass)
    share = 1.0 if budget is None else budget / (rows + tuning)
    return rows * share, tuning * share


def _tuning(named: Named, division: Division, budget: int | None, samples: int) -> float:
    """Return the samples of all fine-tuning: at least what a budget leaves beside `samples` for rows."""
    if budget is None or not division.staged:
        return division.tuning
    left = float(budget - samples * division.count)
    if named.seconds is not None and division.matching:
        left /= MATCHED_WORK
    return max(division.tuning, left)


def _harm(scene: Scene) -> float:
    """Return what pruning by magnitude costs, as a share of the way to the loss without weights."""
    weights = scene.partition.flatten(scene.model).double()
    keep = without_lowest(weights.abs(), round(scene.sparsity * scene.partition.n))
    dense, pruned, none = _losses(scene, _probe(scene), (weights, weights * keep, 0.0 * weights))
    share = (pruned - dense) / (none - dense) if none > dense else math.inf
    return math.inf if math.isnan(share) else share


def _learnt(scene: Scene) -> bool:
    """Whether a network has learnt the labels of its data, so that its outputs say more than they do.

    Of losses that count every sample alike, by outputs that are a tensor, in a form that is known; not where
    too little is kept for outputs to be met.
    """
    objective = scene.objective
    if objective.output_hessian is None or 1.0 - scene.sparsity < MATCHED_SHARE:
        return False
    sample, run = _probe(scene), partial(forward, scene.model)
    if any(objective.weights(objective.prepared(batch), run) is not None for batch in sample):
        return False
    weights = scene.partition.flatten(scene.model).double()
    dense, none = _losses(scene, sample, (weights, 0.0 * weights))
    return math.isfinite(none) and dense <= LEARNT * none


def _probe(scene: Scene) -> Sample:
    """Return a few samples of the data."""
    return draw_sample(scene.model, scene.data, PROBED, seed=0)


def _losses(scene: Scene, sample: Sample, tries: Iterable[Tensor]) -> list[float]:
    """Return the loss on a sample of each of several flat weights (n,)."""
    networks = (TrialNetwork(scene.model, scene.partition, weights) for weights in tries)
    return [evaluate(network, sample, scene.objective).loss for network in networks]


def _facts(scene: Scene, *, timed: bool) -> Facts:
    model, data, objective, partition = scene.model, scene.data, scene.objective, scene.partition
    require_evaluation_mode(model)
    function = NetworkFunction(model, partition, objective)
    with kept(model), plain_attention():
        batches = read(data, max_samples=PEEKED, seed=0)
        head = next(batches)
        first, _ = peeked(chain([head], batches), PEEKED)
        few = first.take(slice(PEEKED)).to(device_of(model))
        function.settle(few)
        counter = OperationCounter()
        with counter, torch.no_grad():
            objective.output(partial(forward, model), objective.prepared(few))
        # What has no products at all still reads its weights.
        forward_work = max(counter.total / few.size, 2.0 * partition.n / few.size, 1.0)
        seconds = _seconds(function, partition, few) if timed else None
    samples = _sample_count(data, head.size)
    return Facts(
        form=objective.output_hessian, work=BACKWARD * forward_work, samples=samples, seconds=seconds
    )


def _seconds(function: NetworkFunction, partition: Partition, batch: Batch) -> float:
    """Return the time of the gradient of one sample, the better of two tries on a few."""
    tries = []
    for _ in range(2):
        total = torch.zeros(partition.n, dtype=function.dtype, device=function.device)
        began = time.perf_counter()
        add_gradient(total, function, partition, batch)
        float(total[0])  # waits for a device
        tries.append(time.perf_counter() - began)
    return min(tries) / batch.size


def _sample_count(data: Any, batch: int) -> int | None:
    """Return how many samples the data have, as far as they, their data set or their first batch tell."""
    count = sample_count(data)
    if count is not None:
        return count
    if isinstance(getattr(data, "dataset", None), Sized):
        return len(data.dataset)
    return len(data) * batch if isinstance(data, Sized) else None


def _curvature(form: str | None, samples: int, per_row: int) -> Fisher:
    if form is None:
        return EmpiricalFisher(samples=samples, per_row=per_row)
    return SketchedFisher(samples=samples, per_row=per_row)


def _counted(sparsity: float, kept_share: float, most: float, pattern: NofM | None) -> tuple[int, bool]:
    """Return how many stages there are, and whether they are gradual.

    They are where none keeps less than `GRADUAL_SHARE` of the weights, if samples suffice: for `most` stages.
    Of a pattern each stage takes at least one more of every m weights.
    """
    most = most if pattern is None else min(most, pattern.m - pattern.n)
    count = min(_stage_count(sparsity, kept_share), int(most))
    if count > 1 and _stage_count(sparsity, GRADUAL_SHARE) <= count:
        return count, True
    return _stage_count(sparsity, SHARP_SHARE), False


def _stage_count(sparsity: float, kept_share: float) -> int:
    """Return the fewest stages of which none keeps less than a share of the weights."""
    return max(1, math.ceil(math.log1p(-sparsity) / math.log(kept_share) - 1e-9))


def _drops(sparsity: float, stages: int, share: float) -> int:
    """Return the drops of a stage of which each keeps about a share of the weights."""
    return max(1, math.ceil(math.log1p(-sparsity) / stages / math.log(share) - 1e-9))


def _stages(division: Division, tuning: float, available: float, batch_statistics: bool) -> Stages:
    """Return stages with so many samples of fine-tuning, by `batch_statistics` after a single one."""
    count, gradual, matching = division.count, division.gradual, division.matching
    share = 1.0 if count == 1 else FINAL_SHARE if gradual else SHARP_FINAL_SHARE
    each = int(tuning if count == 1 else (1.0 - share) * tuning / (count - 1))
    final = int(share * tuning)
    size = int(
        min(max(BATCHES[0], 2 ** round(math.log2(max(1, each / STEPS)))), BATCHES[1], max(1, available))
    )
    enough = final >= LEAST_STEPS * size
    record = FineTuning(
        samples=max(1, each),
        final_samples=max(1, final),
        batch_size=size,
        rest=not gradual,
        batch_statistics=batch_statistics and count == 1,
        matching=matching,
    )
    if record.batch_statistics:
        record = replace(record, momentum_rates=(MATCHED_RATE if matching else FAR_RATE,))
    elif record.rest and not probe_samples(record, final):
        record = replace(record, momentum_rates=(MATCHED_BLIND_RATE if matching else BLIND_RATE,))
    return Stages(count=count, updates=1, final_updates=0, fine_tuning=record if enough else None)


def _freed(plan: Stages, named: Named, scene: Scene, work: float) -> Stages:
    """Return stages in whose fine-tuning vectors move, and a set narrows where little is kept.

    Where each batch is normalised by itself, and the products with it are little beside the `work` of
    gradients, its steps have the metric of what layers are fed.
    """
    tuning = plan.fine_tuning
    if tuning is None:
        return plan
    free = tuning.batch_statistics or not has_statistics(scene.model)
    steps = (tuning.final_samples or 0) / tuning.batch_size
    surplus = _surplus(scene, steps) if tuning.batch_statistics else 1.0
    products = 2.0 * sum((span.stop - span.start) * span.fan_in for span in scene.partition.parameters)
    metric = tuning.batch_statistics and products <= METRIC_SHARE * work * tuning.batch_size
    record = replace(tuning, vectors=named.vectors and free, surplus=surplus, input_metric=metric)
    return replace(plan, fine_tuning=record)


def _surplus(scene: Scene, steps: float) -> float:
    """Return how many times as many weights as asked for a set begins with that narrows over so many steps.

    `SURPLUS` to the power of the root of what they are of the steps that are enough for so many.
    """
    return round(SURPLUS ** math.sqrt(min(1.0, steps / NARROWING_STEPS)), 2) if _may_narrow(scene) else 1.0


def _may_narrow(scene: Scene) -> bool:
    """Whether so little is kept, of a count, that a set may narrow by name."""
    return scene.pattern is None and 1.0 - scene.sparsity <= NARROWING_SHARE


def _said(plan: Stages) -> str:
    stages = "one stage" if plan.count == 1 else f"{plan.count} stages"
    if plan.fine_tuning is None:
        return stages
    record = plan.fine_tuning
    between = f"{record.samples} after each and " if plan.count > 1 else ""
    found = f"{stages}, fine-tuned on {between}{record.final_samples} samples at the end"
    found += ", by its outputs before pruning, as it has learnt the labels" if record.matching else ""
    found += ", biases and norms with the weights" if record.vectors else ""
    if record.surplus > 1.0:
        found += f", from {record.surplus:g} times as many weights on"
    if not record.batch_statistics:
        return found
    metric = " in the metric of what layers are fed" if record.input_metric else ""
    return f"{found},{metric} with each batch normalised by itself if far from rest"


def _changed(found: Resolved, named: Named, scene: Scene) -> Resolved:
    """Return the recipe with the fields that the caller set."""
    if not named.changes:
        return found
    request = named.changed(
        Request(sparsity=scene.sparsity, pattern=scene.pattern, recipes=found.recipes, stages=found.stages)
    )
    choices = (*found.choices, f"set by the caller: {', '.join(named.changes)}")
    different = tuple(
        recipe for at, recipe in enumerate(request.recipes) if recipe not in request.recipes[:at]
    )
    return replace(found, recipes=different, stages=request.stages, choices=choices)
