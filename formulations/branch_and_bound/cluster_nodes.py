"""Nodes of the joint program bounded by a split in clusters of weights, which is carried along and improved.

As a node of the diagonal split: pruned weights drop out, kept ones are eliminated by a Schur complement, the
relaxation of what is left is solved from where the parent's ended, a Newton step improves the split, weights
are fixed by the bound, and the branch is where the relaxation is estimated to rise most in both children. But
the split has blocks of four weights. Such a node costs ten times as much, of which a tree takes a tenth to a
hundredth where ``H`` has full rank. The split has to go on improving: with that of the root in all nodes a
tree is larger than one of diagonal splits that adapt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, solve

from formulations.branch_and_bound.outcomes import BRANCH, CLOSED, FAILED, LEAF
from formulations.dense_forms import error_factor
from formulations.problem import FloatArray, IntArray
from formulations.reduction import FREE, KEPT, PRUNED, reduce_joint
from formulations.relaxations.cluster_path import ClusterPath, Split
from formulations.relaxations.cluster_split import CLUSTER, forced_rises, held_above, support_ceilings
from formulations.relaxations.clusters import Clusters
from formulations.relaxations.perspective import SPLIT_MARGIN

SMALLEST = 32
"""Free weights below which a node goes on with a diagonal split: its kernels are faster there."""
WEIGHT = 2.0
"""Weight of the barrier in a node, times the free weights, relative to its gap."""
ROUNDS = 2
"""Steps on the blocks of a node at most."""
POINT_STEPS = 20
"""Steps on the point before each at most: away from its best a node has no bound above its parent's."""
WORTH_A_ROUND = 0.1
"""Share of a node's gap that a step has to close to be followed by another."""
REDUCED_AGAIN = 0.08
"""Share of a node's free weights that must be fixed before it is reduced once more."""
FARTHER = 0.9
"""What becomes of the blocks where no step is found from them."""
LOOSE = 0.7
"""Share of filled places below which clusters are merged."""
LEAST_SCORE = 1e-4
"""Share of the gap that a child counts for at least."""


@dataclass(frozen=True, eq=False)
class NodeClusters:
    """Clusters of the free weights of a node, and the blocks that are split off.

    Attributes
    ----------
    order : (c, 4) int64 array
        Weights of the form, -1 in empty places, which come last.
    blocks : (c, 4, 4) float64 array
        In units of the form's matrix; of a unit matrix in empty places.
    """

    order: IntArray
    blocks: FloatArray

    @classmethod
    def of(cls, clusters: Clusters, blocks: FloatArray, root: FloatArray) -> NodeClusters:
        """Return those of a form whose diagonal has the `root`, from blocks of one with a unit diagonal."""
        shape = clusters.order.shape
        place = np.argsort(clusters.order < 0, axis=1, kind="stable")
        every = np.arange(shape[0])[:, None]
        scale = clusters.gathered(root, 1.0).reshape(shape)
        blocks = blocks * (scale[:, :, None] * scale[:, None, :])
        order = clusters.order[every, place]
        blocks = blocks[every[:, :, None], place[:, :, None], place[:, None, :]]
        some = order[:, 0] >= 0
        return cls(order[some], blocks[some])

    def without(self, status: IntArray) -> NodeClusters:
        """Return the clusters of the weights that are still free.

        A pruned weight leaves its block, a kept one is eliminated from it: what is left of the form's matrix
        is no smaller than what is left of the blocks.
        """
        held = np.where(self.order >= 0, status[self.order], FREE)
        order, blocks = self.order.copy(), self.blocks.copy()
        for cluster in np.flatnonzero((held != FREE).any(axis=1)):
            row, own = held[cluster], self.blocks[cluster]
            free = np.flatnonzero((row == FREE) & (self.order[cluster] >= 0))
            kept = np.flatnonzero(row == KEPT)
            part = own[np.ix_(free, free)]
            if kept.size:
                across = own[np.ix_(kept, free)]
                part = part - across.T @ solve(own[np.ix_(kept, kept)], across, assume_a="pos")
            order[cluster], blocks[cluster] = -1, np.eye(CLUSTER)
            order[cluster, : free.size] = self.order[cluster, free]
            blocks[cluster, : free.size, : free.size] = 0.5 * (part + part.T)
        some = order[:, 0] >= 0
        return NodeClusters(order[some], blocks[some])

    def merged(self, matrix: FloatArray, place: IntArray) -> NodeClusters:
        """Return fewer clusters, those that share most put together where both fit into one.

        `matrix` is of the free weights, of which the form's weight i is number ``place[i]``.
        """
        filled = self.order >= 0
        sizes = filled.sum(axis=1)
        free = len(matrix)
        if free >= LOOSE * self.order.size:
            return self
        local = Clusters(np.where(filled, place[self.order], -1), free)
        slack = matrix - 0.98 * local.spread(self.blocks)
        try:
            shared = np.abs(matrix * np.linalg.inv(slack))
        except np.linalg.LinAlgError:
            return self
        member = np.zeros((free, len(sizes)))
        member[local.order[filled], np.nonzero(filled)[0]] = 1.0
        gains = member.T @ shared @ member
        gains[sizes[:, None] + sizes > CLUSTER] = -1.0
        gains[np.tril_indices(len(sizes))] = -1.0
        single = np.ones(len(sizes), dtype=np.bool_)
        order, blocks = self.order.copy(), self.blocks.copy()
        for pair in np.argsort(-gains, axis=None, kind="stable")[: int((gains >= 0.0).sum())]:
            left, right = divmod(int(pair), len(sizes))
            if single[left] and single[right]:
                single[left] = single[right] = False
                inner = slice(sizes[left], sizes[left] + sizes[right])
                order[left, inner] = self.order[right, : sizes[right]]
                blocks[left, inner, inner] = self.blocks[right, : sizes[right], : sizes[right]]
                order[right] = -1
        some = order[:, 0] >= 0
        return NodeClusters(order[some], blocks[some])

    def diagonal(self, split: FloatArray) -> FloatArray:
        """Return `split` with that of the clusters' weights put in place: the blocks' least eigenvalues."""
        found = split.copy()
        filled = self.order >= 0
        least = np.linalg.eigvalsh(self.blocks)[:, 0] * (1.0 - 1e-9)
        found[self.order[filled]] = np.broadcast_to(least[:, None], self.order.shape)[filled]
        return found


@dataclass
class ClusterNode:
    """A node on its way: bounded and reduced until it is closed or has to be branched on.

    Parameters
    ----------
    matrix, linear : (n, n) and (n,) float64 arrays
        The form.
    count : int
        How many to keep.
    status : (n,) int64 array
        FREE, KEPT or PRUNED; updated in place.
    point : (n,) float64 array
        Where the relaxation starts; replaced by where it ended.
    clusters : NodeClusters
        Of all weights that are free; replaced.
    bound : float
        Known bound without the constant of the form; raised.
    cutoff : float
        Bound from which the node is closed.
    fixing : bool
        Whether weights are fixed by the bound.
    """

    matrix: FloatArray
    linear: FloatArray
    count: int
    status: IntArray
    point: FloatArray
    clusters: NodeClusters
    bound: float
    cutoff: float
    fixing: bool = True

    def evaluate(self) -> tuple[int, int, bool]:
        """Bound the node; its outcome, the index to branch on and whether to keep it first.

        Notes
        -----
        O(n^3) a step of the point, and of the blocks in single precision, with n of the free weights.
        """
        while True:
            kept, free = (np.flatnonzero(self.status == value) for value in (KEPT, FREE))
            size = self.count - kept.size
            if not 0 <= size <= free.size:
                self.bound = np.inf
                return CLOSED, -1, False
            if size in (0, free.size):
                self.status[free] = KEPT if size else PRUNED
                return LEAF, -1, False
            definite, reduced, linear, constant = reduce_joint(self.matrix, self.linear, kept, free)
            if not definite:
                return FAILED, -1, False
            place = np.full(self.status.size, -1)
            place[free] = np.arange(free.size)
            self.clusters = self.clusters.without(self.status).merged(reduced, place)
            try:
                found = self._bounded(reduced, linear, size, free, constant)
            except LinAlgError:
                # The parent's bound holds; the children begin further off the boundary.
                self.clusters = NodeClusters(self.clusters.order, FARTHER * self.clusters.blocks)
                return BRANCH, int(free[np.abs(self.point[free]).argmax()]), True
            if found is not None:
                return found

    def _bounded(
        self, matrix: FloatArray, linear: FloatArray, size: int, free: IntArray, constant: float
    ) -> tuple[int, int, bool] | None:
        """Bound what is left of the node; None if so much was fixed that it is to be reduced again."""
        place = np.full(self.status.size, -1)
        place[free] = np.arange(free.size)
        local = Clusters(np.where(self.clusters.order >= 0, place[self.clusters.order], -1), free.size)
        shape = local.order.shape
        root = np.sqrt(np.diagonal(matrix))
        scale = local.gathered(root, 1.0)
        both = scale.reshape(shape)[:, :, None] * scale.reshape(shape)[:, None, :]
        blocks = self.clusters.blocks / both * (1.0 - SPLIT_MARGIN)
        # Empty places stand for weights of their own.
        empty = np.flatnonzero(~local.filled)
        blocks[empty // CLUSTER, empty % CLUSTER, empty % CLUSTER] = 0.5
        whole = local.matrix(matrix / root[:, None] / root)
        margin = definite_margin(len(whole))
        whole[np.diag_indices(len(whole))] -= margin
        gap = self.cutoff - self.bound
        path = ClusterPath(
            whole,
            local.gathered(linear / root),
            size,
            blocks,
            local.gathered(self.point[free]) * scale,
            WEIGHT * gap / free.size,
        )
        path.relax(POINT_STEPS)
        reached = path.bound()
        best = path.split, path.point
        for _ in range(ROUNDS):
            if constant + reached >= self.cutoff or not path.improve():
                break
            path.relax(POINT_STEPS)
            value = path.bound()
            gained, worth = value - reached, WORTH_A_ROUND * (self.cutoff - constant - value)
            if gained > 0.0:
                reached, best = value, (path.split, path.point)
            if gained < worth:
                break
        proof = proved(path, *best, margin)
        self.bound = max(self.bound, constant + proof.bound)
        self.point = self.point.copy()
        self.point[free] = local.scattered(best[1] / scale)
        self.clusters = NodeClusters(self.clusters.order, best[0].blocks * both)
        gap = self.cutoff - self.bound
        if not gap > 0.0:
            return CLOSED, -1, False
        if self.fixing and self._fixed(proof, local, free, constant) >= max(1.0, REDUCED_AGAIN * free.size):
            return None
        undecided = self.status[free] == FREE
        if not undecided.any():
            return None
        down, up = (local.scattered(rise) for rise in path.rises())
        least = LEAST_SCORE * gap
        score = np.clip(down, least, gap) * np.clip(up, least, gap)
        index = int(np.where(undecided, score, -1.0).argmax())
        return BRANCH, int(free[index]), bool(down[index] >= up[index])

    def _fixed(self, proof: Proof, local: Clusters, free: IntArray, constant: float) -> int:
        """Decide the free weights whose other value lifts the bound to the cutoff; how many."""
        keeping, pruning = (local.scattered(rise.reshape(-1)) for rise in proof.rises)
        base = constant + proof.bound
        undecided = self.status[free] == FREE
        pruned = undecided & (base + keeping >= self.cutoff)
        kept = undecided & (base + pruning >= self.cutoff) & ~pruned
        self.status[free[pruned]], self.status[free[kept]] = PRUNED, KEPT
        return int(pruned.sum() + kept.sum())


@dataclass(frozen=True)
class Proof:
    """What a point and blocks prove, with all rounding bounded.

    Attributes
    ----------
    bound : float
        Without the constant.
    rises : (2, c, m) float64 array
        What each weight's being kept, and pruned, lifts it by at least.
    """

    bound: float
    rises: tuple[FloatArray, FloatArray]


def definite_margin(order: int) -> float:
    """Return what a Cholesky factorisation may lose of a matrix with a diagonal of at most 1.

    Source: Higham, Accuracy and Stability of Numerical Algorithms (2002), theorem 10.3.
    """
    return 2.0 * order * error_factor(order + 8)


def proved(path: ClusterPath, split: Split, point: FloatArray, margin: float) -> Proof:
    """Return what a point and blocks prove of the form of a path, whose diagonal `margin` was taken from.

    That has made sure that what the blocks leave is semidefinite, although a factorisation rounds.
    """
    u, blocks = point, split.blocks
    rest = np.diagonal(split.rest) + margin
    product = split.rest @ u + margin * u
    # An inner product of Q with u errs by gamma a_i (a . |u|), a_i^2 = Q_ii.
    own, gamma = np.sqrt(np.maximum(rest, 0.0)), error_factor(u.size + 16)
    reach = float(own @ np.abs(u))
    residual = path.linear - product
    blur = gamma * (own * reach + np.abs(path.linear) + np.abs(product))
    values, ceilings = support_ceilings(blocks, residual.reshape(path.c, -1), blur.reshape(path.c, -1))
    above = 0.5 * (values + 1.01 * (ceilings - values))
    if not bool(np.isfinite(above).all()):
        nothing = np.full(blocks.shape[:2], -np.inf)
        return Proof(-np.inf, (nothing, nothing))
    held, price = held_above(above, path.n_keep, 1.01)
    base = -0.5 * float(u @ product)
    bound = base - held - 1.01 * gamma * (reach * reach + abs(base) + abs(held))
    keeping, pruning = forced_rises(above, price, abs(base) + abs(held), u.size)
    return Proof(bound, (keeping, pruning))
