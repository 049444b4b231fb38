"""The best blocks of clusters and the relaxation's solution at once: Newton steps along one central path.

For blocks ``B`` and a point ``u``, with ``Q = H - blkdiag(B)`` and ``h = b - Q u``, the bound is

    const - 1/2 u.Q u - min over prices of (price s + sum over clusters of max_S (q_S - price |S|)),
    q_S = 1/2 h_S.[B_SS]^-1 h_S.

It is concave in ``(Q u, B, price)``. The maximum over the supports S of a cluster is made smooth by a
barrier, ``min over t of t - weight sum_S log(t - q_S)``, which is self-concordant as each ``q_S`` is a
quadratic over a linear function; so are those of the cones, ``log det Q`` and ``log det B``. Point and price
are at their best before each step on the blocks, and eliminated from its Newton system, so that the step
knows how the shares of the supports will answer: one that takes the shares for fixed goes far too far.
Sources: Wei, Gomez & Kucukyavuz (2022) for the hull; Nesterov & Nemirovskii (1994) for the barriers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import spotrf, spotrs

from formulations.problem import FloatArray, IntArray
from formulations.relaxations.clusters import best_by_count, held_by_count, subsets_of, support_rows

SingleArray = NDArray[np.float32]
AnyArray = NDArray[Any]

FIRST_SHARE = 0.8
"""Share of the diagonal split that the blocks begin with, off the boundary of what is feasible."""
FIRST_WEIGHT = 15.0
"""Weight of ``log det`` at the start, times the order, relative to the open gap."""
SHARE_WEIGHT = 1.0 / 15.0
"""Weight of the barrier of the supports relative to that: there are many more of them."""
FALL, SLOW_FALL = 0.5, 0.7
"""What becomes of the weights after a step: near the path, and some way off."""
FULL, SHORT = 0.9, 0.45
"""Lengths of a step that count as near the path, and as some way off."""
SHORTER, SHORTEST = 0.7, 1e-3
"""Backtracking of a step, and the length at which it is given up."""
POINT_STEPS = 3
"""Newton steps on the point before each on the blocks at most."""
CENTRED = 0.02
"""Newton decrement, relative to weight and clusters, below which the point is left as it is."""
FARTHEST = 1e100
"""Distance, in units of the weight, from which a support is as good as out."""
ROOTS, PRICES = 30, 60
"""Most steps on ``t``, and on the price."""


@dataclass(frozen=True)
class Split:
    """Blocks of the clusters and what follows from them.

    Attributes
    ----------
    blocks : (c, m, m) float64 array
    inverses : (c, subsets, m, m) float64 array
        ``[B_SS]^-1`` in place.
    rest : (c m, c m) float64 array
        ``Q``.
    """

    blocks: FloatArray
    inverses: FloatArray
    rest: FloatArray


@dataclass(frozen=True)
class Mixture:
    """What a point and a price come to under a split.

    Attributes
    ----------
    value : float
        Of the smoothed bound, without constant and ``log det``.
    price : float
    product : (c m,) float64 array
        ``Q u``.
    ends : (c, subsets, m) float64 array
        ``[B_SS]^-1 h_S``.
    shares : (c, subsets) float64 array
        Of the supports of a cluster; each row sums to 1.
    bends : (c, subsets) float64 array
        How fast a share follows its ``q_S``.
    """

    value: float
    price: float
    product: FloatArray
    ends: FloatArray
    shares: FloatArray
    bends: FloatArray


@dataclass(frozen=True)
class Curvature:
    """Second derivatives of the smoothed conjugate: in h, in the blocks at a fixed point, in the price.

    Attributes
    ----------
    mean : (c, m) float64 array
        Mean of the ends: where a point at its best is.
    slopes : (c, e) float64 array
        Of the bound in the entries of the blocks.
    full : (c, m + e + 1, m + e + 1) float64 array
    roots : (c, m, m) float64 array
        ``L`` with ``L L^T`` its part in h.
    factor : (c m, c m) float64 array
        Lower Cholesky factor of ``I + L^T Q L``.
    image : (c m, c m) float64 array
        ``Q L``.
    """

    mean: FloatArray
    slopes: FloatArray
    full: FloatArray
    roots: FloatArray
    factor: FloatArray
    image: FloatArray


class ClusterPath:
    """Blocks, point and price on their way, in places of clusters.

    Parameters
    ----------
    matrix : (c m, c m) float64 array
        ``H``, positive definite; weights of a cluster are next to each other.
    linear : (c m,) float64 array
        ``b``.
    n_keep : int
    size : int
        ``m``.
    split, point : (c m,) float64 arrays
        A diagonal split, and a point near the solution of its relaxation.
    gap : float
        What is open.
    """

    def __init__(
        self,
        matrix: FloatArray,
        linear: FloatArray,
        n_keep: int,
        size: int,
        start: tuple[FloatArray, FloatArray],
        gap: float,
    ) -> None:
        split, self.point = start
        self.matrix, self.linear, self.n_keep = matrix, linear, n_keep
        self.m, self.c = size, linear.size // size
        self.subsets = subsets_of(size)
        self.counts = support_rows(size).sum(axis=1).astype(np.float64)
        self.first, self.second = np.triu_indices(size)
        self.own = np.where(self.first == self.second, 1.0, 2.0)
        blocks = FIRST_SHARE * split.reshape(self.c, size)[:, :, None] * np.eye(size)
        self.split = self._split(blocks)
        self.weight = FIRST_WEIGHT * gap / linear.size
        self.price = 0.0

    @property
    def share_weight(self) -> float:
        """Weight of the barrier of the supports."""
        return SHARE_WEIGHT * self.weight

    def bound(self) -> float:
        """Return the bound of point and blocks without the constant of the form, not rounded down."""
        residual = self._residual(self.point, self.split)
        values = self._values(self._ends(residual, self.split), residual)
        held, _ = held_by_count(best_by_count(values, self.counts), self.n_keep)
        product = self.linear - residual
        return float(-0.5 * (self.point @ product) - held)

    def kept_shares(self) -> FloatArray:
        """Return how much of each weight the relaxation keeps, (c m,)."""
        mixture = self._mixed(self.point, self.split)
        return np.asarray((mixture.shares @ support_rows(self.m)).reshape(-1))

    def relax(self) -> None:
        """Move point and price to where the smoothed bound of the blocks is largest, by Newton's method."""
        mixture = self._mixed(self.point, self.split)
        for _ in range(POINT_STEPS):
            curvature = self._curvature(self.point, self.split, mixture)
            change = curvature.mean.reshape(-1) - self.point
            step = self._answer(curvature, change)
            cross = curvature.full[:, : self.m, -1].reshape(-1)
            along = self._answer(curvature, cross)
            seen = self.split.rest @ cross
            stiffness = float(curvature.full[:, -1, -1].sum()) - float(seen @ along)
            if stiffness > 0.0:
                step += along * (float(seen @ step) / stiffness)
            gain = float(change @ (self.split.rest @ step))
            length = 1.0
            while length > SHORTEST:
                trial = self._mixed(self.point + length * step, self.split)
                if trial.value >= mixture.value + 1e-4 * length * gain:
                    break
                length *= 0.5
            else:
                return
            self.point, self.price, mixture = self.point + length * step, trial.price, trial
            if gain < CENTRED * self.share_weight * self.c:
                return

    def improve(self) -> bool:
        """Take a damped Newton step on the blocks, and let point and price follow; False if there is none."""
        mixture = self._mixed(self.point, self.split)
        self.price = mixture.price
        curvature = self._curvature(self.point, self.split, mixture)
        try:
            entries, slope, dearer = self._newton(curvature)
        except LinAlgError:
            return False
        if not slope > 0.0:
            return False
        step = np.zeros_like(self.split.blocks)
        step[:, self.first, self.second] = step[:, self.second, self.first] = entries
        inner, cross = curvature.full[:, : self.m, self.m : -1], curvature.full[:, : self.m, -1]
        moved = (inner @ entries[:, :, None])[:, :, 0] + dearer * cross
        follow = self._answer(curvature, moved.reshape(-1))
        before = mixture.value + self.weight * self._log_det(self.split.blocks)
        length = 1.0
        while length > SHORTEST:
            blocks = self.split.blocks + length * step
            volume = self._log_det(blocks)
            if np.isfinite(volume):
                split, point = self._split(blocks), self.point + length * follow
                trial = self._mixed(point, split)
                if trial.value + self.weight * volume >= before + 1e-3 * length * slope:
                    break
            length *= SHORTER
        else:
            return False
        self.split, self.point, self.price = split, point, trial.price
        self.weight *= FALL if length > FULL else SLOW_FALL if length > SHORT else 1.0
        return True

    def _split(self, blocks: FloatArray) -> Split:
        inverses = np.zeros((self.c, self.counts.size, self.m, self.m))
        row = 1
        for sets in self.subsets[1:]:
            part = blocks[:, sets[:, :, None], sets[:, None, :]]
            rows = row + np.arange(len(sets))
            inverses[:, rows[:, None, None], sets[:, :, None], sets[:, None, :]] = np.linalg.inv(part)
            row += len(sets)
        rest = self.matrix.copy()
        every = np.arange(self.c)
        rest.reshape(self.c, self.m, self.c, self.m)[every, :, every, :] -= blocks
        return Split(blocks, inverses, rest)

    def _residual(self, point: FloatArray, split: Split) -> FloatArray:
        return np.asarray(self.linear - split.rest @ point)

    def _ends(self, residual: FloatArray, split: Split) -> FloatArray:
        cells = residual.reshape(self.c, self.m)
        return np.asarray((split.inverses @ cells[:, None, :, None])[..., 0])

    def _values(self, ends: FloatArray, residual: FloatArray) -> FloatArray:
        return np.asarray(0.5 * (ends @ residual.reshape(self.c, self.m, 1))[..., 0])

    def _mixed(self, point: FloatArray, split: Split) -> Mixture:
        """Return shares, price and value at a point; the price is found by Newton steps in a bracket."""
        residual = self._residual(point, split)
        ends = self._ends(residual, split)
        values = self._values(ends, residual)
        low, high, price = -np.inf, np.inf, self.price
        for _ in range(PRICES):
            total, shares, bends = self._shared(values - price * self.counts)
            excess = float((shares @ self.counts).sum()) - self.n_keep
            if abs(excess) <= 1e-8 * self.n_keep:
                break
            low, high = (price, high) if excess > 0.0 else (low, price)
            size = bends.sum(axis=1)
            middle = (bends @ self.counts) / size
            fall = float((bends @ self.counts**2 - size * middle**2).sum())
            price = price + excess / max(fall, 1e-300)
            if not low < price < high:
                if np.isfinite(low) and np.isfinite(high):
                    price = 0.5 * (low + high)
                else:
                    far = abs(low if np.isfinite(low) else high) + 100.0 * self.share_weight
                    price = low + far if np.isfinite(low) else high - far
        product = self.linear - residual
        value = float(-0.5 * (point @ product) - price * self.n_keep - total)
        return Mixture(value, price, product, ends, shares, bends)

    def _shared(self, values: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        """Return the sum over clusters of ``min over t of t - weight sum_S log(t - q_S)``, and its slopes.

        In units of the weight and above the largest value, t is where ``sum_S 1 / (t + behind_S)`` is 1.
        """
        weight = self.share_weight
        largest = values.max(axis=1, keepdims=True)
        with np.errstate(over="ignore"):
            behind = np.minimum((largest - values) / weight, FARTHEST)
        above = np.ones((self.c, 1))
        for _ in range(ROOTS):
            shares = 1.0 / (above + behind)
            total = shares.sum(axis=1, keepdims=True)
            if float(np.abs(total - 1.0).max()) < 1e-12:
                break
            above += total * (total - 1.0) / (shares * shares).sum(axis=1, keepdims=True)
        shares /= total
        held = float((largest + weight * above).sum() - weight * np.log(weight * (above + behind)).sum())
        return held, shares, shares * shares / weight

    def _curvature(self, point: FloatArray, split: Split, mixture: Mixture) -> Curvature:
        """Return the second derivatives; those in the blocks are at a fixed point, ``h`` moving along."""
        a, b, m, c = self.first, self.second, self.m, self.c
        ends, own = mixture.ends, point.reshape(c, m)
        away = own[:, None, :] - ends
        entries = np.arange(a.size)
        off = a != b
        moved = np.zeros((c, self.counts.size, m, a.size))
        moved[:, :, a, entries] = away[:, :, b]
        moved[:, :, b[off], entries[off]] = away[:, :, a[off]]
        slope = ends[:, :, a] * (own[:, None, b] - 0.5 * ends[:, :, b])
        slope[:, :, off] += ends[:, :, b[off]] * (own[:, None, a[off]] - 0.5 * ends[:, :, a[off]])
        count = np.broadcast_to(-self.counts[None, :, None], (c, self.counts.size, 1))
        first = np.concatenate((ends, slope, count), axis=2)
        mean = (mixture.shares[:, None, :] @ first)[:, 0]
        size = mixture.bends.sum(axis=1)[:, None]
        centre = (mixture.bends[:, None, :] @ first)[:, 0] / size
        spread = (first - centre[:, None]) * np.sqrt(mixture.bends)[:, :, None]
        full = spread.transpose(0, 2, 1) @ spread
        weighted = split.inverses * mixture.shares[:, :, None, None]
        bent = weighted @ moved
        full[:, :m, :m] += weighted.sum(axis=1)
        cross = bent.sum(axis=1)
        full[:, :m, m:-1] += cross
        full[:, m:-1, :m] += cross.transpose(0, 2, 1)
        flat = moved.reshape(c, -1, a.size)
        full[:, m:-1, m:-1] += flat.transpose(0, 2, 1) @ bent.reshape(c, -1, a.size)
        slopes = 0.5 * self.own * own[:, a] * own[:, b] - mean[:, m:-1]
        eigenvalues, vectors = np.linalg.eigh(full[:, :m, :m])
        roots = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))[:, None, :]
        image = self._right(split.rest, roots)
        inner = self._left(roots, image)
        inner[np.diag_indices(len(inner))] += 1.0
        factor = cholesky(inner, lower=True, overwrite_a=True, check_finite=False)
        return Curvature(mean[:, :m], slopes, full, roots, factor, image)

    def _right(self, matrix: AnyArray, blocks: AnyArray) -> AnyArray:
        """``matrix blkdiag(blocks)``."""
        cells = matrix.reshape(len(matrix), self.c, self.m).transpose(1, 0, 2)
        return np.ascontiguousarray((cells @ blocks).transpose(1, 0, 2)).reshape(len(matrix), -1)

    def _left(self, blocks: AnyArray, matrix: AnyArray) -> AnyArray:
        """``blkdiag(blocks)^T matrix``."""
        return np.asarray(
            (blocks.transpose(0, 2, 1) @ matrix.reshape(self.c, self.m, -1)).reshape(-1, matrix.shape[1])
        )

    def _answer(self, curvature: Curvature, change: FloatArray) -> FloatArray:
        """``(I + N Q)^-1 change`` with ``N = L L^T``: how the point answers a change of the mean."""
        inner = cho_solve((curvature.factor, True), curvature.image.T @ change, check_finite=False)
        back = (curvature.roots @ inner.reshape(self.c, self.m, 1)).reshape(-1)
        return np.asarray(change - back)

    def _newton(self, curvature: Curvature) -> tuple[FloatArray, float, float]:
        """Return the Newton step in the entries of the blocks, (c, e), its slope, and that of the price.

        The system is in the entries of the blocks: the barriers, and the curvature of the bound in the blocks
        with the point's answer eliminated, and that of the price by a rank-one change.
        """
        a, b, c, m, weight = self.first, self.second, self.c, self.m, self.weight
        size = c * a.size
        answered = solve_triangular(curvature.factor, curvature.image.T, lower=True, check_finite=False)
        stiff = self.split.rest - answered.T @ answered
        slack = np.asarray(np.linalg.inv(self.split.rest), dtype=np.float64)
        own = np.linalg.inv(self.split.blocks)
        system = self._system(curvature, slack, stiff)
        every = np.arange(c)
        four = slack.reshape(c, m, c, m)[every, :, every, :]
        gradient = curvature.slopes + weight * self.own * (own[:, a, b] - four[:, a, b])
        inner = _products(own[:, :, None], a, b)[:, :, 0] * (weight * self._scale())
        inner += curvature.full[:, m:-1, m:-1]
        system.reshape(c, a.size, c, a.size)[every, :, every, :] += inner.astype(np.float32)
        system[np.diag_indices(size)] *= 1.0 + 1e-6
        factor, failed = spotrf(system, lower=1, clean=0, overwrite_a=1)
        if failed or not np.isfinite(gradient).all():
            raise LinAlgError("the Newton system of the blocks is not definite")
        cross = curvature.full[:, :m, -1].reshape(-1)
        along = stiff @ cross
        bend = curvature.full[:, m:-1, -1] - self._pulled(curvature, along)
        stiffness = float(curvature.full[:, -1, -1].sum()) - float(cross @ along)
        sides = np.stack((gradient.reshape(-1), bend.reshape(-1)), axis=1)
        solved = spotrs(factor, sides.astype(np.float32), lower=1)[0].astype(np.float64)
        entries = solved[:, 0]
        left = stiffness - float(bend.reshape(-1) @ solved[:, 1])
        if left > 1e-9 * abs(stiffness):
            entries = entries + solved[:, 1] * (float(bend.reshape(-1) @ entries) / left)
        dearer = -float(bend.reshape(-1) @ entries) / stiffness if stiffness > 0.0 else 0.0
        return entries.reshape(c, -1), float(gradient.reshape(-1) @ entries), dearer

    def _scale(self) -> FloatArray:
        """Return what products of entries are to be scaled by, as each entry off the diagonal is two."""
        root = np.sqrt(0.5) * self.own
        return np.asarray(root[:, None] * root)

    def _pulled(self, curvature: Curvature, along: FloatArray) -> FloatArray:
        """Return what a vector in the place of h is in the entries of the blocks, (c, e)."""
        inner = curvature.full[:, : self.m, self.m : -1]
        return np.asarray((along.reshape(self.c, 1, self.m) @ inner)[:, 0])

    def _system(self, curvature: Curvature, slack: FloatArray, stiff: FloatArray) -> SingleArray:
        """Return the part of the Newton system that couples clusters, in single precision."""
        a, b, c, m = self.first, self.second, self.c, self.m
        four = slack.astype(np.float32).reshape(c, m, c, m)
        system = _products(four, a, b)
        system *= (self.weight * self._scale()).astype(np.float32)[None, :, None, :]
        system = system.reshape(c * a.size, c * a.size)
        inner = curvature.full[:, :m, m:-1].astype(np.float32)
        system -= self._left(inner, self._right(stiff.astype(np.float32), inner))
        return system

    def _log_det(self, blocks: FloatArray) -> float:
        """``log det(H - blkdiag(blocks)) + log det blocks``; -inf if either is not definite."""
        rest = self.matrix.copy()
        every = np.arange(self.c)
        rest.reshape(self.c, self.m, self.c, self.m)[every, :, every, :] -= blocks
        try:
            slack = cholesky(rest, lower=True, overwrite_a=True, check_finite=False)
            own = np.linalg.cholesky(blocks)
        except np.linalg.LinAlgError:
            return -np.inf
        total = np.log(np.diagonal(slack)).sum() + np.log(np.diagonal(own, axis1=1, axis2=2)).sum()
        return 2.0 * float(total)


def _products(four: AnyArray, a: IntArray, b: IntArray) -> AnyArray:
    """Return ``X_ac X_bd + X_ad X_bc`` of all entries ``(a, b)`` and ``(c, d)`` of two blocks."""
    left, right = four[:, a], four[:, b]
    found = left[..., a] * right[..., b]
    found += left[..., b] * right[..., a]
    return found
