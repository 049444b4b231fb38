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

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.linalg.lapack import dpotri, spotrf, spotrs

from formulations.problem import FloatArray
from formulations.relaxations.cluster_kernels import SingleArray, join_barrier, mix_clusters
from formulations.relaxations.clusters import best_by_count, held_by_count, subsets_of, support_rows

AnyArray = NDArray[Any]

SHARE_WEIGHT = 0.27
"""Weight of the barrier of the supports times the root of their number, relative to that of ``log det``."""
FALL, SLOW_FALL = 0.5, 0.7
"""What becomes of the weights after a step: near the path, and some way off."""
FULL, SHORT = 0.9, 0.45
"""Lengths of a step that count as near the path, and as some way off."""
SHORTER, SHORTEST = 0.5, 1e-3
"""Backtracking of a step, and the length at which it is given up."""
MOST_BENT = 40
"""Supports of a cluster whose part in the curvature of the blocks is counted."""
LIFTS = (1e-6, 1e-4, 1e-2)
"""What the diagonal of a Newton system is lifted by, relatively, where single precision finds no factor."""
POINT_STEPS = 3
"""Newton steps on the point before each on the blocks at most, on a path."""
CENTRED = 1.0
"""Newton decrement, relative to weight and clusters, below which the point is left as it is."""


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
    factor : (c m, c m) float64 array
        Its lower Cholesky factor.
    volume : float
        ``log det Q + log det blkdiag(B)``.
    """

    blocks: FloatArray
    inverses: FloatArray
    rest: FloatArray
    factor: FloatArray
    volume: float


@dataclass(frozen=True)
class Mixture:
    """What a point comes to under a split, at its best price.

    Attributes
    ----------
    value : float
        Of the smoothed bound, without constant and ``log det``.
    price : float
    ends : (c, subsets, m) float64 array
        ``[B_SS]^-1 h_S``.
    shares : (c, subsets) float64 array
        Of the supports of a cluster; each row sums to 1.
    """

    value: float
    price: float
    ends: FloatArray
    shares: FloatArray


@dataclass(frozen=True)
class Answer:
    """How the smoothed conjugate bends in h and in the price, and how the point answers.

    Attributes
    ----------
    mean : (c, m) float64 array
        Mean of the ends: where a point at its best is.
    cross : (c, m) float64 array
        Second derivatives in h and the price.
    bend : float
        In the price.
    roots : (c, m, m) float64 array
        ``L`` with ``L L^T`` the second derivatives in h.
    image : (c m, c m) float64 array
        ``Q L``.
    factor : (c m, c m) float64 array
        Lower Cholesky factor of ``I + L^T Q L``.
    """

    mean: FloatArray
    cross: FloatArray
    bend: float
    roots: FloatArray
    image: FloatArray
    factor: FloatArray

    def to(self, change: FloatArray) -> FloatArray:
        """Return ``(I + L L^T Q)^-1 change``: how the point answers a change of the mean."""
        inner = cho_solve((self.factor, True), self.image.T @ change, check_finite=False)
        back = (self.roots @ inner.reshape(*self.mean.shape, 1)).reshape(-1)
        return np.asarray(change - back)


class ClusterPath:
    """Blocks, point and price on their way, in places of clusters.

    Parameters
    ----------
    matrix : (c m, c m) float64 array
        ``H``, positive definite; weights of a cluster are next to each other.
    linear : (c m,) float64 array
        ``b``.
    n_keep : int
    blocks : (c, m, m) float64 array
        A split, off the boundary of what is feasible.
    point : (c m,) float64 array
        A point near the solution of its relaxation.
    weight : float
        Of ``log det`` at the start.

    Raises
    ------
    LinAlgError
        If the blocks are no split.
    """

    def __init__(
        self,
        matrix: FloatArray,
        linear: FloatArray,
        n_keep: int,
        blocks: FloatArray,
        point: FloatArray,
        weight: float,
    ) -> None:
        self.matrix, self.linear, self.n_keep = matrix, linear, n_keep
        self.c, self.m = blocks.shape[:2]
        self.subsets = subsets_of(self.m)
        self.counts = support_rows(self.m).sum(axis=1).astype(np.float64)
        self.first, self.second = np.triu_indices(self.m)
        self.own = np.where(self.first == self.second, 1.0, 2.0)
        first = self._split(blocks)
        if first is None:
            raise LinAlgError("the split leaves a matrix that is not definite")
        self.split, self.point, self.weight = first, point, weight
        self.price = 0.0

    @property
    def share_weight(self) -> float:
        """Weight of the barrier of the supports."""
        return SHARE_WEIGHT * self.weight / math.sqrt(self.counts.size)

    def bound(self) -> float:
        """Return the bound of point and blocks without the constant of the form, not rounded down."""
        product = self.split.rest @ self.point
        values = self._values(*self._ends(self.linear - product, self.split))
        held, _ = held_by_count(best_by_count(values, self.counts), self.n_keep)
        return float(-0.5 * (self.point @ product) - held)

    def kept_shares(self) -> FloatArray:
        """Return how much of each weight the relaxation keeps, (c m,)."""
        mixture = self._mixed(self.point, self.split)
        return np.asarray((mixture.shares @ support_rows(self.m)).reshape(-1))

    def rises(self) -> tuple[FloatArray, FloatArray]:
        """Return by how much the relaxation is estimated to rise where a weight is pruned, and kept, (c m,).

        From where `relax` has left the point. A bonus on a weight moves its share, with the answers of point
        and price, at a rate of Z; holding the share at 0 or 1 instead costs half its squared distance over Z.
        """
        mixture, answer = self._known
        m, c, every = self.m, self.c, np.arange(self.c)
        inside = support_rows(m).astype(np.float64)
        first = np.empty((c, self.counts.size, 2 * m + 1))
        first[:, :, :m], first[:, :, m:-1], first[:, :, -1] = mixture.ends, inside, -self.counts
        full = self._spread(mixture.shares, first)
        moved = full[:, :m, m:-1]
        answered = solve_triangular(answer.factor, answer.image.T, lower=True, check_finite=False)
        seen = answered.reshape(-1, c, m).transpose(1, 0, 2)
        own = self.split.rest.reshape(c, m, c, m)[every, :, every] - seen.transpose(0, 2, 1) @ seen
        cross = answer.cross.reshape(-1)
        along = self.split.rest @ cross - answered.T @ (answered @ cross)
        rate = np.diagonal(full[:, m:-1, m:-1], axis1=1, axis2=2) - (moved * (own @ moved)).sum(axis=1)
        stiffness = answer.bend - float(cross @ along)
        if stiffness > 0.0:
            priced = full[:, m:-1, -1] - (moved * along.reshape(c, m, 1)).sum(axis=1)
            rate = rate - priced**2 / stiffness
        rate = np.maximum(rate, np.finfo(np.float64).tiny)
        shares = mixture.shares @ inside
        return (shares**2 / (2.0 * rate)).reshape(-1), ((1.0 - shares) ** 2 / (2.0 * rate)).reshape(-1)

    def relax(self, steps: int = POINT_STEPS) -> None:
        """Move point and price to where the smoothed bound of the blocks is largest, by Newton's method."""
        mixture = self._mixed(self.point, self.split)
        for _ in range(steps):
            answer = self._answer(mixture)
            change = answer.mean.reshape(-1) - self.point
            cross = answer.cross.reshape(-1)
            step, along = answer.to(change), answer.to(cross)
            seen = self.split.rest @ cross
            stiffness = answer.bend - float(seen @ along)
            if stiffness > 0.0:
                step += along * (float(seen @ step) / stiffness)
            gain = float(change @ (self.split.rest @ step))
            self._known = mixture, answer
            if gain < CENTRED * self.share_weight * self.c:
                return
            length = 1.0
            while length > SHORTEST:
                trial = self._mixed(self.point + length * step, self.split)
                if trial.value >= mixture.value + 1e-4 * length * gain:
                    break
                length *= 0.5
            else:
                return
            self.point, self.price, mixture = self.point + length * step, trial.price, trial
        self._known = mixture, self._answer(mixture)

    def improve(self) -> bool:
        """Take a damped Newton step on the blocks, and let point and price follow; False if there is none.

        From where `relax` has left the point.
        """
        mixture, answer = self._known
        try:
            entries, slope, follow = self._newton(mixture, answer)
        except LinAlgError:
            return False
        if not slope > 0.0:
            return False
        step = np.zeros_like(self.split.blocks)
        step[:, self.first, self.second] = step[:, self.second, self.first] = entries
        before = mixture.value + self.weight * self.split.volume
        length = 1.0
        while length > SHORTEST:
            split = self._split(self.split.blocks + length * step)
            if split is not None:
                trial = self._mixed(self.point + length * follow, split)
                if trial.value + self.weight * split.volume >= before + 1e-3 * length * slope:
                    break
            length *= SHORTER
        else:
            return False
        assert split is not None
        self.split, self.point, self.price = split, self.point + length * follow, trial.price
        self.weight *= FALL if length > FULL else SLOW_FALL if length > SHORT else 1.0
        return True

    def _split(self, blocks: FloatArray) -> Split | None:
        """Return the split in these blocks; None if they or the rest are not definite."""
        rest = self.matrix.copy()
        every = np.arange(self.c)
        rest.reshape(self.c, self.m, self.c, self.m)[every, :, every, :] -= blocks
        try:
            own = np.linalg.cholesky(blocks)
            factor = cholesky(rest, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            return None
        volume = np.log(np.diagonal(factor)).sum() + np.log(np.diagonal(own, axis1=1, axis2=2)).sum()
        inverses = np.zeros((self.c, self.counts.size, self.m, self.m))
        row = 1
        for sets in self.subsets[1:]:
            part = blocks[:, sets[:, :, None], sets[:, None, :]]
            rows = row + np.arange(len(sets))
            inverses[:, rows[:, None, None], sets[:, :, None], sets[:, None, :]] = np.linalg.inv(part)
            row += len(sets)
        return Split(blocks, inverses, rest, factor, 2.0 * float(volume))

    def _ends(self, residual: FloatArray, split: Split) -> tuple[FloatArray, FloatArray]:
        """Return ``[B_SS]^-1 h_S`` of each support, and h by cluster."""
        cells = residual.reshape(self.c, self.m)
        return np.asarray((split.inverses @ cells[:, None, :, None])[..., 0]), cells

    def _values(self, ends: FloatArray, cells: FloatArray) -> FloatArray:
        """Return ``q_S`` of each support."""
        return np.asarray(0.5 * (ends @ cells[:, :, None])[..., 0])

    def _mixed(self, point: FloatArray, split: Split) -> Mixture:
        """Return shares and value at a point, at the best price."""
        product = split.rest @ point
        ends, cells = self._ends(self.linear - product, split)
        values = self._values(ends, cells)
        shares = np.empty_like(values)
        total, price = mix_clusters(
            values, self.counts, float(self.n_keep), self.share_weight, self.price, shares
        )
        value = float(-0.5 * (point @ product) - price * self.n_keep - total)
        return Mixture(value, price, ends, shares)

    def _spread(self, shares: FloatArray, first: FloatArray) -> FloatArray:
        """Return what the change of the shares adds to second derivatives; `first` are the first ones.

        A share follows its ``q_S`` by its square over the weight, less what all of a cluster have in common.
        """
        squares = shares * shares / self.share_weight
        centre = (squares[:, None, :] @ first) / squares.sum(axis=1)[:, None, None]
        spread = (first - centre) * np.sqrt(squares)[:, :, None]
        return np.asarray(spread.transpose(0, 2, 1) @ spread)

    def _answer(self, mixture: Mixture) -> Answer:
        """Return how the point answers, O(n^3)."""
        m, shares = self.m, mixture.shares
        count = np.broadcast_to(-self.counts[None, :, None], (self.c, self.counts.size, 1))
        full = self._spread(shares, np.concatenate((mixture.ends, count), axis=2))
        inner = full[:, :m, :m] + (shares[:, :, None, None] * self.split.inverses).sum(axis=1)
        eigenvalues, vectors = np.linalg.eigh(inner)
        roots = vectors * np.sqrt(np.maximum(eigenvalues, 0.0))[:, None, :]
        image = self._right(self.split.rest, roots)
        system = self._left(roots, image)
        system[np.diag_indices(len(system))] += 1.0
        return Answer(
            mean=(shares[:, None, :] @ mixture.ends)[:, 0],
            cross=full[:, :m, m],
            bend=float(full[:, m, m].sum()),
            roots=roots,
            image=image,
            factor=cholesky(system, lower=True, overwrite_a=True, check_finite=False),
        )

    def _right(self, matrix: AnyArray, blocks: AnyArray) -> AnyArray:
        """``matrix blkdiag(blocks)``."""
        cells = matrix.reshape(len(matrix), self.c, self.m).transpose(1, 0, 2)
        return np.ascontiguousarray((cells @ blocks).transpose(1, 0, 2)).reshape(len(matrix), -1)

    def _left(self, blocks: AnyArray, matrix: AnyArray) -> AnyArray:
        """``blkdiag(blocks)^T matrix``."""
        cells = matrix.reshape(self.c, self.m, -1)
        return (blocks.transpose(0, 2, 1) @ cells).reshape(-1, matrix.shape[1])

    def _bends(self, mixture: Mixture) -> tuple[FloatArray, FloatArray]:
        """Return the bound's slopes in the entries of the blocks, (c, e), and the second derivatives there.

        The latter, (c, m + e + 1, m + e + 1), are of the conjugate in h, the entries, and the price, at a
        fixed point: h moves along with the blocks.
        """
        a, b, m, c = self.first, self.second, self.m, self.c
        own = self.point.reshape(c, m)
        mean = (mixture.shares[:, None, :] @ mixture.ends)[:, 0]
        square = mixture.ends.transpose(0, 2, 1) @ (mixture.shares[:, :, None] * mixture.ends)
        slopes = square[:, a, b] + own[:, a] * own[:, b] - mean[:, a] * own[:, b] - own[:, a] * mean[:, b]
        shares, ends, inverses, counts = self._largest(mixture)
        away = own[:, None, :] - ends
        entries, off = np.arange(a.size), a != b
        moved = np.zeros((*ends.shape, a.size))
        moved[:, :, a, entries] = away[:, :, b]
        moved[:, :, b[off], entries[off]] = away[:, :, a[off]]
        first = ends[:, :, a] * (own[:, None, b] - 0.5 * ends[:, :, b])
        first[:, :, off] += ends[:, :, b[off]] * (own[:, None, a[off]] - 0.5 * ends[:, :, a[off]])
        full = self._spread(shares, np.concatenate((ends, first, -counts[:, :, None]), axis=2))
        bent = (inverses * shares[:, :, None, None]) @ moved
        cross = bent.sum(axis=1)
        full[:, :m, m:-1] += cross
        full[:, m:-1, :m] += cross.transpose(0, 2, 1)
        full[:, m:-1, m:-1] += moved.reshape(c, -1, a.size).transpose(0, 2, 1) @ bent.reshape(c, -1, a.size)
        return 0.5 * self.own * slopes, full

    def _largest(self, mixture: Mixture) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Return shares, ends, inverses and counts of the supports of a cluster that have the largest shares.

        What the others add to second derivatives is next to nothing, and takes most of the time.
        """
        many = self.counts.size
        chosen = np.broadcast_to(np.arange(many), (self.c, many))
        if many > MOST_BENT:
            chosen = np.argpartition(-mixture.shares, MOST_BENT, axis=1)[:, :MOST_BENT]
        every = np.arange(self.c)[:, None]
        return (
            mixture.shares[every, chosen],
            mixture.ends[every, chosen],
            self.split.inverses[every, chosen],
            self.counts[chosen],
        )

    def _newton(self, mixture: Mixture, answer: Answer) -> tuple[FloatArray, float, FloatArray]:
        """Return the Newton step in the entries of the blocks, (c, e), its slope, and how the point follows.

        The system has the barriers, and the curvature of the bound with the point's answer eliminated, and
        that of the price by a rank-one change.
        """
        a, b, c, m, weight = self.first, self.second, self.c, self.m, self.weight
        every = np.arange(c)
        slopes, full = self._bends(mixture)
        inner, cross = full[:, :m, m:-1], answer.cross.reshape(-1)
        answered = solve_triangular(answer.factor, answer.image.T, lower=True, check_finite=False)
        stiff = self.split.rest - answered.T @ answered
        slack = self.slack()
        own = np.linalg.inv(self.split.blocks)
        root = np.sqrt(0.5) * self.own
        scale = weight * root[:, None] * root
        gradient = slopes + weight * self.own * (
            own[:, a, b] - slack.reshape(c, m, c, m)[every, :, every][:, a, b]
        )
        single = inner.astype(np.float32)
        system = self._left(single, self._right(stiff.astype(np.float32), single))
        join_barrier(slack.astype(np.float32), system, a, b, np.sqrt(weight) * root, m)
        near = own[:, a][:, :, a] * own[:, b][:, :, b] + own[:, a][:, :, b] * own[:, b][:, :, a]
        near = full[:, m:-1, m:-1] + scale * near
        system.reshape(c, a.size, c, a.size)[every, :, every, :] += near.astype(np.float32)
        factor = _factored(system)
        along = stiff @ cross
        bend = full[:, m:-1, -1] - (along.reshape(c, 1, m) @ inner)[:, 0]
        stiffness = answer.bend - float(cross @ along)
        sides = np.stack((gradient.reshape(-1), bend.reshape(-1)), axis=1)
        solved = spotrs(factor, sides.astype(np.float32), lower=1)[0].astype(np.float64)
        entries, bend = solved[:, 0], bend.reshape(-1)
        left = stiffness - float(bend @ solved[:, 1])
        if left > 1e-9 * abs(stiffness):
            entries = entries + solved[:, 1] * (float(bend @ entries) / left)
        dearer = -float(bend @ entries) / stiffness if stiffness > 0.0 else 0.0
        follow = (inner @ entries.reshape(c, -1, 1)).reshape(-1) + dearer * cross
        return entries.reshape(c, -1), float(gradient.reshape(-1) @ entries), answer.to(follow)

    def slack(self) -> FloatArray:
        """Return the inverse of ``Q``."""
        lower, failed = dpotri(self.split.factor, lower=1)
        if failed:
            raise LinAlgError("the rest is singular")
        lower = np.tril(lower)
        return np.asarray(lower + np.tril(lower, -1).T)


def _factored(system: SingleArray) -> SingleArray:
    """Return the lower Cholesky factor of what is in the upper triangle, the diagonal lifted as needed.

    Raises
    ------
    LinAlgError
        If there is none.
    """
    diagonal = np.diagonal(system).copy()
    for lift in LIFTS:
        system[np.diag_indices(len(system))] = diagonal * (1.0 + lift)
        # The upper triangle, row by row, is the lower one of LAPACK.
        factor, failed = spotrf(system.T, lower=1, clean=0)
        if not failed:
            return np.asarray(factor)
    raise LinAlgError("the Newton system of the blocks is not definite")
