"""The perspective relaxation of n of every m with a block-diagonal split ``H = blkdiag(B_g) + Q``.

No cardinality couples the cells, so that the supports of a cell may be enumerated (six of two among four) and
the whole block ``B_g`` of a cell taken into its convex hull, not only a diagonal. For every point ``u``, with
``h = b - Q u``,

    optimum >= const - 1/2 u.Q u - 1/2 (sum over cells of the largest h_S.[B_SS]^-1 h_S, S a support of it).

A diagonal ``B`` gives the plain bound. The best ``B`` follows a central path, as in `diagonal_split`: the
bound has the supergradient ``1/2 cov(v_S)`` in ``B_g``, over the shares of the supports at the relaxation's
solution, ``v_S = [B_SS]^-1 h_S``. Source of the hull of a quadratic over few supports: Wei, Gomez &
Kucukyavuz (2022), Ideal formulations for constrained convex optimization problems with indicators.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np

from formulations.dense_forms import UNDERFLOW, DenseForm, error_factor, joint_form
from formulations.problem import BlockProblem, FloatArray, IntArray, frozen_array
from formulations.relaxations.ascent import OVER_RELAXATION
from formulations.relaxations.certificate import Fixing, Linearisation, RelaxationCertificate
from formulations.relaxations.certified import (
    column_norms,
    definiteness_margin,
    rest_is_definite,
    split_form,
)
from formulations.relaxations.fisher_shape import fisher_shape
from formulations.relaxations.perspective import SPLIT_MARGIN, PerspectiveCertificate
from formulations.solution import Stopped, Subject
from formulations.support import NofM

MOST_SUPPORTS = 70
"""Most supports of a cell that are enumerated: those of 4:8."""
MOST_ENTRIES = 1_500
"""Most entries of all blocks, the order of the Newton systems: 600 weights for 2:4."""
ROUNDS = 16
"""Barrier steps on the blocks at most."""
STEPS = 60
"""Steps of ADMM between two of them."""
SHARES_A_STEP = 3
"""Updates of the shares in a step; they go on from those of the step before."""
FIRST_SHARE = 0.7
"""Share of the diagonal split that the blocks begin with, off the boundary of what is feasible."""
MEMORY = 0.5
"""Share of earlier supergradients in the one of a step: of a bound with kinks, each alone leads too far."""
HASTE, FASTER = 3.0, 1.2
"""Gap over barrier weight and order in the first step, and what becomes of it from one to the next."""
PATIENCE = 2
"""Rounds in a row without a better bound that end the path."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockSplitCertificate(RelaxationCertificate):
    """A point ``u`` and blocks ``B_g`` that prove a lower bound on the joint program with n of every m kept.

    Attributes
    ----------
    point : (n,) float64 array
        ``u``, in units of the weights.
    blocks : (cells, m, m) float64 array
        ``B_g``, symmetric and positive definite, in units of ``H``; ``H - blkdiag(B_g)`` is semidefinite.
    kind : str
        "block_perspective".
    rho, effective_rank
        As in `RelaxationCertificate`; it fixes no weights and has no basis.
    """

    chosen_are_kept: ClassVar[bool] = True

    point: FloatArray
    blocks: FloatArray

    def __post_init__(self) -> None:
        for name, ndim in (("point", 1), ("blocks", 3)):
            object.__setattr__(self, name, frozen_array(name, getattr(self, name), ndim))

    @property
    def kind(self) -> str:
        """Name of the relaxation."""
        return "block_perspective"

    def linearisation(self, problem: BlockProblem, given: Fixing) -> Linearisation | None:
        """Return None: the bound has a cost for each support of a cell, none for each weight."""
        return None

    def _proved(self, problem: BlockProblem, caution: float) -> float:
        support = problem.support
        if not isinstance(support, NofM) or self.basis is not None or not self._fits(problem, support):
            return -math.inf
        norms = column_norms(problem)
        if not rest_is_definite(problem, _spread(self.blocks), norms):
            return -math.inf
        own, size = _times(self.blocks, self.point), _times(np.abs(self.blocks), np.abs(self.point))
        form = split_form(problem, self.point, own, size, norms, support.m)
        held, above = _largest_hulls(self.blocks, form.residual, form.error, support)
        if not math.isfinite(above):
            return -math.inf
        lost = form.lost + 0.5 * (above - held) + error_factor(problem.n + support.m + 16) * above + UNDERFLOW
        return form.base - 0.5 * held - caution * lost

    def _fits(self, problem: BlockProblem, support: NofM) -> bool:
        cells = problem.n // support.m
        fits = self.point.shape == (problem.n,) and self.blocks.shape == (cells, support.m, support.m)
        return fits and bool((self.blocks == self.blocks.transpose(0, 2, 1)).all())


def _times(blocks: FloatArray, x: FloatArray) -> FloatArray:
    """Return ``blkdiag(blocks) x``."""
    return np.asarray(np.einsum("gab,gb->ga", blocks, x.reshape(blocks.shape[:2])).reshape(-1))


def _spread(blocks: FloatArray) -> FloatArray:
    """Return ``blkdiag(blocks)``."""
    cells, m, _ = blocks.shape
    whole = np.zeros((cells, m, cells, m))
    whole[np.arange(cells), :, np.arange(cells), :] = blocks
    return whole.reshape(cells * m, cells * m)


def _largest_hulls(
    blocks: FloatArray, h: FloatArray, error: FloatArray, support: NofM
) -> tuple[float, float]:
    """Return the sum over cells of the largest ``h_S.[B_SS]^-1 h_S``, and what its exact value is at most.

    With any ``v`` and ``r = h - B v`` it is ``v.(2 h - B v) + r.B^-1 r``, and the last term at most
    ``|r|^2`` over the least eigenvalue; an error of ``h`` adds in the norm of ``B^-1`` (triangle inequality).
    Infinite if a block is not proved definite.
    """
    cells, m, _ = blocks.shape
    sets = np.array(list(combinations(range(m), support.n)))
    values, ceilings = set_hulls(blocks, h.reshape(cells, m), error.reshape(cells, m), sets)
    return float(values.max(axis=1).sum()), float(ceilings.max(axis=1).sum())


def set_hulls(
    blocks: FloatArray, h: FloatArray, error: FloatArray, sets: IntArray
) -> tuple[FloatArray, FloatArray]:
    """Return ``h_S.[B_SS]^-1 h_S`` of supports of one size in each cell, and what its exact value is at most.

    `h` and `error` are (cells, m), `sets` are (supports, size); both results are (cells, supports). Infinite
    if a block is not proved definite.
    """
    m = blocks.shape[1]
    small = error_factor(16 * m + 32)
    part = blocks[:, sets[:, :, None], sets[:, None, :]]
    right, blur = h[:, sets], error[:, sets]
    eigenvalues = np.linalg.eigvalsh(part)
    least = eigenvalues[..., 0] - small * m * np.abs(eigenvalues).max(axis=-1)
    if not bool((least > 0.0).all()):
        return np.full(least.shape, np.inf), np.full(least.shape, np.inf)
    solved = np.linalg.solve(part, right[..., None])[..., 0]
    image = np.einsum("gsab,gsb->gsa", part, solved)
    size = np.einsum("gsab,gsb->gsa", np.abs(part), np.abs(solved))
    rest = np.linalg.norm(right - image, axis=-1)
    rest = rest + small * np.linalg.norm(np.abs(right) + size, axis=-1)
    value = np.einsum("gsa,gsa->gs", solved, 2.0 * right - image)
    ceiling = value + small * np.einsum("gsa,gsa->gs", np.abs(solved), 2.0 * np.abs(right) + size)
    ceiling = np.maximum(ceiling, 0.0) + rest**2 / least
    ceiling = (np.sqrt(ceiling) + np.linalg.norm(blur, axis=-1) / np.sqrt(least)) ** 2
    return value, ceiling * (1.0 + small)


def takes_blocks(problem: BlockProblem) -> bool:
    """Whether a block keeps n of every m, and has few enough supports and entries for a split in blocks."""
    support = problem.support
    if not isinstance(support, NofM) or not 0 < support.n < support.m:
        return False
    entries = problem.n // support.m * support.m * (support.m + 1) // 2
    return math.comb(support.m, support.n) <= MOST_SUPPORTS and entries <= MOST_ENTRIES


def relax_in_blocks(
    problem: BlockProblem, plain: PerspectiveCertificate, cutoff: float, stopped: Stopped
) -> BlockSplitCertificate | None:
    """Return the best certificate along a central path of blocks from a diagonal one; None if none is better.

    Parameters
    ----------
    problem : BlockProblem
        One that `takes_blocks`.
    plain : PerspectiveCertificate
        Where the path begins.
    cutoff : float
        Value of a known set, which the steps are measured by; a bound that reaches it is good enough.
    stopped : callable
        Asked between steps whether the time is over.

    Notes
    -----
    O(n^3 m^3) a step on the blocks: a Newton system in all their entries.
    """
    support = problem.support
    assert isinstance(support, NofM)
    form = joint_form(problem)
    root = np.sqrt(problem.hessian_diagonal())
    path = _Path(form, support, plain.split / root**2, plain.point * root / math.sqrt(form.scale))
    best, bound, reached, idle = None, plain.lower_bound(problem), -math.inf, 0
    for _ in range(ROUNDS):
        if stopped() or bound >= cutoff or idle == PATIENCE:
            break
        value = path.relax()
        idle = 0 if value > reached else idle + 1
        if value > reached:
            reached = value
            candidate = path.certificate(problem, root)
            found = candidate.lower_bound(problem)
            if found > bound:
                best, bound = candidate, found
        if stopped() or not path.improve(max(cutoff / form.scale - reached, 0.0)):
            break
    return best


class _Path:
    """The blocks on their way, in the coordinates of a joint form, and where the relaxation is."""

    def __init__(self, form: DenseForm, support: NofM, split: FloatArray, point: FloatArray) -> None:
        m = support.m
        self.form, self.cells, self.m = form, split.size // m, m
        self.sets = [list(chosen) for chosen in combinations(range(m), support.n)]
        self.blocks = FIRST_SHARE * split.reshape(self.cells, m)[:, :, None] * np.eye(m)
        self.shares = np.full((self.cells, len(self.sets)), 1.0 / len(self.sets))
        self.point = point
        self.first, self.second = np.triu_indices(m)
        self.haste = HASTE
        self.slopes: FloatArray | None = None

    def _inverses(self, blocks: FloatArray) -> FloatArray:
        """Return ``[B_SS]^-1`` for each cell and set, in place, (cells, sets, m, m)."""
        inverses = np.zeros((self.cells, len(self.sets), self.m, self.m))
        for number, index in enumerate(self.sets):
            inner = np.linalg.inv(blocks[:, index][:, :, index])
            inverses[np.ix_(range(self.cells), [number], index, index)] = inner[:, None]
        return inverses

    def relax(self) -> float:
        """Raise the bound by ADMM with shares of supports; the best value, whose point stays in `point`.

        In coordinates in which the diagonal of ``B`` is 1. The proximal step of the hull solves
        ``max over shares of min_x 1/2 |x - a|^2 + 1/2 x.(sum of shares of [B_SS]^-1) x`` for the dual part,
        by multiplicative updates of the shares.
        """
        form, scale = self.form, np.sqrt(np.diagonal(self.blocks, axis1=1, axis2=2).reshape(-1))
        blocks = self.blocks / _outer(scale, self.cells)
        inverses = self._inverses(blocks)
        smooth = form.matrix / scale[:, None] / scale - _spread(blocks)
        linear = form.linear / scale
        shifted = smooth.copy()
        shifted[np.diag_indices(linear.size)] += 1.0
        inverse = np.linalg.inv(shifted)
        shrunk = self.point * scale
        dual = linear - smooth @ shrunk
        best = -math.inf
        unit = np.broadcast_to(np.eye(self.m), self.blocks.shape)
        for _ in range(STEPS):
            solved = inverse @ (linear + shrunk - dual)
            product = smooth @ solved
            residual = (linear - product).reshape(self.cells, self.m)
            held = _hulls(inverses, residual)
            value = -0.5 * float(solved @ product) - 0.5 * float(held.max(axis=1).sum())
            if value > best:
                best, self.point = value, solved / scale
            relaxed = OVER_RELAXATION * solved - (OVER_RELAXATION - 1.0) * shrunk
            target = (relaxed + dual).reshape(self.cells, self.m)
            for _ in range(SHARES_A_STEP):
                mixed = (self.shares[:, None] @ inverses.reshape(*self.shares.shape, -1)).reshape(unit.shape)
                kept = np.asarray(
                    np.linalg.solve(unit + mixed, target[:, :, None])[:, :, 0], dtype=np.float64
                )
                gains = _hulls(inverses, kept)
                self.shares *= np.sqrt(gains + 1e-12 * gains.max(axis=1, keepdims=True) + 1e-300)
                self.shares /= self.shares.sum(axis=1, keepdims=True)
            # Moreau: what is not held is the proximal point.
            shrunk = (target - kept).reshape(-1)
            dual = dual + relaxed - shrunk
        return best + form.constant

    def _learn(self) -> FloatArray:
        """Return the supergradient of the bound in the blocks, (cells, m, m), averaged with earlier ones."""
        inverses = self._inverses(self.blocks)
        residual = self.form.linear - self.form.matrix @ self.point + _times(self.blocks, self.point)
        ends = np.einsum("gsab,gb->gsa", inverses, residual.reshape(self.cells, self.m))
        mean = np.einsum("gs,gsa->ga", self.shares, ends)
        slopes = 0.5 * (ends.transpose(0, 2, 1) @ (self.shares[:, :, None] * ends))
        slopes -= 0.5 * mean[:, :, None] * mean[:, None, :]
        self.slopes = slopes if self.slopes is None else MEMORY * self.slopes + (1.0 - MEMORY) * slopes
        return self.slopes

    def improve(self, gap: float) -> bool:
        """Take one damped Newton step on the blocks; False if there is none."""
        matrix = self.form.matrix
        slopes = self._learn()
        weight = max(gap, 1e-12) / matrix.shape[0] / self.haste
        self.haste *= FASTER
        try:
            slack = np.linalg.inv(matrix - _spread(self.blocks)).astype(np.float64)
            own = np.linalg.inv(self.blocks).astype(np.float64)
            diagonal = slack.reshape(self.cells, self.m, self.cells, self.m)
            diagonal = diagonal[np.arange(self.cells), :, np.arange(self.cells), :]
            step = self._newton(slopes / weight - diagonal + own, slack, own)
        except np.linalg.LinAlgError:
            return False
        length = 1.0
        while length > 1e-6:
            trial = self.blocks + length * step
            if _definite(trial) and _definite(matrix - _spread(trial)):
                # Stay off the boundary of the cone.
                self.blocks = self.blocks + (length if length == 1.0 else 0.9 * length) * step
                return True
            length *= 0.5
        return False

    def _newton(self, gradient: FloatArray, slack: FloatArray, own: FloatArray) -> FloatArray:
        """Return the Newton step of the barrier in the entries of the blocks."""
        a, b = self.first, self.second
        factor = np.where(a == b, math.sqrt(0.5), math.sqrt(2.0))
        four = slack.reshape(self.cells, self.m, self.cells, self.m)
        curved = _products(four, a, b)
        every = np.arange(self.cells)
        inner = own[:, a][:, :, a] * own[:, b][:, :, b] + own[:, a][:, :, b] * own[:, b][:, :, a]
        curved[every, :, every, :] += inner
        curved *= factor[None, :, None, None] * factor
        size = self.cells * a.size
        right = gradient[:, a, b] * np.where(a == b, 1.0, 2.0)
        solved = np.linalg.solve(curved.reshape(size, size), right.reshape(-1)).reshape(self.cells, -1)
        step = np.zeros_like(self.blocks)
        step[:, a, b] = solved
        step[:, b, a] = solved
        return step

    def certificate(self, problem: BlockProblem, root: FloatArray) -> BlockSplitCertificate:
        """Return point and blocks in the units of the block, the latter less what a proof may lose."""
        blocks = self.blocks * _outer(root, self.cells) * (1.0 - SPLIT_MARGIN)
        blocks = 0.5 * (blocks + blocks.transpose(0, 2, 1))
        lost = 2.0 * definiteness_margin(problem, problem.n) * column_norms(problem) ** 2
        every = np.arange(self.m)
        blocks[:, every, every] -= lost.reshape(self.cells, self.m)
        return BlockSplitCertificate(
            subject=Subject.of(problem, "joint"),
            point=self.point * math.sqrt(self.form.scale) / root,
            blocks=blocks,
            **asdict(fisher_shape(problem)),
        )


def _hulls(inverses: FloatArray, h: FloatArray) -> FloatArray:
    """Return ``h_S.[B_SS]^-1 h_S`` for each cell and set, (cells, sets)."""
    solved = (inverses @ h[:, None, :, None])[..., 0]
    return np.asarray((solved * h[:, None, :]).sum(axis=2))


def _products(four: FloatArray, a: IntArray, b: IntArray) -> FloatArray:
    """Return ``X_ac X_bd + X_ad X_bc`` of all entries ``(a, b)`` and ``(c, d)`` of two blocks."""
    left, right = four[:, a], four[:, b]
    return np.asarray(left[..., a] * right[..., b] + left[..., b] * right[..., a])


def _outer(scale: FloatArray, cells: int) -> FloatArray:
    """Return the products of the entries of each cell."""
    parts = scale.reshape(cells, -1)
    return np.asarray(parts[:, :, None] * parts[:, None, :])


def _definite(matrix: FloatArray) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True
