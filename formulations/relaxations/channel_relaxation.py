"""Both relaxations where ``H = R^T R + C + damping I`` with C block-diagonal over channels: any size.

The split is made channel by channel (`channel_splits`), so that nothing larger than a channel is factorised.
ADMM solves the relaxation in the metric ``D + sigma diag(C)``, in which the quadratic step is a solve with
``H + sigma diag(C)``: its factors (`channel_system`) do not depend on the split, which can change between any
two steps. What is found is a certificate, and proved once more by whoever checks it.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Protocol

import numpy as np

from formulations.errors import NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool
from formulations.loss import solved_weights
from formulations.problem import SMALLEST, BlockProblem, BoolArray, FloatArray, IntArray
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
from formulations.support import Cells, Groups, as_cells

SIGMA = 0.1
"""What is added to the diagonal of C in the metric of ADMM, relative to that diagonal."""
STEPS_A_ROUND = 8
"""ADMM steps between two changes of the split."""
ROUNDS = 24
"""Changes of the split at most."""
BARRIER, FALL, LEAST_BARRIER = 0.1, 0.85, 0.01
"""Weight of the barrier at first, its fall from one change to the next, and where that ends."""
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

    @property
    def parts(self) -> IntArray:
        """Where the parts of the block begin that have nothing to do with each other, and n, (p + 1,)."""
        ...

    def bounds(self, point: FloatArray, product: FloatArray, split: FloatArray) -> FloatArray:
        """Return what a point proves of each part, (p,), in units of the loss; `product` = ``Q point``."""
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

    def __init__(self, problem: BlockProblem, apart: Cells | None = None) -> None:
        """Take the block as one; or each channel apart, where there are no rows, with a count of its own."""
        self.problem = problem
        self.linear = problem.linear_term()
        support = problem.sets
        self._groups = support if isinstance(support, Groups) else None
        self._size = support.kept(problem.n) if apart is None else apart
        self.parts = np.array([0, problem.n]) if apart is None else apart.start
        self._constants = np.array([problem.constant_term()])
        if apart is not None:
            lost = 0.5 * problem.weights * (self.linear - problem.gradient_or_zero)
            self._constants = np.add.reduceat(lost, apart.start[:-1])
        self._apart = apart
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
            with np.errstate(over="ignore"):
                newton = rate - excess / np.maximum(grown, tiny)
            middle = np.where(np.isfinite(high), 0.5 * (low + high), 2.0 * rate)
            inside = (newton > low) & (newton < high) & (newton < 1e3 * rate)
            rate = np.minimum(np.where(inside, newton, middle), 1e300)
        self._rate = rate
        return np.asarray(z)

    def bounds(self, point: FloatArray, product: FloatArray, split: FloatArray) -> FloatArray:
        """``constant - 1/2 u.Q u - 1/2 (largest sum of h^2 / D that the support can hold)``."""
        square = (self.linear - product) ** 2 / split
        if self._apart is None:
            held = held_sum(self.problem.sets.folded(square), self._size)
            return self._constants - 0.5 * float(point @ product) - 0.5 * held
        values = []
        for first, stop, quota in zip(self.parts, self.parts[1:], self._apart.quota, strict=False):
            part = slice(first, stop)
            values.append(float(point[part] @ product[part]) + held_sum(square[part], int(quota)))
        return self._constants - 0.5 * np.array(values)

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
        self.parts = np.array([0, problem.n])
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

    def bounds(self, point: FloatArray, product: FloatArray, split: FloatArray) -> FloatArray:
        """``-1/2 x.Q x + (smallest sum of w (Q x) + cost over what the support can prune)``."""
        slope = self._support.folded(self.problem.weights * product + self._cost(split))
        return np.array([-0.5 * float(point @ product) + float(smallest_sum(slope, self._count))])

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
    start = _first_iterate(problem, program, pool)
    search = search_by_channels(problem, program, start, stop, improve_split=improve_split)
    split = search.split
    product = problem.hessian_product(search.point) - split * search.point
    keep = program.rounded(search.point, product, split)
    return program.certificate(search.point, split), keep


def search_by_channels(
    problem: BlockProblem,
    program: JointChannels | SelectionChannels,
    start: FloatArray,
    stop: StopRule,
    *,
    cutoffs: FloatArray | None = None,
    improve_split: bool = True,
) -> ChannelSearch:
    """Return where ADMM and the changes of the split end: the best bounds, and a split proved in float64.

    `start` (n,) is a point in the variables that H multiplies; `cutoffs` (p,) are bounds of the parts that
    are good enough, by default that of `stop` for the one there is. Raises `NotPositiveDefiniteError` if the
    program is joint and there is no positive split.
    """
    splits = ChannelSplits(problem, apart=program.parts.size > 2)
    if isinstance(program, JointChannels) and not splits.feasible:
        found = f"{problem.damping:g} with a channel that is singular, so that there is no split"
        raise NotPositiveDefiniteError("damping", found, "use damping > 0")
    system = ShiftedChannels(problem, 0.0 if program.scaled_metric else SIGMA)
    multiplier = program.linear - (problem.hessian_product(start) - splits.value * start)
    search = ChannelSearch(program, system, splits, (start, multiplier), stop)
    if cutoffs is not None:
        search.cutoffs = cutoffs
    search.steps()
    if improve_split and splits.feasible:
        search.rounds(ROUNDS, ROUND_GAIN, ROUND_PATIENCE, change=True)
    search.rounds(LAST_STEPS // STEPS_A_ROUND, LAST_GAIN, LAST_PATIENCE, change=False)
    search.split = splits.proved(search.split)
    return search


class ChannelSearch:
    """ADMM between changes of the split.

    Attributes
    ----------
    bounds : (p,) float64 array
        The best of each part so far.
    point, split : (n,) float64 arrays
        What proves them, but for the rounding of the split.
    """

    def __init__(
        self,
        program: ChannelProgram,
        system: ShiftedChannels,
        splits: ChannelSplits,
        start: tuple[FloatArray, FloatArray],
        stop: StopRule,
    ) -> None:
        self.program, self.system, self.splits, self.stop = program, system, splits, stop
        # The multiplier is in units of `Q x`.
        self._shrunk, self._multiplier = start
        self._barrier = BARRIER
        self.bounds = np.full(program.parts.size - 1, -math.inf)
        self.cutoffs = np.array([stop.cutoff])
        self.point, self.split = self._shrunk.copy(), splits.value.copy()

    def rounds(self, most: int, gain: float, patience: int, *, change: bool) -> None:
        """Change the split, if asked to, and make steps, until rounds in a row close too little."""
        idle = 0
        for _ in range(most):
            if bool((self.bounds >= self.cutoffs).all()) or idle >= patience or self._ended():
                break
            before, gaps = self.bounds, _open(self.bounds, self.cutoffs)
            if change:
                slopes = self.program.slopes(self._shrunk)
                self.splits.improve(slopes, gaps, self.program.parts, self._barrier, self.stop.out_of_time)
                self._barrier = max(LEAST_BARRIER, FALL * self._barrier)
            self.steps()
            closed = np.minimum((self.bounds - before) / gaps, 1.0)
            idle = idle + 1 if float(closed.mean()) < gain else 0

    def _ended(self) -> bool:
        """Whether a limit has been reached, which `stop` then says."""
        return self.stop.out_of_time() or self.stop.out_of_steps()

    def steps(self) -> None:
        """Make `STEPS_A_ROUND` over-relaxed steps of ADMM."""
        program, split, linear = self.program, self.splits.value, self.program.linear
        metric = split + self.system.shift
        # Inputs that are always 0 have no curvature where there is no damping either.
        metric = np.maximum(metric, LEAST_METRIC * float(metric.max()))
        for _ in range(STEPS_A_ROUND):
            if self._ended():
                return
            self.stop.steps += 1
            right = linear + metric * self._shrunk - self._multiplier
            solved = self.system.solve(right)
            product = right - metric * solved
            values = program.bounds(solved, product, split)
            better = np.repeat(values > self.bounds, np.diff(program.parts))
            self.bounds = np.maximum(values, self.bounds)
            self.point[better], self.split[better] = solved[better], split[better]
            relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * self._shrunk
            target = relaxed + self._multiplier / metric
            self._shrunk = program.shrink(target, split, metric)
            self._multiplier = metric * (target - self._shrunk)


def _open(bounds: FloatArray, cutoffs: FloatArray) -> FloatArray:
    """Return what is open between bounds and cutoffs, or a share of the bound where there is no cutoff."""
    gaps = np.where(np.isfinite(cutoffs), cutoffs - bounds, OPEN_SHARE * np.abs(bounds))
    return np.asarray(np.maximum(gaps, 1e-12 * np.abs(bounds) + np.finfo(np.float64).tiny))


def _first_iterate(problem: BlockProblem, program: ChannelProgram, pool: IncumbentPool) -> FloatArray:
    """Return the point of the best known set, or zero."""
    if pool.keep is None:
        return np.zeros(problem.n)
    new = solved_weights(problem, pool.keep, pool.program)
    return new if pool.program == "joint" else problem.weights - new
