"""Which groups go: the quadratic program of the layers that read them, over supports that are groups.

A layer reads x with the weights W; its outputs cost ``1/2 tr(B D G D^T)`` when W becomes W + D, where
``G = E[x x^T] + damping`` and B holds the second moments of the gradients of the loss at its outputs (the
Kronecker-factored Fisher matrix; the identity asks for the outputs themselves). A group owns columns of W.
When the groups P go and the other columns follow,

    f(P) = 1/2 tr(B W_P [(G^-1)_PP]^-1 W_P^T),      W += -W_P [(G^-1)_PP]^-1 (G^-1)_P:

summed over the layers that read the set. The step is the same for every B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import block_diag

from cbs_opt.structure.columns import Columns
from formulations.problem import BlockProblem
from formulations.support import Groups

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

GAIN = 1e-9
"""Share of the loss that an exchange must gain."""
ONE_BY_ONE = 128
"""Groups of one input each up to which exchanges are tried one after the other."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A layer that reads a set of groups.

    Attributes
    ----------
    weight : (out, p) float64 array
    gram : (p, p) float64 array
        Positive definite: damping is in it.
    outputs : (out, out) float64 array
        The matrix B.
    columns : (n_groups, k) int64 array
        What each group owns of the inputs; what none owns always stays.
    """

    weight: FloatArray
    gram: FloatArray
    outputs: FloatArray
    columns: IntArray


class GroupProgram:
    """The program of one set of groups, over all its readers."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        self.readers = tuple(readers)
        self.n_groups = int(readers[0].columns.shape[0])
        self.inverse = [np.linalg.inv(reader.gram) for reader in readers]

    def loss(self, keep: BoolArray) -> float:
        """Return f of what `keep` leaves out, (n_groups,); O(p^3)."""
        total = 0.0
        for reader, inverse in zip(self.readers, self.inverse, strict=True):
            gone = reader.columns[~keep].reshape(-1)
            part = reader.weight[:, gone]
            step = np.linalg.solve(inverse[np.ix_(gone, gone)], part.T)
            total += 0.5 * float(np.sum((reader.outputs @ part) * step.T))
        return total

    def greedy(self, n_keep: int) -> tuple[BoolArray, FloatArray]:
        """Take out one group after another, that of the least saliency, until `n_keep` are left.

        Returns what is kept, and f after 0, 1, 2, ... removals; O(p^2 k) for each, O(p^2) where groups own
        one input each.
        """
        if self._columns is not None:
            return self._columns.greedy(n_keep)
        state = _State(self, np.ones(self.n_groups, dtype=np.bool_))
        losses = [0.0]
        while int(state.keep.sum()) > n_keep:
            saliency = state.saliency()
            group = int(np.argmin(saliency))
            losses.append(losses[-1] + float(saliency[group]))
            state.remove(group)
        return state.keep, np.array(losses)

    def swaps(self, keep: BoolArray, rounds: int = 3) -> tuple[BoolArray, float]:
        """Exchange a group that went for one that stayed while it gains, first come first served.

        A round tries every group that went: it returns, and the best of the others goes. Of many groups of
        one input each, a round makes all exchanges that gain by themselves, of which the better half and so
        on if together they do not. Returns what is kept, and its f; O(p^3) for each try.
        """
        if self._columns is not None and self.n_groups > ONE_BY_ONE:
            return self._swapped_together(self._columns, keep, rounds)
        keep, best = keep.copy(), self.loss(keep)
        for _ in range(rounds):
            before = best
            for group in np.flatnonzero(~keep).tolist():
                trial = keep.copy()
                trial[group] = True
                state = _State(self, trial)
                saliency = state.saliency()
                saliency[group] = np.inf
                other = int(np.argmin(saliency))
                value = self.loss(trial) + float(saliency[other])
                if value < best - GAIN * abs(best):
                    trial[other] = False
                    keep, best = trial, value
            if best >= before:
                break
        return keep, self.loss(keep)

    @cached_property
    def _columns(self) -> Columns | None:
        """The matrices of groups that own one input of every reader; None if some own more."""
        if any(reader.columns.shape[1] > 1 for reader in self.readers):
            return None
        scatter, moment = [], []
        for reader, inverse in zip(self.readers, self.inverse, strict=True):
            own = reader.columns[:, 0]
            scatter.append(np.asarray(inverse[np.ix_(own, own)]))
            moment.append(reader.weight[:, own].T @ reader.outputs @ reader.weight[:, own])
        return Columns(scatter, moment)

    def _swapped_together(self, columns: Columns, keep: BoolArray, rounds: int) -> tuple[BoolArray, float]:
        best = self.loss(keep)
        for _ in range(rounds):
            exchanges = columns.exchanges(keep)
            while exchanges:
                trial = keep.copy()
                for _, goes, returns in exchanges:
                    trial[goes], trial[returns] = False, True
                value = self.loss(trial)
                if value < best - GAIN * abs(best):
                    keep, best = trial, value
                    break
                exchanges = exchanges[: len(exchanges) // 2]
            else:
                break
        return keep, best

    def enumerated(self, n_keep: int) -> tuple[BoolArray, float]:
        """Return the best of all sets of `n_keep` groups, and its f; O(p^3) for each of them."""
        sets = (
            np.isin(np.arange(self.n_groups), kept) for kept in combinations(range(self.n_groups), n_keep)
        )
        best = min(sets, key=self.loss)
        return best, self.loss(best)

    def updated(self, keep: BoolArray) -> list[FloatArray]:
        """Return the weights of every reader, (out, p), with zeros for what went and the others optimal."""
        found = []
        for reader, inverse in zip(self.readers, self.inverse, strict=True):
            gone = reader.columns[~keep].reshape(-1)
            step = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
            weight = reader.weight - reader.weight[:, gone] @ step
            weight[:, gone] = 0.0
            found.append(weight)
        return found

    def problem(self, n_keep: int, name: str = "") -> BlockProblem:
        """Return the same program as one block, which exact methods and bounds take; (out p)^2 numbers.

        Raises what `BlockProblem` raises if a matrix is singular to rounding.
        """
        hessians, labels, weights = [], [], []
        for reader, inverse in zip(self.readers, self.inverse, strict=True):
            # Columns of no group (a bias, channels of another set) follow as they like: what is left of G.
            owned = np.sort(reader.columns.reshape(-1))
            hessians.append(np.kron(reader.outputs, np.linalg.inv(inverse[np.ix_(owned, owned)])))
            group_of = np.empty(reader.weight.shape[1], dtype=np.int64)
            group_of[reader.columns] = np.arange(self.n_groups)[:, None]
            labels.append(np.tile(group_of[owned], len(reader.weight)))
            weights.append(reader.weight[:, owned].reshape(-1))
        support = Groups(np.concatenate(labels), n_keep)
        hessian = block_diag(*hessians)
        return BlockProblem(weights=np.concatenate(weights), hessian=hessian, support=support, name=name)


class _State:
    """Weights and inverse matrices after some groups went."""

    def __init__(self, program: GroupProgram, keep: BoolArray) -> None:
        self.keep = keep.copy()
        self._readers = program.readers
        self._weights, self._inverse = [], []
        for reader, inverse in zip(program.readers, program.inverse, strict=True):
            gone = reader.columns[~keep].reshape(-1)
            step = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone])
            self._weights.append(reader.weight - reader.weight[:, gone] @ step)
            self._inverse.append(inverse - inverse[:, gone] @ step)

    def saliency(self) -> FloatArray:
        """Return 1/2 w_g^T [(H^-1)_gg]^-1 w_g of every group that is left, infinite for the others."""
        total = np.full(self.keep.size, np.inf)
        left = np.flatnonzero(self.keep)
        total[left] = 0.0
        for reader, weight, inverse in zip(self._readers, self._weights, self._inverse, strict=True):
            columns = reader.columns[left]
            blocks = inverse[columns[:, :, None], columns[:, None, :]]
            parts = weight[:, columns].transpose(1, 2, 0)
            total[left] += 0.5 * np.einsum(
                "gko,gko->g", np.linalg.solve(blocks, parts), parts @ reader.outputs, optimize=True
            )
        return total

    def remove(self, group: int) -> None:
        """Take a group out, and let the others follow."""
        for place, reader in enumerate(self._readers):
            columns = reader.columns[group]
            inverse = self._inverse[place]
            step = np.linalg.solve(inverse[np.ix_(columns, columns)], inverse[columns])
            self._weights[place] = self._weights[place] - self._weights[place][:, columns] @ step
            self._inverse[place] = inverse - inverse[:, columns] @ step
        self.keep[group] = False
