"""Both relaxations where ``H = R^T R + C + damping I`` with C block-diagonal over channels: any size.

The split is made channel by channel (`channel_splits`), so that nothing larger than a channel is factorised.
ADMM solves the relaxation in the metric ``D + sigma diag(C)``, in which the quadratic step is a solve with
``H + sigma diag(C)``: its factors (`channel_system`) do not depend on the split, which can change between any
two steps. The search is in single precision; what it finds is a certificate, recomputed in float64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from formulations.errors import NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool
from formulations.loss import solved_weights
from formulations.problem import SMALLEST, BlockProblem, BoolArray, FloatArray
from formulations.relaxations.capped_simplex import CappedSimplexCertificate, round_selection
from formulations.relaxations.capped_simplex_kernels import project_simplices, smallest_sum
from formulations.relaxations.channel_splits import ChannelSplits
from formulations.relaxations.channel_system import ShiftedChannels
from formulations.relaxations.first_order import OVER_RELAXATION, StopRule
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.group_norm import shrink_groups
from formulations.relaxations.perspective import PerspectiveCertificate, round_joint
from formulations.relaxations.support_norm import held_sum
from formulations.solution import Subject
from formulations.support import Groups, as_cells

SIGMA = 0.1
"""What is added to the diagonal of C in the metric of ADMM, relative to that diagonal."""
STEPS_A_ROUND = 8
"""ADMM steps between two changes of the split."""
ROUNDS = 24
"""Changes of the split at most."""
ROUND_GAIN, ROUND_PATIENCE = 0.01, 3
"""Share of the open gap that a round has to close, and idle rounds in a row that end the changes."""
LAST_STEPS = 120
LAST_GAIN, LAST_PATIENCE = 2e-3, 3
"""The same for the `STEPS_A_ROUND` steps with the last split, of which there are so many at most."""
OPEN_SHARE = 0.3
"""What is taken for open, relative to the bound, where no set is known."""
LEAST_METRIC = 1e-12
ROOTS = 40
"""Newton and bisection steps on a multiplier."""
ChannelCertificate = PerspectiveCertificate | CappedSimplexCertificate


class ChannelProgram(Protocol):
    """One of the programs in the variables that H multiplies: ``1/2 x.Q x - linear.x + phi(x)``."""

    linear: FloatArray

    def shrink(self, target: FloatArray, split: FloatArray, metric: FloatArray) -> FloatArray:
        """Return the minimiser of ``phi(x) + 1/2 (x - target).metric (x - target)``; keep its shares."""
        ...

    def bound(self, point: FloatArray, product: FloatArray, split: FloatArray) -> float:
        """Return what a point proves, in units of the loss; `product` = ``Q point``."""
        ...

    def slopes(self, shrunk: FloatArray) -> FloatArray:
        """Return the supergradient of the bound in the split, (n,), at the last result of `shrink`."""
        ...

    def rounded(self, point: FloatArray, product: FloatArray, split: FloatArray) -> BoolArray:
        """Return the kept set that a point suggests."""
        ...

    def certificate(self, point: FloatArray, split: FloatArray) -> ChannelCertificate:
        """Return the certificate of a point and a split."""
        ...


class JointChannels:
    """The joint program in the new weights u: ``phi`` is the perspective of ``1/2 u.D u``."""

    def __init__(self, problem: BlockProblem) -> None:
        self.problem = problem
        self.linear = problem.linear_term()
        self._constant = problem.constant_term()
        support = problem.sets
        self._groups = support if isinstance(support, Groups) else None
        self._size = support.kept(problem.n)
        cells = as_cells(self._size, support.n_units(problem.n))
        self._start, self._quota = cells.start, cells.quota.astype(np.float64)
        self._cell = np.repeat(np.arange(cells.quota.size), np.diff(cells.start))
        self._rate = np.zeros(cells.quota.size)
        self._shares = np.zeros(problem.n)

    @property
    def scaled_metric(self) -> bool:
        """Whether the proximal map is known in the metric of the split alone."""
        return self._groups is not None

    def shrink(self, target: FloatArray, split: FloatArray, metric: FloatArray) -> FloatArray:
        """Minimise over the shares z too: ``u = metric v z / (D + metric z)``, one multiplier a cell."""
        if self._groups is not None:
            root = np.sqrt(split)
            image, shares = shrink_groups(target * root, self._groups, 1.0)
            self._shares = self._groups.spread(shares)
            return np.asarray(image / root)
        slope, offset = np.abs(target) * np.sqrt(split), split / metric
        z = self._shares = self._filled(slope, offset)
        return np.asarray(target * (z / (offset + z)))

    def _filled(self, slope: FloatArray, offset: FloatArray) -> FloatArray:
        """Return ``clip(rate slope - offset, 0, 1)``, the rate of each cell such that it sums to its quota.

        The sum is increasing and piecewise linear in the rate: Newton steps inside a bracket, from the rates
        of the call before.
        """
        cell, count = self._cell, self._quota.size
        tiny = np.finfo(np.float64).tiny
        low = np.zeros(count)
        high = np.full(count, np.inf)
        rate = np.where(self._rate > 0.0, self._rate, 1.0 / max(float(slope.max(initial=0.0)), tiny))
        z = slope
        for _ in range(ROOTS):
            raw = rate[cell] * slope - offset
            z = np.clip(raw, 0.0, 1.0)
            excess = np.bincount(cell, z, count) - self._quota
            if bool((np.abs(excess) <= 1e-9 * np.maximum(self._quota, 1.0)).all()):
                break
            low, high = np.where(excess < 0.0, rate, low), np.where(excess > 0.0, rate, high)
            grown = np.bincount(cell, np.where((raw > 0.0) & (raw < 1.0), slope, 0.0), count)
            newton = rate - excess / np.maximum(grown, tiny)
            middle = np.where(np.isfinite(high), 0.5 * (low + high), 2.0 * rate)
            inside = (newton > low) & (newton < high) & (newton < 1e3 * rate)
            rate = np.minimum(np.where(inside, newton, middle), 1e300)
        self._rate = rate
        return np.asarray(z)

    def bound(self, point: FloatArray, product: FloatArray, split: FloatArray) -> float:
        """``constant - 1/2 u.Q u - 1/2 (largest sum of h^2 / D that the support can hold)``."""
        square = self.problem.sets.folded((self.linear - product) ** 2 / split)
        return self._constant - 0.5 * float(point @ product) - 0.5 * held_sum(square, self._size)

    def slopes(self, shrunk: FloatArray) -> FloatArray:
        """``1/2 u^2 (1 / z - 1)``."""
        shares = self._shares
        rest = np.divide(1.0, shares, out=np.ones(shares.size), where=shares > 1e-12) - 1.0
        return np.asarray(0.5 * shrunk * shrunk * np.maximum(rest, 0.0))

    def rounded(self, point: FloatArray, product: FloatArray, split: FloatArray) -> BoolArray:
        """Return the set of the largest terms of the bound."""
        residual = (self.linear - product) / np.sqrt(split)
        return round_joint(residual, self.problem.n_keep, self.problem.support)

    def certificate(self, point: FloatArray, split: FloatArray) -> PerspectiveCertificate:
        """Return the certificate of a point and a split."""
        shape = asdict(fisher_shape(self.problem, rank=False))
        subject = Subject.of(self.problem, "joint")
        return PerspectiveCertificate(subject=subject, point=point, split=split, **shape)


class SelectionChannels:
    """The selection program in ``x = w y``, y in the capped simplex, after the shift ``D w^2``."""

    scaled_metric = False

    def __init__(self, problem: BlockProblem) -> None:
        self.problem = problem
        self.linear = np.zeros(problem.n)
        self._support = problem.sets
        self._square = problem.weights**2
        self._count = self._support.pruned(problem.n)
        self._y = np.zeros(problem.n)

    def _cost(self, split: FloatArray) -> FloatArray:
        return 0.5 * split * self._square - self.problem.gradient_or_zero * self.problem.weights

    def shrink(self, target: FloatArray, split: FloatArray, metric: FloatArray) -> FloatArray:
        """Project onto the capped simplex in the metric, its linear term first."""
        fold, w = self._support.folded, self.problem.weights
        heavy = metric * self._square
        units = fold(heavy)
        units = np.maximum(units, 1e-9 * float(units.max(initial=0.0)) or 1.0)
        wanted = fold(metric * w * target - self._cost(split)) / units
        image = np.empty(units.size)
        project_simplices(wanted, units, self._count, image)
        self._y = self._support.spread(image)
        return np.asarray(w * self._y)

    def bound(self, point: FloatArray, product: FloatArray, split: FloatArray) -> float:
        """``-1/2 x.Q x + (smallest sum of w (Q x) + cost over what the support can prune)``."""
        slope = self._support.folded(self.problem.weights * product + self._cost(split))
        return -0.5 * float(point @ product) + float(smallest_sum(slope, self._count))

    def slopes(self, shrunk: FloatArray) -> FloatArray:
        """``1/2 w^2 (y - y^2)``."""
        return np.asarray(0.5 * self._square * np.maximum(self._y - self._y**2, 0.0))

    def rounded(self, point: FloatArray, product: FloatArray, split: FloatArray) -> BoolArray:
        """Return the set of the projected point."""
        return round_selection(self._y, self.problem.n_prune, self.problem.support)

    def certificate(self, point: FloatArray, split: FloatArray) -> CappedSimplexCertificate:
        """Return the certificate of a point and a split."""
        w = self.problem.weights
        used = self._square >= SMALLEST
        shift = np.where(used, split * self._square * (1.0 - 1e-12), 0.0)
        y = np.divide(point, w, out=self._y.copy(), where=used)
        shape = asdict(fisher_shape(self.problem, rank=False))
        subject = Subject.of(self.problem, "selection")
        return CappedSimplexCertificate(subject=subject, point=y, shift=shift, **shape)


@dataclass
class _Iterate:
    """Where ADMM stands: the shrunk point and the multiplier, which is in units of ``Q x``."""

    shrunk: FloatArray
    multiplier: FloatArray


@dataclass
class _Best:
    """The best bound, as single precision has it, and what proves it."""

    bound: float
    point: FloatArray
    split: FloatArray


def relax_by_channels(
    problem: BlockProblem, pool: IncumbentPool, stop: StopRule, *, improve_split: bool = True
) -> tuple[ChannelCertificate, BoolArray]:
    """Return the certificate of the relaxation and the set it rounds to, the split made channel by channel.

    Parameters
    ----------
    problem : BlockProblem
        With channels, and more than one set.
    pool : IncumbentPool
        Its program and its best set, where ADMM starts; rounded points are offered to it.
    stop : StopRule
        Its cutoff and time limit are kept to; its steps are those of ADMM.
    improve_split : bool
        Whether to leave the split that the damping gives.

    Raises
    ------
    NotPositiveDefiniteError
        If the program is joint and a channel, damped, is singular: there is no positive split then.
    """
    joint = pool.program == "joint"
    program: JointChannels | SelectionChannels
    program = JointChannels(problem) if joint else SelectionChannels(problem)
    splits = ChannelSplits(problem)
    if joint and not splits.feasible:
        found = f"{problem.damping:g} with a channel that is singular, so that there is no split"
        raise NotPositiveDefiniteError("damping", found, "use damping > 0")
    system = ShiftedChannels(problem, 0.0 if program.scaled_metric else SIGMA)
    state = _first_iterate(problem, program, splits.value, pool)
    best = _Best(-math.inf, state.shrunk, splits.value.copy())
    _steps(program, system, splits.value, state, best, stop)
    idle, rounds = 0, ROUNDS if improve_split and splits.feasible else 0
    for _ in range(rounds):
        if best.bound >= stop.cutoff or idle >= ROUND_PATIENCE or _ended(stop):
            break
        before, gap = best.bound, _open(best.bound, stop.cutoff)
        splits.improve(program.slopes(state.shrunk), gap, stop.out_of_time)
        _steps(program, system, splits.value, state, best, stop)
        idle = idle + 1 if best.bound - before < ROUND_GAIN * gap else 0
    idle = 0
    for _ in range(LAST_STEPS // STEPS_A_ROUND):
        if best.bound >= stop.cutoff or idle >= LAST_PATIENCE or _ended(stop):
            break
        before, gap = best.bound, _open(best.bound, stop.cutoff)
        _steps(program, system, splits.value, state, best, stop)
        idle = idle + 1 if best.bound - before < LAST_GAIN * gap else 0
    split = splits.proved(best.split)
    product = problem.hessian_product(best.point) - split * best.point
    keep = program.rounded(best.point, product, split)
    return program.certificate(best.point, split), keep


def _open(bound: float, cutoff: float) -> float:
    """Return what is open between a bound and the cutoff, or a share of the bound without one."""
    gap = cutoff - bound if cutoff < math.inf else OPEN_SHARE * abs(bound)
    return max(gap, 1e-12 * abs(bound), np.finfo(np.float64).tiny)


def _ended(stop: StopRule) -> bool:
    """Whether a limit has been reached, which `stop` then says."""
    return stop.out_of_time() or stop.out_of_steps()


def _first_iterate(
    problem: BlockProblem, program: ChannelProgram, split: FloatArray, pool: IncumbentPool
) -> _Iterate:
    """Return the best known set's point and its multiplier, or zero and none."""
    x = np.zeros(problem.n)
    if pool.keep is not None:
        new = solved_weights(problem, pool.keep, pool.program)
        x = new if pool.program == "joint" else problem.weights - new
    product = problem.hessian_product(x) - split * x
    return _Iterate(x, program.linear - product)


def _steps(
    program: ChannelProgram,
    system: ShiftedChannels,
    split: FloatArray,
    state: _Iterate,
    best: _Best,
    stop: StopRule,
) -> None:
    """Make `STEPS_A_ROUND` over-relaxed steps of ADMM, in place."""
    metric = split + system.shift
    # Inputs that are always 0 have no curvature where there is no damping either.
    metric = np.maximum(metric, LEAST_METRIC * float(metric.max()))
    for _ in range(STEPS_A_ROUND):
        if _ended(stop):
            return
        stop.steps += 1
        right = program.linear + metric * state.shrunk - state.multiplier
        solved = system.solve(right)
        product = right - metric * solved
        value = program.bound(solved, product, split)
        if value > best.bound:
            best.bound, best.point, best.split = value, solved, split.copy()
        relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * state.shrunk
        target = relaxed + state.multiplier / metric
        state.shrunk = program.shrink(target, split, metric)
        state.multiplier = metric * (target - state.shrunk)
