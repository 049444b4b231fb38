"""Sets of many groups that own one input of every reader, as the neurons of a wide layer do.

What a set costs is said by two matrices a reader, ``S = G^-1`` and ``M = W^T B W`` over the inputs that
groups own. With the groups P gone, of which the others K follow,

    T = (S_PP)^-1,   C = T S_PK,   S' = S_KK - S_KP C,   M' = M_KK - M_KP C - C^T M_PK + C^T M_PP C,

a group i of K costs ``1/2 M'_ii / S'_ii`` more, and one j of P that comes back gains ``1/2 Q_jj / T_jj`` with
``Q = T M_PP T``. Both at once follow from the entries of C and of ``R = T (M_PK - M_PP C)`` alone.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

PANEL = 64
"""Removals whose effect on the matrices is added up before it is written into them."""


class Columns:
    """The two matrices of every reader; of a loss that is a sum over readers."""

    def __init__(self, scatter: list[FloatArray], moment: list[FloatArray]) -> None:
        self.scatter = scatter
        self.moment = moment
        self.n_groups = len(scatter[0])

    def greedy(self, n_keep: int) -> tuple[BoolArray, FloatArray]:
        """Take out one group after another, that of the least saliency, until `n_keep` are left.

        Returns what is kept, and the loss after 0, 1, 2, ... removals; O(p (p + PANEL)) for each.
        """
        keep = np.ones(self.n_groups, dtype=np.bool_)
        parts = [_Elimination(*pair) for pair in zip(self.scatter, self.moment, strict=True)]
        losses = [0.0]
        for _ in range(self.n_groups - n_keep):
            saliency = np.sum([part.saliency() for part in parts], axis=0)
            saliency[~keep] = np.inf
            group = int(np.argmin(saliency))
            losses.append(losses[-1] + float(saliency[group]))
            keep[group] = False
            for part in parts:
                part.remove(group)
        return keep, np.array(losses)

    def exchanges(self, keep: BoolArray) -> list[tuple[float, int, int]]:
        """Return exchanges that gain: what the loss falls by, the group that goes and the one that returns.

        The largest gains first, every group in one of them at most. Gains are those of one exchange alone.
        O(p^3), and a table of as many pairs as there are.
        """
        table = np.zeros((int((~keep).sum()), int(keep.sum())))
        for scatter, moment in zip(self.scatter, self.moment, strict=True):
            table += _pairs(scatter, moment, keep)
        gone, kept = np.flatnonzero(~keep), np.flatnonzero(keep)
        found = []
        gaining = np.flatnonzero(table.reshape(-1) < 0.0)
        free_gone, free_kept = np.ones(gone.size, dtype=np.bool_), np.ones(kept.size, dtype=np.bool_)
        for place in gaining[np.argsort(table.reshape(-1)[gaining], kind="stable")].tolist():
            row, column = divmod(place, kept.size)
            if free_gone[row] and free_kept[column]:
                free_gone[row] = free_kept[column] = False
                found.append((-float(table[row, column]), int(kept[column]), int(gone[row])))
        return found


def _pairs(scatter: FloatArray, moment: FloatArray, keep: BoolArray) -> FloatArray:
    """Return by what a reader's loss changes if one of those gone comes back and one goes, (gone, kept)."""
    gone, kept = np.flatnonzero(~keep), np.flatnonzero(keep)
    inner = np.linalg.inv(scatter[np.ix_(gone, gone)])
    follow = inner @ scatter[np.ix_(gone, kept)]
    own, cross = moment[np.ix_(gone, gone)], moment[np.ix_(gone, kept)]
    left = np.diag(scatter)[kept] - np.einsum("jk,jk->k", scatter[np.ix_(gone, kept)], follow)
    rest = cross - own @ follow
    pull = np.diag(moment)[kept] - np.einsum("jk,jk->k", follow, cross + rest)
    back = np.einsum("ij,ij->i", inner @ own, inner)
    share = inner @ rest
    going = np.maximum(pull, 0.0) / left
    returning = back[:, None] - 2.0 * follow * share / left + follow**2 * (pull / left**2)
    return np.asarray(
        0.5 * (going - np.maximum(returning, 0.0) / (np.diag(inner)[:, None] + follow**2 / left))
    )


class _Elimination:
    """The matrices of a reader while groups go, with the last removals kept beside them."""

    def __init__(self, scatter: FloatArray, moment: FloatArray) -> None:
        self._scatter, self._moment = scatter.copy(), moment.copy()
        self._own, self._pull = np.diag(scatter).copy(), np.diag(moment).copy()
        size = len(scatter)
        self._steps, self._moves = np.zeros((size, PANEL)), np.zeros((size, PANEL))
        self._pivots = np.zeros(PANEL)
        self._count = 0

    def saliency(self) -> FloatArray:
        """Return the cost of each group that is left; anything for the others."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(0.5 * np.maximum(self._pull, 0.0) / self._own)

    def remove(self, group: int) -> None:
        """Take a group out."""
        done = self._count
        steps, moves = self._steps[:, :done], self._moves[:, :done]
        column = self._scatter[:, group] - steps @ (self._pivots[:done] * steps[group])
        felt = self._moment[:, group] - moves @ steps[group] - steps @ moves[group]
        pivot = column[group]
        step = column / pivot
        move = felt - 0.5 * felt[group] * step
        self._own -= pivot * step**2
        self._pull -= 2.0 * move * step
        self._steps[:, done], self._moves[:, done], self._pivots[done] = step, move, pivot
        self._count += 1
        if self._count == PANEL:
            self._scatter -= (self._steps * self._pivots) @ self._steps.T
            both = self._moves @ self._steps.T
            self._moment -= both + both.T
            self._count = 0
