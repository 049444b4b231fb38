"""Linear relaxations of the selection program through HiGHS: weak or slow, kept for comparison.

Every product ``y_i y_j`` becomes a variable ``p_ij`` of its own. The bound never is the solver's figure:
its multipliers alone are taken, and any multipliers of the right sign prove one. With ``alpha_ij >= 0``
for ``p_ij >= y_i + y_j - 1``, ``beta_ij >= 0`` for ``p_ij <= y_i`` and ``nu_i`` for
``sum_j p_ij = (k - 1) y_i``,

    value of a set >= sum_{i<j} (min(0, A_ij - alpha_ij + beta_ij + beta_ji + nu_i + nu_j) - alpha_ij)
                      + sum over the pruned i of
                        (A_ii / 2 - g_i w_i + sum_j alpha_ij - sum_j beta_ij - (k - 1) nu_i).

Source of safe bounds from approximate multipliers: Neumaier & Shcherbina (2004). The joint program has
no such relaxation: its new weights enter quadratically.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
from scipy.sparse import coo_matrix

from formulations.dense_forms import error_factor, summed_entries
from formulations.errors import UnsupportedProblemError
from formulations.incumbents import IncumbentPool
from formulations.milp import Milp, MilpControls, run_milp
from formulations.problem import BlockProblem, FloatArray, IntArray, frozen_array
from formulations.relaxations.capped_simplex import round_selection
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate
from formulations.relaxations.certified import column_norms
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.solution import Limits, Subject

LINEAR_RELAXATIONS = ("mccormick", "rlt")
LINEAR_LARGEST = 128
"""Largest block: n^2 / 2 product variables, up to three rows each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearCertificate(RelaxationCertificate):
    """Multipliers of a linear relaxation that prove a bound on the selection program.

    Attributes
    ----------
    relaxation : str
        "mccormick" or "rlt"; also `kind`.
    above : (n, n) float64 array
        ``alpha``, non-negative, read above the diagonal.
    below : (n, n) float64 array
        ``beta``, non-negative, diagonal not read.
    degree : (n,) float64 array
        ``nu``.
    n_fixed, rho, effective_rank, fixing, basis
        As in `RelaxationCertificate`.
    """

    chosen_are_kept: ClassVar[bool] = False

    relaxation: str
    above: FloatArray
    below: FloatArray
    degree: FloatArray

    def __post_init__(self) -> None:
        for name, ndim in (("above", 2), ("below", 2), ("degree", 1)):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), ndim))

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return self.relaxation

    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return the underestimate above, computed anew from the block; O(m n^2)."""
        n = problem.n
        fits = self.above.shape == self.below.shape == (n, n) and self.degree.shape == (n,)
        if not fits or bool((self.above < 0.0).any() or (self.below < 0.0).any()):
            return None
        first, second = np.triu_indices(n, 1)
        w, g, nu = problem.weights, problem.gradient_or_zero, self.degree
        costs = problem.dense_hessian() * w[:, None] * w[None, :]
        reach = column_norms(problem) * np.abs(w)
        height = summed_entries(problem)
        # |dA_ij| <= gamma a_i a_j, the rounding of the sum over samples and of the scaling.
        gamma = error_factor(height + 8)
        alpha, beta, back = self.above[first, second], self.below[first, second], self.below[second, first]
        parts = np.stack((costs[first, second], -alpha, beta, back, nu[first], nu[second]))
        reduced = parts.sum(axis=0)
        blurred = gamma * reach[first] * reach[second] + error_factor(8) * np.abs(parts).sum(axis=0)
        charged = np.minimum(reduced, 0.0)
        pushed, pulled = np.triu(self.above, 1), self.below - np.diag(np.diagonal(self.below))
        slopes = np.column_stack(
            (
                0.5 * np.diagonal(costs),
                -g * w,
                pushed.sum(axis=0) + pushed.sum(axis=1),
                -pulled.sum(axis=1),
                -(problem.n_prune - 1) * nu,
            )
        )
        length = error_factor(first.size + n + 16)
        return Linearisation(
            base=float((charged - alpha).sum()),
            lost=float(blurred.sum()) + length * float((np.abs(charged) + alpha).sum()),
            cost=slopes.sum(axis=1),
            error=gamma * reach * reach + length * np.abs(slopes).sum(axis=1),
        )


def relax_linear(
    problem: BlockProblem, relaxation: str, limits: Limits, pool: IncumbentPool
) -> LinearCertificate:
    """Solve a linear relaxation with HiGHS and keep its multipliers; its rounding goes to `pool`.

    Raises
    ------
    UnsupportedProblemError
        If the block has more than 128 weights.
    """
    n = problem.n
    if n > LINEAR_LARGEST:
        found = f"{relaxation!r} for {n} weights"
        raise UnsupportedProblemError("relaxation", found, f"use capped_simplex beyond {LINEAR_LARGEST}")
    program = _LinearProgram.of(problem, relaxation)
    result = run_milp(
        program.model(), MilpControls(seconds=limits.time_limit, threads=limits.threads, seed=limits.seed)
    )
    share = np.full(n, problem.n_prune / n) if result.point is None else result.point[:n]
    pool.offer(round_selection(share, problem.n_prune))
    duals = np.zeros(program.n_rows) if result.row_duals is None else result.row_duals
    return program.certificate(np.nan_to_num(duals), problem)


@dataclass(frozen=True, kw_only=True)
class _LinearProgram:
    """Rows in four groups: count, ``p >= y_i + y_j - 1``, ``p <= y``, degrees."""

    relaxation: str
    unit: float
    n_prune: int
    cost: FloatArray
    pairs: tuple[IntArray, IntArray]
    repelled: IntArray
    """Places of the pairs that have the first kind of row."""
    attracted: IntArray
    """Places of the pairs that have the second kind, one row for either weight."""

    @staticmethod
    def of(problem: BlockProblem, relaxation: str) -> _LinearProgram:
        """All rows for "rlt"; for "mccormick" those that the sign of the cost can make active."""
        w = problem.weights
        costs = problem.dense_hessian() * w[:, None] * w[None, :]
        first, second = np.triu_indices(problem.n, 1)
        products = costs[first, second]
        linear = 0.5 * np.diagonal(costs) - problem.gradient_or_zero * w
        cost = np.concatenate((linear, products))
        everything = np.arange(first.size)
        plain = relaxation == "mccormick"
        return _LinearProgram(
            relaxation=relaxation,
            unit=float(np.abs(cost).max()) or 1.0,
            n_prune=problem.n_prune,
            cost=cost,
            pairs=(first, second),
            repelled=np.flatnonzero(products > 0.0) if plain else everything,
            attracted=np.flatnonzero(products < 0.0) if plain else everything,
        )

    @property
    def n(self) -> int:
        """Number of weights."""
        return self.cost.size - self.pairs[0].size

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        degrees = self.n if self.relaxation == "rlt" else 0
        return 1 + self.repelled.size + 2 * self.attracted.size + degrees

    def model(self) -> Milp:
        """Return the program for HiGHS, without integer columns."""
        first, second = self.pairs
        n, up, down = self.n, self.repelled, self.attracted
        entries: list[tuple[IntArray, IntArray, float]] = []

        def put(rows: IntArray, columns: IntArray, value: float) -> None:
            entries.append((rows, columns, value))

        # Exactly n_prune weights are pruned.
        put(np.zeros(n, dtype=np.int64), np.arange(n), 1.0)
        lower = [np.full(1, float(self.n_prune))]
        # A pair is counted as soon as both its weights are pruned ...
        rows = 1 + np.arange(up.size)
        put(rows, n + up, 1.0)
        put(rows, first[up], -1.0)
        put(rows, second[up], -1.0)
        lower.append(np.full(up.size, -1.0))
        # ... and only if its first weight is pruned, and its second one too.
        for place, end in enumerate((first, second)):
            rows = 1 + up.size + place * down.size + np.arange(down.size)
            put(rows, end[down], 1.0)
            put(rows, n + down, -1.0)
            lower.append(np.zeros(down.size))
        if self.relaxation == "rlt":
            # A pruned weight forms pairs with exactly n_prune - 1 others, a kept one with none.
            start = 1 + up.size + 2 * down.size
            put(start + first, n + np.arange(first.size), 1.0)
            put(start + second, n + np.arange(first.size), 1.0)
            put(start + np.arange(n), np.arange(n), -(self.n_prune - 1.0))
            lower.append(np.zeros(n))
        row_lower = np.concatenate(lower)
        row_upper = np.full(row_lower.size, np.inf)
        row_upper[0] = row_lower[0]
        if self.relaxation == "rlt":
            row_upper[-n:] = 0.0
        matrix = coo_matrix(
            (
                np.concatenate([np.full(rows.size, value) for rows, _, value in entries]),
                (
                    np.concatenate([rows for rows, _, _ in entries]),
                    np.concatenate([columns for _, columns, _ in entries]),
                ),
            ),
            shape=(row_lower.size, self.cost.size),
        ).tocsr()
        return Milp(
            cost=self.cost / self.unit,
            lower=np.zeros(self.cost.size),
            upper=np.ones(self.cost.size),
            integer=np.zeros(self.cost.size, dtype=np.bool_),
            matrix=matrix,
            row_lower=row_lower,
            row_upper=row_upper,
        )

    def certificate(self, duals: FloatArray, problem: BlockProblem) -> LinearCertificate:
        """Return the multipliers in units of the loss, wrong signs set to 0."""
        first, second = self.pairs
        n, up, down = self.n, self.repelled, self.attracted
        duals = duals * self.unit
        above, below, degree = np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
        groups = np.split(duals[1:], np.cumsum((up.size, down.size, down.size)))
        above[first[up], second[up]] = np.maximum(groups[0], 0.0)
        below[first[down], second[down]] = np.maximum(groups[1], 0.0)
        below[second[down], first[down]] = np.maximum(groups[2], 0.0)
        if self.relaxation == "rlt":
            degree = -groups[3]
        return LinearCertificate(
            subject=Subject.of(problem, "selection"),
            relaxation=self.relaxation,
            above=above,
            below=below,
            degree=degree,
            **asdict(fisher_shape(problem)),
        )
