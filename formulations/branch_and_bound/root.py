"""The root: relax, certify, fix, reduce, repeat; then hand over to the tree.

The split of ``H`` is left to the nodes, which take a barrier step each. Optimised for the root it serves
the tree badly: on real blocks that doubled the time, and some were not solved at all.
"""

from __future__ import annotations

import math

import numpy as np

from formulations.branch_and_bound.node import Node
from formulations.branch_and_bound.outcomes import BRANCH
from formulations.branch_and_bound.tree import Search
from formulations.problem import BlockProblem
from formulations.relaxations.capped_simplex import relax_selection
from formulations.relaxations.perspective import relax_joint
from formulations.relaxations.split_relaxation import (
    joint_certificate,
    joint_split,
    selection_certificate,
    selection_shift,
)
from formulations.solution import Certificate, Limit

LARGEST_SHARE_LEFT = 0.9
"""A pass at the root is the last if it leaves more than this share of the indices free and brings no
better set."""


def solve_from_root(
    tree: Search, problem: BlockProblem, *, reduction: bool, swaps: bool
) -> tuple[Limit | None, Certificate | None]:
    """Process the root and then the tree; the limit that came and the certificate of the root."""
    status = np.zeros(problem.n, dtype=np.int8)
    tree.current = Node(-math.inf, status, np.empty(0), np.empty(0))
    certificate: Certificate | None = None
    try:
        certificate = _relax_whole_block(tree, tree.current, problem)
        tree.rooted = True
        while tree.current is not None:
            limit = tree.reached()
            if limit is not None:
                return limit, certificate
            size, value = tree.current.status.size, tree.incumbent
            _evaluate(tree, tree.current, 0)
            if tree.current is None or not reduction:
                break
            tree.subproblems, tree.current = tree.subproblems.compacted(tree.current)
            if swaps:
                tree.offer(tree.subproblems.improve(tree.current))
            shrunk = tree.current.status.size <= LARGEST_SHARE_LEFT * size
            if not shrunk and tree.incumbent >= value:
                break
    except KeyboardInterrupt:
        return Limit.INTERRUPTED, certificate
    tree.open_after_root = 0 if tree.current is None else tree.current.status.size
    return tree.run(), certificate


def _relax_whole_block(tree: Search, node: Node, problem: BlockProblem) -> Certificate:
    """Relax before anything is decided; the point and split are the certificate, which bounds the root."""
    form = tree.subproblems.form
    certificate: Certificate
    if tree.subproblems.program == "joint":
        _, node.warm, _, node.split = relax_joint(
            form, problem.n_keep, joint_split(problem, form), cutoff=tree.cutoff
        )
        root = np.sqrt(problem.hessian_diagonal())
        certificate = joint_certificate(problem, form, node.warm, node.split, root)
    else:
        _, node.warm, node.split = relax_selection(
            form, problem.n_prune, selection_shift(problem, form), cutoff=tree.cutoff
        )
        certificate = selection_certificate(problem, form, node.warm, node.split)
    node.bound = certificate.lower_bound(problem) / tree.scale
    return certificate


def _evaluate(tree: Search, node: Node, rounds: int) -> None:
    """Evaluate one node at the root; it stays current only if it must be branched on."""
    outcome, _, _ = tree.subproblems.evaluate(node, tree.cutoff, rounds, rounds)
    if outcome != BRANCH:
        tree.finish(node, outcome)
        tree.current = None
