"""Stochastic gradient steps on the kept weights, at a learning rate that the run finds for itself.

A quadratic model is worth its rows where a step is long: in the choice of the set, and in the move that comes
with it. What remains to be gained is cheaper by many short steps, each with fresh samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import add_gradient
from cbs_opt.curvature.gradients import NetworkFunction
from cbs_opt.network.data import Batch
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.recipe.records import FineTuning
from cbs_opt.stages.model import StageModel

MOMENTUM = 0.9
WARM_UP = 0.05
"""Share of the steps over which the rate rises, before it falls like a cosine."""
TRIAL_SHARE = 0.1
"""Of the samples of a fine-tuning for each rate that is tried."""
NEWTON_STEP = 0.1
"""Of a Newton step at each step: with momentum they add up to a whole one."""
RETREAT = 3.0
"""What a rate that did not lower the loss is divided by, for the next time."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A learning rate by the scale of the problem, so that it means the same for every network.

    `kind`: "momentum" for Nesterov's method, at `value` over the largest eigenvalue of the Fisher matrix,
    stable up to ``2 (1 + MOMENTUM)``; "adam" for Adam, at `value` times the root mean square of the kept
    weights, the share by which a step changes them.
    """

    kind: str
    value: float

    def absolute(self, curvature: float, weights: Tensor) -> float:
        """Return the rate for a largest eigenvalue `curvature` and kept `weights`."""
        if self.kind == "adam":
            return self.value * float(weights.square().mean().sqrt())
        if self.kind == "newton":
            return NEWTON_STEP
        return self.value / curvature


def rates(plan: FineTuning) -> list[Rate]:
    """Return the rates that the first fine-tuning of a run tries."""
    pairs = (("momentum", plan.momentum_rates), ("newton", plan.newton_dampings), ("adam", plan.adam_rates))
    return [Rate(kind=kind, value=value) for kind, values in pairs for value in values]


class Descent:
    """The kept weights of a network on their way down.

    `weights` (n,) float64 with zeros where not `keep` (n,) bool; `rate` is absolute, for steps of `kind`.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: Partition,
        objective: Objective,
        *,
        weights: Tensor,
        keep: Tensor,
        kind: str,
        rate: float,
        precondition: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._network = model, partition, objective
        self._keep = keep
        self._flat = weights.to(self._function(weights).dtype)
        self._theta = self._flat[keep].requires_grad_()
        self._rate = rate
        self._precondition = precondition
        self._optimizer: torch.optim.Optimizer = (
            torch.optim.Adam([self._theta], lr=rate)
            if kind == "adam"
            else torch.optim.SGD([self._theta], lr=rate, momentum=MOMENTUM, nesterov=True)
        )

    @property
    def weights(self) -> Tensor:
        """All weights, (n,) float64."""
        result = torch.zeros_like(self._flat, dtype=torch.float64)
        result[self._keep] = self._theta.detach().double()
        return result

    def run(
        self, batches: Iterator[Batch], *, samples: int, batch_size: int, advance: Callable[[int], None]
    ) -> int:
        """Take steps over so many samples, less if weights run away; return how many were differentiated.

        The rate rises, then falls to nothing at the end. `advance` is told of the samples of every batch.
        """
        used = 0
        while used < samples and bool(torch.isfinite(self._theta.detach()).all()):
            size = min(batch_size, samples - used)
            used += self._step(batches, size, self._rate * _schedule(used / samples), advance)
        return used

    def _function(self, weights: Tensor) -> NetworkFunction:
        model, partition, objective = self._network
        return NetworkFunction(model, partition, objective, weights)

    def _step(self, batches: Iterator[Batch], size: int, rate: float, advance: Callable[[int], None]) -> int:
        """Take one step by the gradient over `size` samples at least; return how many they were."""
        _, partition, objective = self._network
        self._flat[self._keep] = self._theta.detach()
        function = self._function(self._flat)
        total = torch.zeros_like(self._flat)
        used, mass = 0, 0.0
        while used < size:
            batch = next(batches)
            function.settle(batch)
            mass += add_gradient(total, function, partition, batch)
            used += batch.size
            advance(batch.size)
            if objective.in_batches:
                break
        if mass > 0.0:
            gradient = total[self._keep].div_(mass)
            self._theta.grad = gradient if self._precondition is None else self._precondition(gradient)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            self._optimizer.step()
        return used


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuned:
    """What stochastic steps came to.

    `weights` (n,) float64 are the best that were met, `loss` theirs on the samples set aside and `loss_before`
    that of the start. `rate` is the one to go on with, `absolute_rate` what the last steps began at. `samples`
    were differentiated, for `tried` rates.
    """

    weights: Tensor
    loss: float
    loss_before: float
    rate: Rate
    absolute_rate: float
    samples: int
    tried: int


@dataclass(frozen=True, kw_only=True, eq=False)
class FineTuner:
    """Stochastic steps of one network on the weights of `keep` (n,), over the samples of `batches`."""

    model: nn.Module
    partition: Partition
    objective: Objective
    plan: FineTuning
    keep: Tensor
    batches: Iterator[Batch]

    def best(
        self,
        weights: Tensor,
        *,
        model: StageModel,
        rate: Rate | None,
        samples: int,
        loss: Callable[[Tensor], float],
        advance: Callable[[int], None],
    ) -> FineTuned:
        """Go down from `weights` (n,) float64 at `rate`, or at the best of those of the plan.

        `curvature` is the largest eigenvalue of the Fisher matrix, `loss` that on samples set aside. A network
        that is not better than the one before is not taken, and the rate for the next time is lower.
        """
        curvature = largest_eigenvalue(model.rows)
        before = value = _ordered(loss(weights))
        best, used = weights, 0
        tries = rates(self.plan)
        if len(tries) > 1:
            share = max(1, int(TRIAL_SHARE * samples))
            found = []
            for entry in tries:
                moved, count = self._moved(weights, entry, model, curvature, share, advance)
                used += count
                found.append((_ordered(loss(moved)), moved))
            first = min(range(len(tries)), key=lambda number: found[number][0])
            tries = [tries[first]]
            if found[first][0] < value:
                value, best = found[first]
        (chosen,) = tries
        moved, count = self._moved(best, chosen, model, curvature, max(1, samples - used), advance)
        used += count
        after = _ordered(loss(moved))
        following = chosen
        if after < value:
            value, best = after, moved
        else:
            following = replace(chosen, value=chosen.value / RETREAT)
        return FineTuned(
            weights=best,
            loss=value,
            loss_before=before,
            rate=following,
            absolute_rate=chosen.absolute(curvature, weights[self.keep]),
            samples=used,
            tried=1 if rate is not None else len(rates(self.plan)),
        )

    def _moved(
        self,
        weights: Tensor,
        rate: Rate,
        model: StageModel,
        curvature: float,
        samples: int,
        advance: Callable[[int], None],
    ) -> tuple[Tensor, int]:
        """Return where steps over so many samples lead to, and how many samples were differentiated."""
        descent = Descent(
            self.model,
            self.partition,
            self.objective,
            weights=weights,
            keep=self.keep,
            kind=rate.kind,
            rate=rate.absolute(curvature, weights[self.keep]),
            precondition=model.solver(rate.value * curvature) if rate.kind == "newton" else None,
        )
        used = descent.run(self.batches, samples=samples, batch_size=self.plan.batch_size, advance=advance)
        return descent.weights, used


def _ordered(loss: float) -> float:
    """Return a loss, NaN as worse than anything."""
    return math.inf if math.isnan(loss) else loss


def _schedule(time: float) -> float:
    """Return the share of the rate at `time` in [0, 1): a short rise, then a cosine down to 0."""
    if time < WARM_UP:
        return 0.1 + 0.9 * time / WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (time - WARM_UP) / (1.0 - WARM_UP)))


def largest_eigenvalue(rows: Tensor) -> float:
    """Return the largest eigenvalue of ``rows^T rows``, of rows (m, n), by their Gram matrix."""
    gram = (rows @ rows.mT).double()
    return float(torch.linalg.eigvalsh(gram)[-1])
