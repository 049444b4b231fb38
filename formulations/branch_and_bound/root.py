"""The root: relax, certify, fix, reduce, repeat; then hand over to the tree, or to two that take turns.

The split of ``H`` is left to the nodes, which take a barrier step each. Optimised for the root it serves
the tree badly: on real blocks that doubled the time, and some were not solved at all.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from formulations.branch_and_bound.node import Node
from formulations.branch_and_bound.outcomes import BRANCH
from formulations.branch_and_bound.race import race
from formulations.branch_and_bound.tree import Search
from formulations.problem import SPLIT_LARGEST, BlockProblem
from formulations.relaxations.capped_simplex import CappedSimplexCertificate, relax_selection
from formulations.relaxations.cluster_split import takes_clusters, worth_clusters
from formulations.relaxations.perspective import PerspectiveCertificate, relax_joint
from formulations.relaxations.split_relaxation import (
    joint_certificate,
    joint_split,
    selection_certificate,
    selection_shift,
)
from formulations.solution import Certificate, Limit
from formulations.support import kept_size, pruned_size

CLUSTERS_FROM = 160
"""Weights left at the root from which a tree of nodes in clusters is tried as well: below, cheaper nodes end
sooner."""
LARGEST_SHARE_LEFT = 0.9
"""A pass at the root is the last if it leaves more than this share of the indices free and brings no
better set."""


def solve_from_root(
    tree: Search, problem: BlockProblem, *, reduction: bool, swaps: bool
) -> tuple[Search, Limit | None]:
    """Process the root and then the tree; the search that has proved most, and the limit that came."""
    status = np.zeros(tree.subproblems.index.size, dtype=np.int8)
    tree.current = Node(-math.inf, status, np.empty(0), np.empty(0))
    if tree.certificate is not None and (limit := tree.reached()) is not None:
        return tree, limit
    try:
        _relax_whole_block(tree, tree.current, problem)
        tree.rooted = True
        while tree.current is not None:
            limit = tree.reached()
            if limit is not None:
                tree.lift_floor()
                return tree, limit
            size, value = tree.current.status.size, tree.incumbent
            _evaluate(tree, tree.current, 0)
            if tree.current is None or not reduction:
                break
            tree.subproblems, tree.current = tree.subproblems.compacted(tree.current)
            if swaps:
                tree.improve(tree.current)
            shrunk = tree.current.status.size <= LARGEST_SHARE_LEFT * size
            if not shrunk and tree.incumbent >= value:
                break
    except KeyboardInterrupt:
        return tree, Limit.INTERRUPTED
    tree.open_after_root = 0 if tree.current is None else tree.current.status.size
    if tree.current is None or not _bounded_in_clusters(tree, tree.current, problem):
        return tree, tree.run()
    return race(tree, partial(_in_clusters, tree, tree.current.copy()))


def _in_clusters(tree: Search, root: Node) -> Search | None:
    """Return a search from the root whose nodes are bounded by clusters; None where they gain nothing."""
    stopped = partial(tree.limits.out_of_time, tree.started)
    tree.subproblems.in_clusters(root, tree.cutoff, stopped)
    return None if root.clusters is None else tree.twin(root)


def _bounded_in_clusters(tree: Search, node: Node, problem: BlockProblem) -> bool:
    """Whether clusters may bound nodes better: of counts, where there are enough weights and much is open."""
    subproblems = tree.subproblems
    if subproblems.program != "joint" or not subproblems.diagonal_split or not takes_clusters(problem):
        return False
    by_rows = problem.rows is not None and problem.channels is None
    enough = CLUSTERS_FROM <= node.status.size <= SPLIT_LARGEST and not by_rows
    return enough and worth_clusters(node.bound, tree.incumbent)


def _relax_whole_block(tree: Search, node: Node, problem: BlockProblem) -> None:
    """Relax before anything is decided; the point and split are the certificate, which bounds the root."""
    form = tree.subproblems.form
    certificate: Certificate
    near = tree.certificate
    stopped = partial(tree.limits.out_of_time, tree.started)
    if tree.subproblems.program == "joint":
        root = np.sqrt(problem.hessian_diagonal())
        start = (
            near.point * root / math.sqrt(form.scale) if isinstance(near, PerspectiveCertificate) else None
        )
        _, node.warm, _, node.split = relax_joint(
            form,
            kept_size(problem.sets, problem.n),
            joint_split(problem, form),
            cutoff=tree.cutoff,
            stopped=stopped,
            start=start,
        )
        certificate = joint_certificate(problem, form, node.warm, node.split, root)
    else:
        start = near.point if isinstance(near, CappedSimplexCertificate) else None
        _, point, shift = relax_selection(
            form,
            pruned_size(problem.sets, problem.n),
            selection_shift(problem, form),
            cutoff=tree.cutoff,
            stopped=stopped,
            start=start,
        )
        certificate = selection_certificate(problem, form, point, shift)
        node.warm, node.split = problem.sets.mean(point), problem.sets.folded(shift)
    node.bound = certificate.lower_bound(problem) / tree.scale
    tree.prove(certificate)


def _evaluate(tree: Search, node: Node, rounds: int) -> None:
    """Evaluate one node at the root; it stays current only if it must be branched on."""
    outcome, _, _ = tree.subproblems.evaluate(node, tree.cutoff, rounds, rounds)
    if outcome != BRANCH:
        tree.finish(node, outcome)
        tree.current = None
