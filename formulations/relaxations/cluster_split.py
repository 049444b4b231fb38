"""The perspective relaxation with a split in blocks of a few weights each, for counts of weights.

``H = blkdiag(B_g) + Q`` over clusters of weights, ``Q`` semidefinite. The cardinality couples the clusters
through one multiplier, its price; the convex hull of a cluster's part ``1/2 u.B_g u`` is taken over all its
supports (16 of 4 weights), not weight by weight. For every point ``u`` and price >= 0, with
``h = b - Q u``,

    optimum >= const - 1/2 u.Q u - price s - sum over clusters of max_S (1/2 h_S.[B_SS]^-1 h_S - price |S|).

With diagonal blocks that is the bound of the diagonal split; what else blocks can do is found by
`cluster_path`. Source of the hull of a quadratic over few supports: Wei, Gomez & Kucukyavuz (2022), Ideal
formulations for constrained convex optimization problems with indicator variables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import LinAlgError

from formulations.dense_forms import UNDERFLOW, DenseForm, error_factor, joint_form
from formulations.problem import SPLIT_LARGEST, BlockProblem, BoolArray, FloatArray, IntArray, frozen_array
from formulations.relaxations.block_split import set_hulls
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate
from formulations.relaxations.certified import (
    column_norms,
    definiteness_margin,
    rest_is_definite,
    split_form,
)
from formulations.relaxations.cluster_path import ClusterPath
from formulations.relaxations.clusters import (
    Clusters,
    best_by_count,
    choose_clusters,
    held_by_count,
    paired_clusters,
    subsets_of,
    support_rows,
)
from formulations.relaxations.perspective import SPLIT_MARGIN, PerspectiveCertificate
from formulations.solution import Stopped

CLUSTER = 4
"""Weights of a cluster at first."""
LARGEST_CLUSTER = 8
"""Weights of a cluster at last; a certificate has all its supports enumerated."""
CLUSTERED_LARGEST = 1024
"""Weights of a block up to which a split in clusters is tried: the system of its entries has order 2.5 n."""
WORTH_CLUSTERS = 0.02
"""Gap of the diagonal split, relative to the best set, from which clusters are tried."""
MOST_ENTRIES = 1_500
"""Most entries of all blocks, the order of a Newton system: 600 weights in clusters of 4, 333 of 8."""
FIRST_SHARE, SECOND_SHARE = 0.8, 0.9
"""Share of the split that a path begins from, off the boundary of what is feasible; the second one's too."""
FIRST_WEIGHT, SECOND_WEIGHT = 5.0, 0.5
"""Weight of the barrier at its start, times the order, relative to the open gap."""
STEPS = 20
"""Steps on the blocks at most."""
GAIN, PATIENCE = 0.01, 2
"""Share of the open gap that a step has to close, and idle steps in a row that end the path."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterSplitCertificate(RelaxationCertificate):
    """A point ``u`` and blocks ``B_g`` of clusters that prove a lower bound on the joint program of a count.

    Attributes
    ----------
    point : (n,) float64 array
        ``u``, in units of the weights.
    order : (clusters, m) int64 array
        Weights of each cluster, every weight in one place; -1 in empty places.
    blocks : (clusters, m, m) float64 array
        ``B_g``, symmetric and positive definite, in units of ``H``; ``H - blkdiag(B_g)`` is semidefinite.
    kind : str
        "cluster_perspective".
    rho, effective_rank, fixing, basis
        As in `RelaxationCertificate`.
    """

    chosen_are_kept: ClassVar[bool] = True

    point: FloatArray
    order: IntArray
    blocks: FloatArray

    def __post_init__(self) -> None:
        for name, ndim in (("point", 1), ("blocks", 3)):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), ndim))
        order = frozen_array("order", self.order, 2).astype(np.int64)
        order.flags.writeable = False
        object.__setattr__(self, "order", order)

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return "cluster_perspective"

    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return None: the bound has a cost for each support of a cluster, none for each weight."""
        return None

    @property
    def least_eigenvalue(self) -> float:
        """Least eigenvalue of the blocks, of which that of ``H`` is no less, as computed."""
        return float(np.linalg.eigvalsh(self.blocks).min())

    def fixed_below(self, problem: BlockProblem, cutoff: float) -> Fixing | None:
        """Weights that every set of value at most `cutoff` keeps or prunes; None without a proof.

        At the price of the bound: a support of a cluster with the weight instead of the best one, or without.
        """
        given = self._proved_basis(problem)
        found = None if given is None else self._evaluated(problem, given, 2.0)
        if found is None or given is None or not cutoff <= given.cutoff:
            return None
        base, above = found
        held, price = held_above(above, problem.n_keep, 2.0)
        rises = forced_rises(above, price, abs(base) + abs(held), problem.n)
        clusters = Clusters(self.order, problem.n)
        keeping, pruning = (base - held + clusters.scattered(rise.reshape(-1)) for rise in rises)
        return Fixing(keep=pruning > cutoff, prune=keeping > cutoff, cutoff=cutoff)

    def _proved(self, problem: BlockProblem, caution: float) -> float:
        given = self._proved_basis(problem)
        found = None if given is None else self._evaluated(problem, given, caution)
        if found is None or given is None:
            return -math.inf
        return min(found[0] - held_above(found[1], problem.n_keep, caution)[0], given.cutoff)

    def _evaluated(
        self, problem: BlockProblem, given: Fixing, caution: float
    ) -> tuple[float, FloatArray] | None:
        """Return ``const - 1/2 u.Q u`` and what each support of a cluster may hold, (clusters, supports).

        The first rounded down and the second up, `caution` times; -inf for supports that `given` rules out.
        None if anything does not fit the block or is not proved.
        """
        clusters = Clusters(self.order, problem.n)
        if problem.support is not None or not self._fits(problem, clusters):
            return None
        norms = column_norms(problem)
        if not rest_is_definite(problem, clusters.spread(self.blocks), norms):
            return None
        u, m = self.point, self.order.shape[1]
        own, size = (
            self._times(self.blocks, clusters, u),
            self._times(np.abs(self.blocks), clusters, np.abs(u)),
        )
        form = split_form(problem, u, own, size, norms, m)
        residual = clusters.gathered(form.residual).reshape(self.order.shape)
        blur = clusters.gathered(form.error).reshape(self.order.shape)
        values, ceilings = support_ceilings(self.blocks, residual, blur)
        if not bool(np.isfinite(ceilings).all()):
            return None
        above = 0.5 * (values + caution * (ceilings - values))
        base = form.base - caution * (form.lost + UNDERFLOW)
        return base, np.where(self._allowed(clusters, given), above, -np.inf)

    def _allowed(self, clusters: Clusters, given: Fixing) -> BoolArray:
        """Return which supports of a cluster obey fixings, (clusters, supports)."""
        inside = support_rows(self.order.shape[1])[None]
        keep, prune = (
            (clusters.gathered(fixed.astype(np.float64)) > 0.0).reshape(self.order.shape)[:, None, :]
            for fixed in (given.keep, given.prune)
        )
        return np.asarray((inside | ~keep).all(axis=2) & ~(inside & prune).any(axis=2))

    def _times(self, blocks: FloatArray, clusters: Clusters, x: FloatArray) -> FloatArray:
        """Return ``blkdiag(blocks) x``."""
        inside = clusters.gathered(x).reshape(self.order.shape)
        return clusters.scattered((blocks @ inside[:, :, None]).reshape(-1))

    def _fits(self, problem: BlockProblem, clusters: Clusters) -> bool:
        fits = self.point.shape == (problem.n,) and clusters.is_partition
        if not fits or not 1 <= self.order.shape[1] <= LARGEST_CLUSTER:
            return False
        square = self.blocks.shape == (*self.order.shape, self.order.shape[1])
        return square and bool((self.blocks == self.blocks.transpose(0, 2, 1)).all())


def support_ceilings(blocks: FloatArray, h: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return ``h_S.[B_SS]^-1 h_S`` of all supports of each cluster, and what its exact value is at most.

    `h`, which errs by `error` at most, is (clusters, m), results are (clusters, 2^m) in the order of
    `support_rows`. Infinite where a block is not proved definite.
    """
    count, m, _ = blocks.shape
    values = np.zeros((count, 2**m))
    ceilings = np.zeros_like(values)
    place = 1
    for sets in subsets_of(m)[1:]:
        these = slice(place, place + len(sets))
        values[:, these], ceilings[:, these] = set_hulls(blocks, h, error, sets)
        place += len(sets)
    return values, ceilings


def forced_rises(above: FloatArray, price: float, size: float, n: int) -> tuple[FloatArray, FloatArray]:
    """Return what a bound rises by at least where a weight is kept, and where it is pruned, (clusters, m).

    Parameters
    ----------
    above : (clusters, 2^m) float64 array
        What a support of a cluster holds at most, -inf for those ruled out.
    price : float
        Of a member.
    size : float
        Magnitude of the bound's own terms.
    n : int
        Weights of the block.
    """
    inside = support_rows(above.shape[1].bit_length() - 1)
    net = above - price * inside.sum(axis=1)
    best = net.max(axis=1, keepdims=True)
    rises = []
    for members in (inside, ~inside):
        forced = np.where(members.T[None], net[:, None, :], -np.inf).max(axis=2)
        sizes = np.abs(best) + np.where(np.isfinite(forced), np.abs(forced), 0.0)
        rises.append(best - forced - error_factor(16) * (size + sizes + price * n))
    return rises[0], rises[1]


def held_above(above: FloatArray, n_keep: int, caution: float) -> tuple[float, float]:
    """Return what all clusters together hold at most at the best price, rounded up, and that price.

    Any price from 0 proves something; the rounding of the sums is added `caution` times.
    """
    counts = support_rows(above.shape[1].bit_length() - 1).sum(axis=1)
    by_count = best_by_count(above, counts)
    # Where fixings leave no support so small, the first members come at no price.
    first = np.isfinite(by_count).argmax(axis=1)
    finite = by_count[np.isfinite(by_count)]
    missing = first[:, None] - np.arange(by_count.shape[1])
    free = by_count[np.arange(first.size), first][:, None] - missing * (1.0 + float(np.ptp(finite)))
    _, price = held_by_count(np.where(missing > 0, free, by_count), n_keep)
    best = (above - price * counts).max(axis=1)
    total = float(best.sum()) + price * n_keep
    size = float(np.abs(best).sum()) + price * (n_keep + int(counts[-1]) * len(above))
    return total + caution * error_factor(len(above) + 16) * size, price


def takes_clusters(problem: BlockProblem) -> bool:
    """Whether a block keeps a count of weights, has full rank and is small enough for a dense split."""
    full = problem.rows is None or problem.channels is not None or len(problem.rows) >= problem.n
    return problem.support is None and full and 1 < problem.n <= most_clustered(problem)


def most_clustered(problem: BlockProblem) -> int:
    """Return up to how many weights a block may be split in clusters; without a Hessian fewer."""
    return CLUSTERED_LARGEST if problem.hessian is not None else SPLIT_LARGEST


def worth_clusters(bound: float, objective: float) -> bool:
    """Whether a diagonal split with this bound leaves so much open that clusters are worth their time."""
    return objective - bound > WORTH_CLUSTERS * abs(objective)


def relax_in_clusters(
    problem: BlockProblem,
    plain: PerspectiveCertificate,
    cutoff: float,
    stopped: Stopped,
    size: int = LARGEST_CLUSTER,
) -> tuple[ClusterSplitCertificate, BoolArray] | None:
    """Return the best certificate along the path of clusters from a diagonal split, and a set it suggests.

    Parameters
    ----------
    problem : BlockProblem
        One that `takes_clusters`.
    plain : PerspectiveCertificate
        Where the path begins; its split is positive.
    cutoff : float
        Value of a known set, which the steps are measured by; a bound that reaches it is good enough.
    stopped : callable
        Asked between steps whether the time is over.
    size : int, default 8
        Most weights of a cluster. Those of 8 take some five times as long as those of 4, where they begin.

    Returns
    -------
    tuple or None
        None if nothing on the path proves more than `plain`.

    Notes
    -----
    O(n^3 m^3) a step, in single precision; what is found is proved in float64.
    """
    proved = plain.lower_bound(problem)
    if not math.isfinite(proved) or not math.isfinite(cutoff):
        return None
    form, root = joint_form(problem), np.sqrt(problem.hessian_diagonal())
    climb = Climb(
        form,
        problem.n_keep,
        plain.split / root**2,
        plain.point * root / math.sqrt(form.scale),
        best=proved / form.scale - form.constant,
        enough=cutoff / form.scale - form.constant,
    )
    try:
        climb.first(stopped)
        if climb.open and size > CLUSTER and not stopped():
            climb.second(stopped)
    except LinAlgError:
        # Where single precision or the barrier ends; what has been found holds.
        pass
    if climb.found is None:
        return None
    clusters, point, blocks, shares = climb.found
    certificate = ClusterSplitCertificate(
        subject=plain.subject,
        point=clusters.scattered(point) * math.sqrt(form.scale) / root,
        order=clusters.order,
        blocks=_provable(problem, clusters, blocks, root),
        rho=plain.rho,
        effective_rank=plain.effective_rank,
    )
    if certificate.lower_bound(problem) <= proved:
        return None
    keep = np.zeros(problem.n, dtype=np.bool_)
    keep[np.argsort(-clusters.scattered(shares), kind="stable")[: problem.n_keep]] = True
    return certificate, keep


class Climb:
    """The paths of smaller and then of larger clusters, and the best that was found on them.

    Parameters
    ----------
    form : DenseForm
        Of a joint program, its matrix with a unit diagonal.
    n_keep : int
    split, point : (n,) float64 arrays
        A diagonal split of the form's matrix, and a point near the solution of its relaxation.
    best, enough : float
        What they prove, and a bound that is good enough, without the constant of the form.

    Attributes
    ----------
    best : float
        The best bound so far.
    found : tuple or None
        Its clusters, point, blocks and shares kept, in units of the joint form and by place.
    """

    def __init__(
        self,
        form: DenseForm,
        n_keep: int,
        split: FloatArray,
        point: FloatArray,
        *,
        best: float,
        enough: float,
    ) -> None:
        self.form, self.n_keep, self.split, self.point = form, n_keep, split, point
        self.best, self.enough = best, enough
        self.found: tuple[Clusters, FloatArray, FloatArray, FloatArray] | None = None
        self.clusters: Clusters | None = None
        self.path: ClusterPath | None = None

    @property
    def open(self) -> float:
        """What is open between the best bound and a good enough one."""
        return max(self.enough - self.best, 0.0)

    def first(self, stopped: Stopped) -> None:
        """Follow the path of clusters of `CLUSTER` weights from the diagonal split."""
        clusters = choose_clusters(self.form.matrix, self.split, CLUSTER, multiple=LARGEST_CLUSTER // CLUSTER)
        diagonal = clusters.gathered(self.split, 0.5).reshape(clusters.order.shape)
        blocks = FIRST_SHARE * diagonal[:, :, None] * np.eye(CLUSTER)
        self._follow(clusters, blocks, clusters.gathered(self.point), FIRST_WEIGHT, stopped)

    def second(self, stopped: Stopped) -> None:
        """Follow that of pairs of clusters from where the first one ended, where they are few enough."""
        assert self.path is not None
        assert self.clusters is not None
        path, size = self.path, CLUSTER
        if path.c * size * (2 * size + 1) // 2 > MOST_ENTRIES:
            return
        pairs = paired_clusters(path.matrix, path.slack(), size)
        clusters = Clusters(
            np.concatenate([self.clusters.order[part] for part in pairs], axis=1), self.clusters.n
        )
        blocks = np.zeros((path.c // 2, 2 * size, 2 * size))
        for part, place in zip(pairs, (slice(0, size), slice(size, None)), strict=True):
            blocks[:, place, place] = SECOND_SHARE * path.split.blocks[part]
        point = np.concatenate([path.point.reshape(path.c, size)[part] for part in pairs], axis=1).reshape(-1)
        self._follow(clusters, blocks, point, SECOND_WEIGHT, stopped)

    def _follow(
        self, clusters: Clusters, blocks: FloatArray, point: FloatArray, weight: float, stopped: Stopped
    ) -> None:
        """Step along a path from blocks, for as long as it pays."""
        form = self.form
        weight *= max(self.open, 1e-12 * abs(self.enough)) / point.size
        matrix, linear = clusters.matrix(form.matrix), clusters.gathered(form.linear)
        path = ClusterPath(matrix, linear, self.n_keep, blocks, point, weight)
        self.clusters, self.path = clusters, path
        idle = 0
        for _ in range(STEPS):
            if stopped():
                break
            path.relax()
            value = path.bound()
            if value > self.best:
                idle = idle + 1 if value < self.best + GAIN * self.open else 0
                self.best = value
                self.found = clusters, path.point, path.split.blocks, path.kept_shares()
            if not self.open or idle >= PATIENCE or stopped() or not path.improve():
                break


def _provable(problem: BlockProblem, clusters: Clusters, blocks: FloatArray, root: FloatArray) -> FloatArray:
    """Return blocks of the joint form in the units of the block, less what a proof may lose."""
    shape = clusters.order.shape
    scale = clusters.gathered(root, 1.0).reshape(shape)
    blocks = blocks * (scale[:, :, None] * scale[:, None, :]) * (1.0 - SPLIT_MARGIN)
    blocks = 0.5 * (blocks + blocks.transpose(0, 2, 1))
    lost = 2.0 * definiteness_margin(problem, problem.n) * column_norms(problem) ** 2
    every = np.arange(shape[1])
    blocks[:, every, every] -= clusters.gathered(lost).reshape(shape)
    return blocks
