"""Stochastic gradient steps on the kept weights, at a learning rate that the run finds for itself.

A quadratic model is worth its rows where a step is long: in the choice of the set, and in the move that comes
with it. What remains to be gained is cheaper by many short steps, each with fresh samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import add_gradient
from cbs_opt.curvature.gradients import NetworkFunction
from cbs_opt.network.batchnorm import batch_statistics
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.records import FineTuning
from cbs_opt.stages.input_metric import InputMetric
from cbs_opt.stages.largest_curvature import largest_curvature
from cbs_opt.stages.model import StageModel
from cbs_opt.stages.optimizers import Adam, Nesterov, Optimizer

WARM_UP = 0.05
"""Share of the steps of a stage over which the rate rises."""
TRIAL_SHARE = 0.15
"""Of the samples of all fine-tuning for the rates that are tried."""
TRIAL_MOST = 0.8
"""Of the samples of the first fine-tuning for them at most."""
TRIAL_STEPS = 50
"""Steps of a rate below which nothing is tried: the first rate is taken."""
PROBE_SHARE = 0.05
"""Of the samples of a fine-tuning that comes to rest, for each rate until one gains."""
PROBES = 5
"""Rates of which that is found out at most."""
PROBE_STEPS = 20
"""Steps of a probe below which there is none."""
WATCHED = 0.15
"""Share of the steps after which a rate that could not be tried is given up, if the network has run away."""
NEWTON_STEP = 0.1
"""Of a Newton step at each step: with momentum they add up to a whole one."""
STEP = 3.0
"""Between a rate and the next shorter one."""
RUN_AWAY = 0.25
"""Share of the way to the loss without any weight from which on a network counts as run away."""
FEWEST_NORMALIZED = 8
"""Samples of a batch below which batch normalisation does not go by their statistics."""
NARROWING = 2 / 3
"""Share of the steps over which a set narrows."""
NARROWINGS = 50
"""Times that it does."""
FORGETTING = 0.99
"""Share of the mean squares of gradients that stays at each step."""
PASSED = (0.5, 0.75, 0.9)
"""Shares of the steps after which weights are kept where every batch is normalised by itself.

Channels of next to no variance make the loss jump at single steps, by their statistics.
"""
LARGEST = 100.0
"""Norm of the weights over that at the start beyond which steps have run away, whatever the loss is."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """The part of all fine-tuning of a run that one stage has, as shares of it: the whole has 0 and 1.

    One rate falls like a cosine over the whole; until its end a network is as far from rest as the rate says,
    so that its loss may be above what it was. At the end it has come to rest, and must have gained.
    """

    begin: float = 0.0
    end: float = 1.0

    def rate(self, time: float) -> float:
        """Return the share of the rate at `time` in [0, 1) of this part, which begins with a short rise."""
        place = self.begin + time * (self.end - self.begin)
        falling = 0.5 * (1.0 + math.cos(math.pi * place))
        return falling * min(1.0, 0.1 + 0.9 * time / WARM_UP)

    def takes(self, after: float, before: float, without: float) -> bool:
        """Whether a network of one loss is to follow one of another, where there is one `without` weights."""
        return after < before + (0.0 if self.end == 1.0 else RUN_AWAY * max(0.0, without - before))


WHOLE = Span()
BEGUN = Span(end=0.5)
"""What is not at rest yet at its end."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How far steps of one kind go.

    `kind`: "momentum" for Nesterov's method and "adam" for Adam, with the learning rate `value`; "newton" for
    Nesterov's method with gradients times the inverse of the Fisher matrix of the stage, to which `value` is
    added. Whatever the kind, gradients are those of the loss and ``1/2 decay |w|^2`` of the kept weights w.
    """

    kind: str
    value: float
    decay: float = 0.0

    @property
    def learning_rate(self) -> float:
        """What steps are multiplied by."""
        return NEWTON_STEP if self.kind == "newton" else self.value

    def shorter(self) -> Rate:
        """Return the rate of shorter steps."""
        return replace(self, value=self.value * STEP if self.kind == "newton" else self.value / STEP)


def rates(plan: FineTuning, curvature: float, weights: Tensor, *, stretch: float = 1.0) -> list[Rate]:
    """Return the rates that the first fine-tuning of a run tries.

    They go by the scale of the problem: the largest eigenvalue of the Fisher matrix, `curvature` > 0, and the
    kept `weights`, of whose root mean square a step of Adam is a share. Those with momentum are times
    `stretch`.
    """
    size = float(weights.square().mean().sqrt())
    decay = plan.decay * curvature
    values = {
        "momentum": [stretch * rate / curvature for rate in plan.momentum_rates],
        "newton": [damping * curvature for damping in plan.newton_dampings],
        "adam": [rate * size for rate in plan.adam_rates],
    }
    return [Rate(kind=kind, value=value, decay=decay) for kind in values for value in values[kind]]


def probe_samples(plan: FineTuning, samples: int) -> int:
    """Return the samples of a probe of one rate; 0 without rest, and where steps are too few for any."""
    probe = int(PROBE_SHARE * samples)
    return probe if plan.rest and probe >= PROBE_STEPS * plan.batch_size else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Narrowing:
    """A set that narrows while steps are taken, from one sparsity to another.

    `narrow` returns what is still kept at a sparsity of what is kept, (n,) bool, by a saliency (n,).
    """

    begin: float
    end: float
    narrow: Callable[[Tensor, Tensor, float], Tensor]

    def sparsity(self, time: float) -> float:
        """Return the sparsity at `time` in [0, 1].

        The cubic of Zhu and Gupta, "To prune, or not to prune" (2017), over the first `NARROWING` of it.
        """
        left = 1.0 - min(1.0, math.floor(NARROWINGS * time / NARROWING) / NARROWINGS)
        return self.end + (self.begin - self.end) * left**3


class Descent:
    """The kept weights of a network on their way down.

    `weights` (n,) float64 with zeros where not `keep` (n,) bool. `precondition` is applied to gradients.
    `normalized` if batch normalisation normalises every batch by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        objective: Objective,
        *,
        weights: Tensor,
        keep: Tensor,
        rate: Rate,
        precondition: Callable[[Tensor], Tensor] | None = None,
        normalized: bool = False,
    ) -> None:
        self._network = model, partition, objective
        self._metric: InputMetric | None = None
        self._normalized = normalized
        self._narrowing: Narrowing | None = None
        self._passed: list[Tensor] = []
        self._sparsity = 0.0
        self._given_up = False
        self._squares: Tensor | None = None
        self._keep = keep
        self._flat = weights.to(self._function(weights).dtype, copy=True)
        self._theta = self._flat[keep]
        norm = float(torch.linalg.vector_norm(self._theta))
        self._largest = LARGEST * norm if norm > 0.0 else math.inf
        self._rate = rate
        self._precondition = precondition
        self._optimizer: Optimizer = Adam() if rate.kind == "adam" else Nesterov()

    @property
    def weights(self) -> Tensor:
        """All weights, (n,) float64."""
        result = torch.zeros_like(self._flat, dtype=torch.float64)
        result[self._keep] = self._theta.double()
        return result

    @property
    def keep(self) -> Tensor:
        """Which weights are kept, (n,) bool."""
        return self._keep

    @property
    def passed(self) -> list[Tensor]:
        """Where steps over the same set passed at `PASSED`, the last first, (n,) float64 each."""
        found = []
        for theta in reversed(self._passed):
            found.append(torch.zeros_like(self._flat, dtype=torch.float64))
            found[-1][self._keep] = theta.double()
        return found

    @property
    def sound(self) -> bool:
        """Whether the weights are finite, have not grown out of all proportion, and were not given up."""
        norm = float(torch.linalg.vector_norm(self._theta))
        return math.isfinite(norm) and norm <= self._largest and not self._given_up

    def in_metric(self, metric: InputMetric) -> None:
        """Multiply gradients of the loss, the decay of weights left as it is, by the matrix of a metric."""
        self._metric = metric

    def narrow_by(self, narrowing: Narrowing) -> None:
        """Let the set narrow in `run`: by squares of weights times root mean square gradients."""
        self._narrowing, self._sparsity = narrowing, narrowing.begin
        self._squares = torch.zeros_like(self._flat, dtype=torch.float64)

    def run(
        self,
        batches: Iterator[Batch],
        *,
        samples: int,
        batch_size: int,
        span: Span,
        advance: Callable[[int], object],
        stop: Callable[[Tensor], bool] | None = None,
    ) -> int:
        """Take steps over so many samples, less if weights run away; return how many were differentiated.

        `advance` is told of the samples of every batch. After `WATCHED` of them `stop` is asked whether to
        give up, by the weights then, (n,) float64.
        """
        used = 0
        while used < samples and self.sound:
            if stop is not None and used >= WATCHED * samples:
                self._given_up = stop(self.weights)
                if self._given_up:
                    break
                stop = None
            self._narrow(used / samples)
            size = min(batch_size, samples - used)
            used += self._step(batches, size, self._rate.learning_rate * span.rate(used / samples), advance)
            # While a set narrows what is passed is of another one.
            settled = self._narrowing is None or self._sparsity >= self._narrowing.end
            due = self._normalized and settled and len(self._passed) < len(PASSED)
            if due and used >= PASSED[len(self._passed)] * samples:
                self._passed.append(self._theta.clone())
        if self.sound:
            # A few long steps may have passed by the last times.
            self._narrow(1.0)
        return used

    def _narrow(self, time: float) -> None:
        """Let go of the weights that are no longer kept at `time` in [0, 1) of the steps."""
        plan, squares = self._narrowing, self._squares
        if plan is None or squares is None or plan.sparsity(time) <= self._sparsity:
            return
        self._sparsity = plan.sparsity(time)
        keep = plan.narrow(self._keep, self.weights.square() * squares.sqrt(), self._sparsity)
        staying = keep[self._keep]
        self._keep, self._flat = keep, torch.zeros_like(self._flat)
        self._theta = self._theta[staying]
        self._optimizer.restrict(staying)

    def _function(self, weights: Tensor) -> NetworkFunction:
        model, partition, objective = self._network
        return NetworkFunction(model, partition, objective, weights)

    def _step(
        self, batches: Iterator[Batch], size: int, rate: float, advance: Callable[[int], object]
    ) -> int:
        """Take one step by the gradient over `size` samples at least; return how many they were."""
        model, partition, objective = self._network
        self._flat[self._keep] = self._theta
        function = self._function(self._flat)
        total = torch.zeros_like(self._flat)
        used, mass = 0, 0.0
        while used < size:
            batch = next(batches)
            if not objective.in_batches and batch.size > size - used:
                batch = batch.take(slice(size - used))
            function.settle(batch)
            normalized = self._normalized and batch.size >= FEWEST_NORMALIZED
            with batch_statistics(model) if normalized else nullcontext():
                mass += add_gradient(total, function, partition, batch)
            used += batch.size
            advance(batch.size)
            if objective.in_batches:
                break
        if mass > 0.0:
            slope = total[self._keep].div_(mass)
            gradient = slope.add(self._theta, alpha=self._rate.decay)
            if self._squares is not None:
                self._squares[self._keep] = torch.lerp(
                    gradient.double().square(), self._squares[self._keep], FORGETTING
                )
            step = gradient if self._precondition is None else self._precondition(gradient)
            if self._metric is not None:
                step = self._metric(slope, self._keep).add_(self._theta, alpha=self._rate.decay)
            self._optimizer.step(self._theta, step, rate)
        return used


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuned:
    """What stochastic steps came to.

    `weights` (n,) float64 are the last that were taken, `keep` (n,) which of them are kept, `loss` theirs on
    the samples set aside and `loss_before` that of the start; `moved` where they are others. `rate` is what
    the last steps were taken at, `next_rate` the one to go on with. `samples` were differentiated, for
    `tried` rates.
    """

    weights: Tensor
    keep: Tensor
    loss: float
    loss_before: float
    moved: bool
    rate: Rate
    next_rate: Rate
    samples: int
    tried: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuner:
    """Stochastic steps of one network on the weights of `keep` (n,), over the samples of `batches`.

    `stage` is the model of the stage, `loss` that on samples set aside, and `advance` is told of samples. The
    largest curvature is that of `rows` (m, n_kept); `stretch` is that of `rates`.
    The last `beside` of the n are vectors that move with the weights and are not pruned. `normalized` if
    batch normalisation normalises every batch by itself. With a `metric` steps and curvature are of that.
    """

    model: nn.Module
    partition: Partition
    objective: Objective
    plan: FineTuning
    keep: Tensor
    batches: Iterator[Batch]
    stage: StageModel
    rows: Tensor
    loss: Callable[[Tensor], float]
    advance: Callable[[int], object]
    stretch: float = 1.0
    span: Span = WHOLE
    normalized: bool = False
    beside: int = 0
    metric: InputMetric | None = None

    def best(self, weights: Tensor, *, rate: Rate | None, samples: int) -> FineTuned:
        """Go down from `weights` (n,) float64 at `rate`; without one, at the best of those of the plan.

        Rates that are tried come to rest on a few samples each. Where the plan rests after every stage,
        shorter steps are tried in that way until some gain: the model was made before the stage took its
        weights. What `Span.takes` refuses is not taken, but for the best of what its steps have passed: the
        rest of the samples is then spent on shorter steps.
        """
        before = value = _ordered(self.loss(weights))
        best, used = weights, 0
        tries = [] if rate is None else [rate]
        if rate is None:
            tries, samples = self._tries(weights, samples)
        share = self._trial(samples, len(tries))
        tries = tries if share else tries[:1]
        chosen = tries[0]
        if share:
            losses = []
            for entry in tries:
                moved, after, count = self._moved(weights, entry, share, WHOLE)
                used += count
                losses.append(after)
                if losses[-1] < value:
                    value, best = losses[-1], moved
            chosen = tries[losses.index(min(losses))]
        probe = probe_samples(self.plan, samples)
        if probe and not share:
            tries = []
            for _ in range(PROBES):
                tries.append(chosen)
                moved, after, count = self._moved(best, chosen, probe, WHOLE)
                used += count
                if after < value:
                    value, best = after, moved
                    break
                chosen = chosen.shorter()
        untried = self.plan.rest and not share and not probe
        best, value, last, following, count = self._descended(
            best, value, chosen, samples - used, watched=untried
        )
        return FineTuned(
            weights=best,
            keep=self.keep,
            loss=value,
            loss_before=before,
            moved=best is not weights,
            rate=last,
            next_rate=following,
            samples=used + count,
            tried=len(tries),
        )

    def _descended(
        self, weights: Tensor, value: float, rate: Rate, samples: int, *, watched: bool
    ) -> tuple[Tensor, float, Rate, Rate, int]:
        """Spend samples on steps from `weights`, whose loss is `value`, shorter ones where an end is refused.

        Where they are `watched`, those after which the network has run away early on go no further. Returns
        the weights that were taken, their loss, the last rate and the next one, and what was spent.
        """
        last, following, used = rate, rate, 0
        # Where the network can be anything but run away, this says what that is.
        told = watched or self.span.end < 1.0
        without = _ordered(self.loss(self._emptied(weights))) if told else 0.0
        while used < samples:
            last = following
            descent = self._descent(weights, last)
            limit = (value, without) if watched else None
            reached, after, count = self._run(descent, samples - used, self.span, limit)
            used += count
            if not self.span.takes(after, value, without):
                following = last.shorter()
                reached, after = self._passed(descent)
            if self.span.takes(after, value, without):
                value, weights = after, reached
        return weights, value, last, following, used

    def narrowed(self, weights: Tensor, narrowing: Narrowing, *, samples: int) -> FineTuned:
        """Go down from `weights` (n,) float64 while the set narrows, at the first rate that is not too large.

        As `best`, but for what the result is compared with, as the start keeps more: with the start when what
        is too much goes by its size.
        """
        tries, samples = self._tries(weights, samples)
        chosen, before, used, tried = tries[0], _ordered(self.loss(weights)), 0, 0
        without = _ordered(self.loss(self._emptied(weights)))
        probe = probe_samples(self.plan, samples)
        for _ in range(PROBES if probe else 0):
            tried += 1
            _, after, count = self._moved(weights, chosen, probe, BEGUN)
            used += count
            if BEGUN.takes(after, before, without):
                break
            chosen = chosen.shorter()
        keep = narrowing.narrow(self.keep, weights.square(), narrowing.end)
        best = torch.where(keep, weights, 0.0)
        value = _ordered(self.loss(best))
        while used < samples:
            tried += 1
            descent = self._descent(weights, chosen)
            descent.narrow_by(narrowing)
            reached, after, count = self._run(descent, samples - used, self.span)
            used += count
            for point, loss in ((reached, after), self._passed(descent)):
                if loss < value:
                    value, best, keep = loss, point, descent.keep
            chosen = chosen if descent.sound else chosen.shorter()
        return FineTuned(
            weights=best,
            keep=keep,
            loss=value,
            loss_before=before,
            moved=True,
            rate=chosen,
            next_rate=chosen,
            samples=used,
            tried=max(1, tried),
        )

    def _tries(self, weights: Tensor, samples: int) -> tuple[list[Rate], int]:
        """Return the rates to try by the curvature that the rows see, and for how many samples."""
        curvature = largest_curvature(self.rows) if self.metric is None else self.metric.curvature
        # Without any curvature nothing that the rows see depends on the weights.
        own = self._own(weights)[self._own(self.keep)]
        found = rates(self.plan, curvature or 1.0, own, stretch=self.stretch)
        return found, samples if curvature > 0.0 else 0

    def _own(self, flat: Tensor) -> Tensor:
        """Return the part of a flat vector that belongs to weights that may be pruned, a view."""
        return flat[: len(flat) - self.beside]

    def _emptied(self, flat: Tensor) -> Tensor:
        """Return a flat vector without any weight."""
        none = flat.clone()
        self._own(none).zero_()
        return none

    def _trial(self, samples: int, tries: int) -> int:
        """Return the samples of each rate that is tried, 0 if none is."""
        whole = samples / (self.span.end - self.span.begin)
        share = int(min(TRIAL_SHARE * whole, TRIAL_MOST * samples) / tries)
        return share if tries > 1 and share >= TRIAL_STEPS * self.plan.batch_size else 0

    def _moved(self, weights: Tensor, rate: Rate, samples: int, span: Span) -> tuple[Tensor, float, int]:
        """Return where steps over so many samples lead to, its loss, and how many were differentiated."""
        return self._run(self._descent(weights, rate), samples, span)

    def _passed(self, descent: Descent) -> tuple[Tensor, float]:
        """Return the best of what steps have passed, and its loss; infinite if nothing was kept."""
        reached, loss = descent.weights, math.inf
        for weights in descent.passed:
            value = _ordered(self.loss(weights))
            if value < loss:
                reached, loss = weights, value
        return reached, loss

    def _run(
        self, descent: Descent, samples: int, span: Span, limit: tuple[float, float] | None = None
    ) -> tuple[Tensor, float, int]:
        """Take steps over so many samples; return the weights then, their loss, and how many they were.

        The loss is infinite where steps ran away: a dead network can have a low one. With a `limit`, the
        losses of the start and without any weight, they end early if they do.
        """

        def away(weights: Tensor) -> bool:
            return limit is not None and not BEGUN.takes(_ordered(self.loss(weights)), *limit)

        used = descent.run(
            self.batches,
            samples=samples,
            batch_size=self.plan.batch_size,
            span=span,
            advance=self.advance,
            stop=None if limit is None else away,
        )
        reached = descent.weights
        return reached, _ordered(self.loss(reached)) if descent.sound else math.inf, used

    def _descent(self, weights: Tensor, rate: Rate) -> Descent:
        descent = Descent(
            self.model,
            self.partition,
            self.objective,
            weights=weights,
            keep=self.keep,
            rate=rate,
            precondition=self.stage.solver(rate.value) if rate.kind == "newton" else None,
            normalized=self.normalized,
        )
        if self.metric is not None:
            descent.in_metric(self.metric)
        return descent


def _ordered(loss: float) -> float:
    """Return a loss, NaN as worse than anything."""
    return math.inf if math.isnan(loss) else loss
