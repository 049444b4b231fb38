"""The root: relax, certify, fix, reduce, optimise the split, repeat; then hand over to the tree."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from formulations.branch_and_bound.outcomes import BRANCH
from formulations.branch_and_bound.tree import Node, Search
from formulations.incumbents import descend, kicked
from formulations.problem import BlockProblem
from formulations.relaxations.capped_simplex import relax_selection
from formulations.relaxations.diagonal_split import interior_split
from formulations.relaxations.perspective import relax_joint
from formulations.relaxations.split_relaxation import (
    joint_certificate,
    joint_split,
    selection_certificate,
    selection_shift,
)
from formulations.solution import Certificate, Limit, Limits

SPLIT_CALLS = 5
SPLIT_ROUNDS = 6
"""At the root the split takes up to SPLIT_CALLS times SPLIT_ROUNDS barrier steps."""
LEAST_SHARE_GAINED = 0.01
"""They end with a call that gains less than this share of the gap."""
SPLIT_LARGEST = 600
"""Largest reduced block in which the root optimises the split."""
PERTURB_MISSES = 60
"""Perturbed descents in a row without a better set that end the root's search for incumbents."""
PERTURB_SHARE_OF_TIME = 0.1
"""Share of the time limit that they may take."""
KICK_SHARES = (0.02, 0.05, 0.1, 0.2)
"""Sizes of the perturbations, as shares of the smaller side of the set."""
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
                _perturb(tree, tree.current)
            _optimise_split(tree, tree.current)
            if tree.current is None:
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


def _perturb(tree: Search, node: Node) -> None:
    """Swap descents inside the reduced block from perturbed copies of the best set."""
    subproblems = tree.subproblems
    index = subproblems.index
    generator = np.random.default_rng(tree.limits.seed)
    form = replace(subproblems.form, matrix=subproblems.matrix, linear=subproblems.linear)
    started = time.perf_counter()
    share = None if tree.limits.time_limit is None else PERTURB_SHARE_OF_TIME * tree.limits.time_limit
    misses = 0
    while misses < PERTURB_MISSES:
        best = tree.pool.keep
        assert best is not None
        inside = best[index]
        wanted = subproblems.count if subproblems.program == "joint" else index.size - subproblems.count
        if int(inside.sum()) != wanted or not 0 < wanted < index.size:
            # The best set lies outside what the fixings left.
            return
        changed = kicked(inside, generator, share=float(generator.choice(KICK_SHARES)))
        local, _, limit = descend(form, changed, subproblems.program, Limits(time_limit=share), started)
        if limit is not None:
            return
        misses += 1
        if tree.offer(subproblems.lifted(local)):
            misses = 0


def _relax_whole_block(tree: Search, node: Node, problem: BlockProblem) -> Certificate:
    """Relax before anything is decided; the point and split are the certificate."""
    form = tree.subproblems.form
    if tree.subproblems.program == "joint":
        bound, point, _, split = relax_joint(
            form, problem.n_keep, joint_split(problem, form), cutoff=tree.cutoff
        )
        node.bound, node.warm, node.split = bound, point, split
        root = np.sqrt(problem.hessian_diagonal())
        return joint_certificate(problem, form, point, split, root)
    bound, point, shift = relax_selection(
        form, problem.n_prune, selection_shift(problem, form), cutoff=tree.cutoff
    )
    node.bound, node.warm, node.split = bound, point, shift
    return selection_certificate(problem, form, point, shift)


def _evaluate(tree: Search, node: Node, rounds: int) -> None:
    """Evaluate one node at the root; it stays current only if it must be branched on."""
    outcome, _, _ = tree.subproblems.evaluate(node, tree.cutoff, rounds, rounds)
    if outcome != BRANCH:
        tree.finish(node, outcome)
        tree.current = None


def _optimise_split(tree: Search, node: Node) -> None:
    """Many barrier steps from a split inside the cone; the node that holds it becomes current."""
    subproblems = tree.subproblems
    if not subproblems.diagonal_split or not 0 < node.status.size <= SPLIT_LARGEST:
        return
    positive = subproblems.program == "joint"
    interior = interior_split(subproblems.matrix, node.split, positive)
    trial = Node(node.bound, node.status.copy(), interior, node.warm.copy())
    tree.current = trial
    for call in range(SPLIT_CALLS):
        before = trial.bound
        _evaluate(tree, trial, SPLIT_ROUNDS)
        if tree.current is None or tree.reached() is not None:
            return
        # The first steps only make up for the start inside the cone.
        if call > 1 and trial.bound - before < LEAST_SHARE_GAINED * (tree.cutoff - trial.bound):
            return
