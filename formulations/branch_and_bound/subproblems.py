"""Subproblems of either program for the search: root, compaction, children, incumbents."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from formulations.branch_and_bound.cluster_nodes import SMALLEST, ClusterNode, NodeClusters
from formulations.branch_and_bound.groups import evaluate_groups
from formulations.branch_and_bound.joint import evaluate_joint, improve_joint
from formulations.branch_and_bound.node import Node
from formulations.branch_and_bound.node_rules import NodeRules
from formulations.branch_and_bound.outcomes import BRANCH, FAILED
from formulations.branch_and_bound.selection import evaluate_selection, improve_selection
from formulations.cells import size_left
from formulations.dense_forms import DenseForm
from formulations.errors import NotPositiveDefiniteError
from formulations.incumbents import descend
from formulations.problem import SPLIT_LARGEST, BoolArray, FloatArray, IntArray
from formulations.reduction import FREE, KEPT, PRUNED, reduce_joint, reduce_selection
from formulations.relaxations.cluster_split import Climb
from formulations.relaxations.perspective import relax_joint
from formulations.relaxations.tightening import SPLIT_ROUNDS
from formulations.solution import Limits, Stopped
from formulations.support import Groups, Size, Support, largest_in

NODE_SPLIT_ROUNDS = 1
"""Barrier steps on the diagonal split in a node of the tree."""
BARRIER_SHARE = 0.3
"""Barrier weight times order, as a share of the node's gap."""
RELAXATION_STEPS = 150
"""Most steps of the relaxation of one node."""
RELAXATION_TOLERANCE = 1e-3
"""Share of a node's gap that the relaxation has to gain to go on."""
IMPROVING_SWAPS = 300
"""Swaps of one descent inside a node."""


@dataclass(frozen=True, kw_only=True)
class Subproblems:
    """A dense form, possibly with some indices of the block already decided and eliminated.

    Attributes
    ----------
    program : {"selection", "joint"}
    form : DenseForm
        Of the whole block; values of sets are computed from it.
    matrix, linear, constant
        The form on the indices still open.
    count : int or Cells
        How many of them to choose, of all or in each cell: to keep (joint) or to prune (selection).
    index : (m,) int64 array
        Place of the open indices in the block; in its groups where the selection program has such.
    decided_kept : (n,) bool array
        Indices of the block, or groups, decided as kept.
    support : Support or None
        Of the block; None for a count.
    tied : Groups or None
        In the joint program, the groups that the open indices make up.
    fixing, diagonal_split : bool
        Switches of the search.
    """

    program: str
    form: DenseForm
    matrix: FloatArray
    linear: FloatArray
    constant: float
    count: Size
    index: IntArray
    decided_kept: BoolArray
    support: Support | None = None
    tied: Groups | None = None
    fixing: bool = True
    diagonal_split: bool = True

    def evaluate(self, node: Node, cutoff: float, rounds: int, patience: int) -> tuple[int, int, bool]:
        """Raise ``node.bound``; the outcome, the index to branch on, whether to keep it first."""
        if node.clusters is not None:
            return self._evaluated_in_clusters(node, node.clusters, cutoff, rounds, patience)
        kernel: Any = evaluate_joint if self.program == "joint" else evaluate_selection
        kernel = kernel if self.tied is None else evaluate_groups
        status = node.status.astype(np.int64)
        node.split, node.warm = node.split.copy(), node.warm.copy()
        outcome, bound, index, keep_first = kernel(
            self.matrix,
            self.linear,
            self.count if self.tied is None else self.tied,
            status,
            node.split,
            node.warm,
            float(cutoff - self.constant),
            NodeRules(
                fixing=self.fixing,
                positive_split=self.program == "joint",
                split_rounds=rounds if self.diagonal_split else 0,
                patience=patience,
                barrier_share=BARRIER_SHARE,
                steps=RELAXATION_STEPS,
                tolerance=RELAXATION_TOLERANCE,
            ),
            *self._reach(),
        )
        if outcome == FAILED:
            raise NotPositiveDefiniteError("damping", "a kept block of H is singular", "use a larger damping")
        node.status = status.astype(np.int8)
        node.bound = max(node.bound, bound + self.constant)
        return outcome, index, keep_first

    def _reach(self) -> tuple[FloatArray, ...]:
        """Return what the joint kernel needs of the form's rounding; the other one needs none."""
        if self.program != "joint":
            return ()
        reach = self.form.rounding.reach
        reach[3] -= self.constant
        return (reach,)

    def _evaluated_in_clusters(
        self, node: Node, clusters: NodeClusters, cutoff: float, rounds: int, patience: int
    ) -> tuple[int, int, bool]:
        """Raise the bound of a node by its clusters; one that is small goes on with a diagonal split."""
        status = node.status.astype(np.int64)
        if np.count_nonzero(status == FREE) < SMALLEST:
            left = clusters.without(status)
            node.split, node.clusters = left.diagonal(node.split), None
            return self.evaluate(node, cutoff, rounds, patience)
        assert isinstance(self.count, int)
        here = ClusterNode(
            matrix=self.matrix,
            linear=self.linear,
            count=self.count,
            status=status,
            point=node.warm,
            clusters=clusters,
            bound=node.bound - self.constant,
            cutoff=cutoff - self.constant,
            fixing=self.fixing,
        )
        outcome, index, keep_first = here.evaluate()
        if outcome == FAILED:
            raise NotPositiveDefiniteError("damping", "a kept block of H is singular", "use a larger damping")
        node.status, node.warm, node.clusters = status.astype(np.int8), here.point, here.clusters
        node.bound = max(node.bound, here.bound + self.constant)
        return outcome, index, keep_first

    def expand(self, node: Node, cutoff: float, rounds: int = NODE_SPLIT_ROUNDS) -> tuple[int, list[Node]]:
        """Evaluate `node`; the outcome and its children, the one to dive into last."""
        outcome, index, keep_first = self.evaluate(node, cutoff, rounds, 0)
        children = []
        if outcome == BRANCH:
            for value in (PRUNED, KEPT) if keep_first else (KEPT, PRUNED):
                status = node.status.copy()
                status[index if self.tied is None else self.tied.unit == self.tied.unit[index]] = value
                children.append(
                    Node(node.bound, status, node.split, node.warm, node.depth + 1, node.clusters)
                )
        return outcome, children

    def in_clusters(self, node: Node, cutoff: float, stopped: Stopped) -> None:
        """Give the root of a count's joint program a split in clusters, and the bound that it comes to.

        From the diagonal split that is best for the root. As it was where that closes the root or the time
        ends, or nothing is gained.
        """
        assert isinstance(self.count, int)
        root = np.sqrt(np.diagonal(self.matrix))
        scaled = replace(
            self.form,
            matrix=self.matrix / root[:, None] / root,
            linear=self.linear / root,
            constant=self.constant,
        )
        bound, point, _, split = relax_joint(
            scaled,
            self.count,
            node.split / root**2,
            cutoff=cutoff,
            split_rounds=SPLIT_ROUNDS,
            stopped=stopped,
            start=node.warm * root,
        )
        climb = Climb(
            scaled, self.count, split, point, best=bound - self.constant, enough=cutoff - self.constant
        )
        # Where single precision ends, what was found until then is a split.
        with suppress(LinAlgError):
            climb.first(stopped)
        if climb.found is not None:
            clusters, places, blocks, _ = climb.found
            node.clusters = NodeClusters.of(clusters, blocks, root)
            node.warm = clusters.scattered(places) / root

    def compacted(self, node: Node) -> tuple[Subproblems, Node]:
        """Return the same search on the indices that `node` leaves free, and its root."""
        kept, pruned, free = (np.flatnonzero(node.status == value) for value in (KEPT, PRUNED, FREE))
        tied = self.tied
        if self.program == "joint":
            definite, matrix, linear, constant = reduce_joint(self.matrix, self.linear, kept, free)
            if not definite:
                raise NotPositiveDefiniteError("damping", "a kept block of H is singular", "use more")
            count = size_left(self.count, node.status == KEPT, free)
            if tied is not None:
                count = tied.n_keep - int(tied.unit_keep(node.status == KEPT).sum())
                tied = Groups(tied.unit[free], count)
        else:
            matrix, linear, constant = reduce_selection(self.matrix, self.linear, pruned, free)
            count = size_left(self.count, node.status == PRUNED, free)
        decided = self.decided_kept.copy()
        decided[self.index[kept]] = True
        smaller = replace(
            self,
            matrix=matrix,
            linear=linear,
            constant=self.constant + constant,
            count=count,
            tied=tied,
            index=self.index[free],
            decided_kept=decided,
        )
        status = np.zeros(free.size, dtype=np.int8)
        return smaller, Node(node.bound, status, node.split[free], node.warm[free], node.depth)

    def keep(self, node: Node) -> BoolArray:
        """Kept set of a leaf."""
        return self.lifted(node.status == KEPT)

    def improve(self, node: Node, limits: Limits, started: float) -> BoolArray:
        """Return a kept set from rounding the node's relaxation and swaps.

        The swaps are inside the node, in one kernel; in a large block, and of groups in the joint program, in
        all of it, so that the clock of `limits` is looked at between them.
        """
        if node.status.size > SPLIT_LARGEST or self.tied is not None:
            few = replace(limits, iteration_limit=IMPROVING_SWAPS)
            start = self.rounded(node)
            return descend(self.form, start, self.program, few, started, support=self.support)[0]
        kernel = improve_joint if self.program == "joint" else improve_selection
        return self.lifted(
            kernel(
                self.matrix,
                self.linear,
                self.count,
                node.status.astype(np.int64),
                node.warm,
                IMPROVING_SWAPS,
            )
        )

    def rounded(self, node: Node) -> BoolArray:
        """Return the kept set that the node's relaxation rounds to."""
        joint = self.program == "joint"
        chosen = node.status == (KEPT if joint else PRUNED)
        free = np.flatnonzero(node.status == FREE)
        if self.tied is not None:
            # Decided groups first, then those of the longest points.
            lengths = np.where(chosen, np.inf, np.where(node.status == FREE, node.warm**2, -1.0))
            return self.lifted(self.tied.best(lengths))
        size = size_left(self.count, chosen, free)
        taken = largest_in(np.abs(node.warm[free]), size, np.ones(free.size, dtype=np.bool_))
        chosen[free[taken]] = True
        return self.lifted(chosen if joint else ~chosen)

    def value(self, keep: BoolArray) -> float:
        """Form value of a kept set of the block."""
        if self.program == "joint":
            kept = np.flatnonzero(keep)
            linear = self.form.linear[kept]
            if kept.size == 0:
                return self.form.constant
            factor = cho_factor(self.form.matrix[np.ix_(kept, kept)], check_finite=False)
            return self.form.constant - 0.5 * float(linear @ cho_solve(factor, linear, check_finite=False))
        pruned = np.flatnonzero(~keep)
        quadratic = self.form.matrix[np.ix_(pruned, pruned)].sum()
        return float(0.5 * quadratic + self.form.linear[pruned].sum())

    def lifted(self, keep: BoolArray) -> BoolArray:
        """Kept set of the block from one of the open indices."""
        full = self.decided_kept.copy()
        full[self.index[keep]] = True
        if self.program == "selection" and self.support is not None:
            return np.asarray(self.support.spread(full))
        return full
