"""A node of the search tree: what is decided, the bound, and where its relaxation starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from formulations.branch_and_bound.cluster_nodes import NodeClusters
from formulations.problem import FloatArray


@dataclass(slots=True)
class Node:
    """One open subproblem.

    Attributes
    ----------
    bound : float
        Lower bound in form units.
    status : (n,) int8 array
        FREE, KEPT or PRUNED of each index of the reduced form.
    split, warm : (n,) float64 arrays
        Diagonal split and starting point of the relaxation; shared with the sibling, so never written
        to in place.
    depth : int
    clusters : NodeClusters or None
        Where the node is bounded by a split in clusters, that split.
    """

    bound: float
    status: NDArray[np.int8]
    split: FloatArray
    warm: FloatArray
    depth: int = 0
    clusters: NodeClusters | None = None

    def copy(self) -> Node:
        """Return one whose decisions are its own."""
        return replace(self, status=self.status.copy())
