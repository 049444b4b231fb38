"""What goes together: every index along an axis of a parameter is an atom, and atoms are united.

A network runs once, and every tensor that it makes carries *labels*: integer tensors of as many axes, each of
size 1 or that of the tensor, that say which atom an element stands or falls with. Where two labelled elements
meet, their atoms are united; what cannot be taken out is fixed, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IntArray = NDArray[np.int64]

NONE = -1
"""The label of an element that belongs to no atom, and always stays."""


class Atoms:
    """Disjoint sets of atoms, of which some are fixed."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._stays = np.zeros(0, dtype=np.bool_)
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return self._parent.size

    def new(self, count: int) -> IntArray:
        """Return `count` new atoms, numbered on from those that there are."""
        added = np.arange(len(self), len(self) + count)
        self._parent = np.concatenate((self._parent, added))
        self._stays = np.concatenate((self._stays, np.zeros(count, dtype=np.bool_)))
        return added

    def roots(self, atoms: IntArray) -> IntArray:
        """Return one atom for each set, the same for all its members; `NONE` stays."""
        atoms = np.ascontiguousarray(atoms)
        if not atoms.size:
            return atoms
        found = np.where(atoms >= 0, self._parent[atoms], NONE)
        while True:
            above = np.where(found >= 0, self._parent[found], NONE)
            if np.array_equal(above, found):
                break
            found = above
        known = atoms >= 0
        self._parent[atoms[known]] = found[known]
        return found

    def unite(self, one: IntArray, other: IntArray, reason: str) -> None:
        """Unite the sets of atoms that meet in two arrays (broadcast); what meets `NONE` is fixed."""
        left, right = np.broadcast_arrays(self.roots(one), self.roots(other))
        different = left != right
        pairs = np.unique(np.stack((left[different], right[different]), 1), axis=0)
        for a, b in pairs.tolist():
            if a == NONE or b == NONE:
                self.fix(np.array([max(a, b)]), reason)
                continue
            a, b = self._root(a), self._root(b)
            if a == b:
                continue
            self._parent[b] = a
            if self._stays[b]:
                self._fix(a, self._reasons[b])

    def fix(self, atoms: IntArray, reason: str) -> None:
        """Say that atoms cannot be taken out; the first reason of a set is kept."""
        for root in np.unique(self.roots(atoms.reshape(-1))).tolist():
            if root != NONE:
                self._fix(root, reason)

    def reason(self, atom: int) -> str | None:
        """Return why an atom cannot be taken out; None if it can."""
        return self._reasons.get(self._root(atom))

    def fixed(self, atoms: IntArray) -> NDArray[np.bool_]:
        """Return which atoms cannot be taken out; `NONE` is one of them."""
        roots = self.roots(atoms)
        found = roots == NONE
        found[~found] = self._stays[roots[~found]]
        return np.asarray(found)

    def _root(self, atom: int) -> int:
        """Return what `roots` does for one atom, which may be `NONE`."""
        while atom != NONE and self._parent[atom] != atom:
            atom = int(self._parent[atom])
        return atom

    def _fix(self, root: int, reason: str) -> None:
        self._reasons.setdefault(root, reason)
        self._stays[root] = True


def axes_of(labels: Tensor) -> list[int]:
    """Return the axes along which labels vary."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def compressed(labels: Tensor) -> Tensor:
    """Return labels with every axis along which they are constant cut to size 1."""
    for axis, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(axis, 0, 1)
            if bool((labels == first).all()):
                labels = first
    return labels


def placed(labels: Tensor, axes: Sequence[int | None], ndim: int) -> Tensor:
    """Return labels of `ndim` axes, with axis i of the old at ``axes[i]``; None drops an axis of size 1."""
    shape = [1] * ndim
    order = []
    for old, new in enumerate(axes):
        if new is not None:
            shape[new] = labels.shape[old]
            order.append((new, old))
    kept = [old for _, old in sorted(order)]
    dropped = [old for old in range(labels.ndim) if old not in kept]
    return labels.permute(*kept, *dropped).reshape(shape)


def along(labels: Tensor, axis: int) -> IntArray:
    """Return labels that vary along one axis as a vector."""
    return np.asarray(labels.reshape(-1).numpy() if labels.shape[axis] > 1 else labels.reshape(1).numpy())


def to_labels(atoms: IntArray, axis: int, ndim: int) -> Tensor:
    """Return a vector of atoms as labels of a tensor of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = atoms.size
    return torch.from_numpy(np.ascontiguousarray(atoms)).reshape(shape)


def varying(labels: Iterable[Tensor], axes: Iterable[int]) -> list[Tensor]:
    """Return those labels that vary along one of `axes`."""
    wanted = set(axes)
    return [entry for entry in labels if wanted & set(axes_of(entry))]
