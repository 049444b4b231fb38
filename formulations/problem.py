"""`BlockProblem`: the data of one block, validated once, and products with its Hessian."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Number
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cholesky

from formulations.channels import ChannelTerm
from formulations.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError
from formulations.support import Count, Support

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

PROGRAMS = ("selection", "joint")
NUMBERS = (int, float, np.integer, np.floating)
SYMMETRY_TOLERANCE = 1e-8
"""Largest accepted ``|H_ij - H_ji|`` relative to ``max |H|``; smaller differences are averaged."""
DEFINITENESS_TOLERANCE = 1e-10
"""Negative eigenvalues down to this share of the mean diagonal count as rounding."""
SINGULAR_TO_ROUNDING = 8.0 * float(np.finfo(np.float64).eps)
"""``H`` with unit diagonal counts as singular below n times this."""
SPLIT_LARGEST = 600
"""Largest block whose diagonal split is optimised by default, as one matrix: a barrier step costs O(n^3)."""
LARGEST_FACTORISED = 4096
"""Largest block with rows that is factorised to decide whether ``H`` is singular to rounding."""
SMALLEST, LARGEST = 1e-140, 1e140
"""Range of curvatures and costs: squares of what lies within keep their 16 digits in float64."""
LARGEST_ENTRY = 1e150
"""Largest weight and gradient entry."""


def check_program(program: str) -> str:
    """Return `program` if it is "selection" or "joint", else raise `ArgumentError`."""
    if program not in PROGRAMS:
        raise ArgumentError("program", f"{program!r}", 'use "selection" or "joint"')
    return program


def frozen_array(name: str, value: ArrayLike, ndim: int) -> FloatArray:
    """Return `value` as a finite, C-contiguous, read-only float64 array.

    Writable input is copied; a read-only float64 array is taken as it is, which is how a caller
    with gigabytes of rows avoids the copy.
    """
    if np.ma.isMaskedArray(value):
        raise ArgumentError(name, "a masked array", "fill or drop the masked entries and pass a plain array")
    try:
        raw = np.asarray(value)
        if np.iscomplexobj(raw):
            raise ArgumentError(name, "complex numbers", "pass an array of real numbers")
        plain = raw.dtype.kind in "biuf" or (
            raw.dtype.kind == "O" and all(isinstance(entry, Number) for entry in raw.flat)
        )
        if not plain:
            raise ArgumentError(name, f"not numeric (dtype {raw.dtype})", "pass an array of numbers")
        array = np.asarray(raw, dtype=np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(name, f"not numeric ({error})", "pass an array of numbers") from error
    if array.ndim != ndim:
        raise ShapeError(name, f"{array.ndim} dimensions, shape {array.shape}", f"pass {ndim}")
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise NonFiniteError(name, f"{bad} of {array.size} entries are NaN or infinite", "repair the data")
    if array.flags.writeable or not array.flags.c_contiguous:
        array = np.array(array, dtype=np.float64, order="C", copy=True)
        array.flags.writeable = False
    return array


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockProblem:
    """One block of weights and the second-order model of the loss around it.

    The model is ``dL(d) = g.d + 1/2 d.H d`` with ``H = rows^T rows + channels + damping I`` or
    ``H = hessian + damping I``; `support` says which weights may stay, or `n_prune` how many are to
    become zero.

    Parameters
    ----------
    weights : (n,) array_like
        Trained weights.
    n_prune : int, optional
        Number of weights to remove, ``0 <= n_prune <= n``: short for ``support=Count(n - n_prune)``. Where
        a support is given it follows from that; for groups of unequal size it is the least number.
    support : Support, optional
        What may be kept: `Count`, `NofM` or `Groups`. A count is held as `n_prune`, and None here; `sets`
        is the support in either case.
    rows : (m, n) array_like, optional
        Scaled gradient rows ``R = G / sqrt(m)``. Exactly one of `rows` and `hessian` is given.
    hessian : (n, n) array_like, optional
        Symmetric positive semidefinite matrix, without the damping.
    channels : ChannelTerm, optional
        Beside rows: a term of ``H`` that is block-diagonal over output channels, and never formed whole.
    damping : float, default 0
        Added to the diagonal; non-negative.
    gradient : (n,) array_like, optional
        Gradient of the loss at `weights`; absent means zero.
    name : str, default ""
        A label for tables.

    Raises
    ------
    ArgumentError
        If an argument is missing, of the wrong shape, no number or not finite, if `support` does not fit
        the number of weights or contradicts `n_prune`, if `hessian` is not
        symmetric positive semidefinite (that test costs one Cholesky factorisation, O(n^3)), or if
        curvatures or costs leave the range 1e-140 to 1e140 in which float64 keeps its digits.

    Notes
    -----
    All arrays are float64 and read-only. Writable arrays are copied, read-only ones are shared.
    Two problems with the same data have the same `fingerprint`.
    """

    weights: FloatArray
    n_prune: int = None  # type: ignore[assignment]  # an int once it is made
    support: Support | None = None
    rows: FloatArray | None = None
    hessian: FloatArray | None = None
    damping: float = 0.0
    gradient: FloatArray | None = None
    name: str = ""
    channels: ChannelTerm | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "weights", frozen_array("weights", self.weights, 1))
        if (self.rows is None) == (self.hessian is None):
            found = "neither" if self.rows is None else "both"
            raise ArgumentError("rows, hessian", f"{found} given", "pass exactly one of them")
        n_prune, support = _checked_support(self.n_prune, self.support, self.n)
        put(self, "n_prune", n_prune)
        put(self, "support", support)
        put(self, "damping", _checked_damping(self.damping))
        if self.rows is not None:
            put(self, "rows", frozen_array("rows", self.rows, 2))
            _check_width("rows", self.rows, self.n)
        if self.hessian is not None:
            put(self, "hessian", _checked_hessian(self.hessian, self.n, self.damping))
        if self.channels is not None:
            _check_channels(self.channels, self.n, self.rows)
        if self.gradient is not None:
            put(self, "gradient", frozen_array("gradient", self.gradient, 1))
            _check_width("gradient", self.gradient, self.n)
        _check_range(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {name: value for name, value in state.items() if name not in ("_digest", "indefiniteness")}
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        self.__dict__.update(state)

    def __repr__(self) -> str:
        data = f"rows={self.rows.shape}" if self.rows is not None else "hessian"
        data += "" if self.channels is None else f", channels={len(self.channels)}"
        label = f"{self.name!r}, " if self.name else ""
        kept = f"n_prune={self.n_prune}" if self.support is None else f"support={self.support}"
        return f"BlockProblem({label}n={self.n}, {kept}, {data}, damping={self.damping:g})"

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.weights.shape[0])

    @property
    def n_keep(self) -> int:
        """Number of weights that stay; the most of them where sets differ in size."""
        return self.n - self.n_prune

    @property
    def sets(self) -> Support:
        """The support: `Count` where none but a count was given."""
        return Count(self.n_keep) if self.support is None else self.support

    def allows(self, keep: BoolArray) -> bool:
        """Whether a kept set, (n,), is one that the block asks for."""
        if self.support is None:
            return int(keep.sum()) == self.n_keep
        return self.support.contains(keep)

    @property
    def gradient_or_zero(self) -> FloatArray:
        """The gradient, (n,), zeros where none was given."""
        return np.zeros(self.n) if self.gradient is None else self.gradient

    def hessian_product(self, x: FloatArray) -> FloatArray:
        """``H x`` for `x` of shape (n,) or (n, p); O(m n p) with rows, O(n^2 p) with a Hessian."""
        x = np.asarray(x, dtype=np.float64)
        product = self.rows.T @ (self.rows @ x) if self.rows is not None else self._hessian @ x
        if self.channels is not None:
            product += self.channels.product(x)
        return np.asarray(product + self.damping * x, dtype=np.float64)

    def hessian_diagonal(self) -> FloatArray:
        """``diag(H)``, (n,)."""
        if self.rows is not None:
            diagonal = np.einsum("ij,ij->j", self.rows, self.rows)
        else:
            diagonal = np.diagonal(self._hessian).copy()
        if self.channels is not None:
            diagonal += self.channels.diagonal()
        return np.asarray(diagonal + self.damping, dtype=np.float64)

    def hessian_columns(self, index: ArrayLike) -> FloatArray:
        """``H[:, index]``, (n, p); O(m n p) with rows."""
        columns = np.atleast_1d(np.asarray(index, dtype=np.int64))
        if self.rows is not None:
            block = self.rows.T @ self.rows[:, columns]
        else:
            block = self._hessian[:, columns].copy()
        if self.channels is not None:
            block += self.channels.columns(columns)
        block[columns, np.arange(columns.size)] += self.damping
        return np.asarray(block, dtype=np.float64)

    def dense_hessian(self) -> FloatArray:
        """``H`` as a new writable (n, n) array; O(m n^2) with rows."""
        hessian = self._hessian.copy() if self.rows is None else self.rows.T @ self.rows
        if self.channels is not None:
            for channel, span in enumerate(self.channels.spans()):
                hessian[span, span] += self.channels.matrix(channel)
        hessian[np.diag_indices(self.n)] += self.damping
        return np.asarray(hessian, dtype=np.float64)

    def linear_term(self) -> FloatArray:
        """``b = H w - g`` of the joint program written in the new weights, (n,)."""
        return self.hessian_product(self.weights) - self.gradient_or_zero

    def constant_term(self) -> float:
        """``1/2 w.H w - g.w``: the loss increase of removing every weight."""
        w = self.weights
        return float(0.5 * (w @ self.hessian_product(w)) - self.gradient_or_zero @ w)

    @cached_property
    def indefiniteness(self) -> float:
        """What makes the 2 x 2 blocks of a Hessian semidefinite that rounding left indefinite; else 0.

        Negative eigenvalues down to 1e-10 of the mean diagonal are accepted as rounding.
        """
        if self.channels is not None:
            small = all(_two_by_two(moment, np.diagonal(moment)) for moment in self.channels.moments)
            return 0.0 if small else max(-self.curvature_floor(), 0.0)
        if self.hessian is None or self.n == 0:
            return 0.0
        diagonal = self.hessian_diagonal()
        return 0.0 if _two_by_two(self.hessian, diagonal) else max(-self.curvature_floor(), 0.0)

    def curvature_floor(self) -> float:
        """Return what every eigenvalue of ``H`` is proved to exceed without a factorisation; may be negative.

        With rows it is the damping. A Hessian matrix, or the moments of channels, are known to be
        semidefinite up to rounding only.
        """
        if self.channels is not None:
            scales = zip(self.channels.largest_scales(), self.channels.moments, strict=True)
            return self.damping - max((scale * _dip_of(moment) for scale, moment in scales), default=0.0)
        if self.hessian is None or self.n == 0:
            return self.damping
        return self.damping - _dip_of(self.hessian)

    def require_definite(self) -> None:
        """Raise `NotPositiveDefiniteError` if ``H`` is singular to rounding (joint needs its inverse).

        The one decision for all methods: scaled to a unit diagonal, the smallest eigenvalue of ``H``
        must exceed ``8 n eps``. Free where the damping alone says so; otherwise one Cholesky
        factorisation, or the damping alone again where rows are given and ``n > 4096``. With channels it is
        enough that each of them passes.
        """
        least = self.n * SINGULAR_TO_ROUNDING
        if self.n == 0 or (self.channels is not None and self._channels_definite(least)):
            return
        remedy = "use a larger damping"
        diagonal = self.hessian_diagonal()
        floor, largest = self.curvature_floor(), float(diagonal.max())
        if floor > least * largest:
            return
        if self.damping == 0.0:
            remedy = "add damping > 0"
            if self.rows is not None and self.channels is None and self.rows.shape[0] < self.n:
                found = f"0 with {self.rows.shape[0]} rows for {self.n} weights: H is singular"
                raise NotPositiveDefiniteError("damping", found, remedy)
        found = f"{self.damping:g} and H is singular to rounding"
        if largest > 0.0:
            remedy += f": {2.0 * least * largest:.1g} is enough"
        if self.rows is not None and self.n > LARGEST_FACTORISED:
            if floor > np.finfo(np.float64).eps * largest:
                return
            raise NotPositiveDefiniteError("damping", found, remedy)
        if float(diagonal.min()) <= 0.0:
            raise NotPositiveDefiniteError("damping", found, remedy)
        root = np.sqrt(diagonal)
        scaled = self.dense_hessian() / root[:, None] / root[None, :]
        scaled[np.diag_indices(self.n)] = 1.0 - least
        try:
            cholesky(scaled, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            raise NotPositiveDefiniteError("damping", found, remedy) from None

    def _channels_definite(self, least: float) -> bool:
        """Whether every channel, scaled to a unit diagonal, is positive definite with `least` to spare."""
        assert self.channels is not None
        for channel, _ in enumerate(self.channels.spans()):
            matrix = self.channels.matrix(channel)
            matrix[np.diag_indices(len(matrix))] += self.damping
            root = np.sqrt(np.diagonal(matrix))
            if not bool((root > 0.0).all()):
                return False
            matrix = matrix / root[:, None] / root[None, :]
            matrix[np.diag_indices(len(matrix))] = 1.0 - least
            try:
                cholesky(matrix, lower=True, overwrite_a=True, check_finite=False)
            except LinAlgError:
                return False
        return True

    def fingerprint(self) -> str:
        """SHA-256 of the data (not of the name), as 64 hex digits; computed once."""
        known: str | None = self.__dict__.get("_digest")
        if known is not None:
            return known
        digest = hashlib.sha256(f"{self.n} {self.n_prune} {self.damping.hex()}".encode())
        if self.support is not None:
            digest.update(json.dumps(self.support.as_json(), sort_keys=True).encode())
        for tag in ("weights", "rows", "hessian", "gradient"):
            array = getattr(self, tag)
            if array is not None:
                digest.update(f"{tag} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array, dtype="<f8").data)
        for tag, array in {} if self.channels is None else self.channels.arrays().items():
            digest.update(f"channels.{tag} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array, dtype="<f8").data)
        object.__setattr__(self, "_digest", digest.hexdigest())
        return digest.hexdigest()

    @property
    def _hessian(self) -> FloatArray:
        assert self.hessian is not None
        return self.hessian


def _checked_support(n_prune: Any, support: Any, n: int) -> tuple[int, Support | None]:
    """Return the number of weights to prune, and the support unless it is a count."""
    if support is None and n_prune is None:
        raise ArgumentError("n_prune, support", "neither given", "pass one of them")
    if support is None:
        return _checked_count(n_prune, n), None
    if not isinstance(support, Support):
        raise ArgumentError("support", f"a {type(support).__name__}", "pass a Count, NofM or Groups")
    support.check(n)
    implied = n - support.n_keep_of(n)
    if n_prune is not None and _checked_count(n_prune, n) != implied:
        found = f"{n_prune} to prune, and a support ({support}) that prunes {implied} of {n}"
        raise ArgumentError("n_prune, support", found, "pass one of them, the other as None")
    return implied, None if isinstance(support, Count) else support


def _checked_count(n_prune: Any, n: int) -> int:
    if isinstance(n_prune, bool) or not isinstance(n_prune, NUMBERS) or n_prune % 1 != 0:
        raise ArgumentError("n_prune", f"{n_prune!r}", "pass a whole number")
    if not 0 <= n_prune <= n:
        raise ArgumentError("n_prune", f"{n_prune} for {n} weights", f"choose one from 0 to {n}")
    return int(n_prune)


def _checked_damping(damping: Any) -> float:
    if isinstance(damping, bool) or not isinstance(damping, NUMBERS) or not 0.0 <= damping < math.inf:
        raise ArgumentError("damping", f"{damping!r}", "pass a finite number >= 0")
    return float(damping)


def _check_width(name: str, array: FloatArray, n: int) -> None:
    if array.shape[-1] != n:
        raise ShapeError(name, f"shape {array.shape} for {n} weights", f"make its last axis {n}")


def _checked_hessian(value: ArrayLike, n: int, damping: float, name: str = "hessian") -> FloatArray:
    hessian = frozen_array(name, value, 2)
    if hessian.shape != (n, n):
        raise ShapeError(name, f"shape {hessian.shape} for {n} weights", f"pass ({n}, {n})")
    if n == 0:
        return hessian
    asymmetry = float(np.abs(hessian - hessian.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * float(np.abs(hessian).max()):
        remedy = "pass (H + H^T) / 2 if the difference is rounding"
        raise NotPositiveDefiniteError(name, f"not symmetric (differs by {asymmetry:.3g})", remedy)
    if asymmetry > 0.0:
        hessian = 0.5 * (hessian + hessian.T)
        hessian.flags.writeable = False
    _check_semidefinite(hessian, damping, name)
    return hessian


def _check_semidefinite(hessian: FloatArray, damping: float, name: str) -> None:
    n = hessian.shape[0]
    shifted = hessian.copy()
    shifted[np.diag_indices(n)] += DEFINITENESS_TOLERANCE * _size_of(hessian) + np.finfo(np.float64).tiny
    try:
        cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        lowest = float(np.linalg.eigvalsh(hessian)[0])
        found = f"indefinite: smallest eigenvalue {lowest:.3g} before damping {damping:g}"
        remedy = "pass a positive semidefinite model such as a Fisher or Gauss-Newton matrix"
        raise NotPositiveDefiniteError(name, found, remedy) from None


def _check_channels(channels: Any, n: int, rows: FloatArray | None) -> None:
    if not isinstance(channels, ChannelTerm):
        raise ArgumentError("channels", f"a {type(channels).__name__}", "pass a ChannelTerm")
    if channels.n != n:
        raise ShapeError("channels", f"a term of {channels.n} weights beside {n}", "pass that of the block")
    if rows is None:
        found = "given beside a hessian"
        raise ArgumentError("channels", found, "add it to the hessian, or pass rows (0 of them, if none)")
    for moment in channels.moments:
        # Asymmetry cannot be repaired here: channels share moments with other blocks.
        if not np.array_equal(_checked_hessian(moment, len(moment), 0.0, "channels.moments"), moment):
            raise NotPositiveDefiniteError("channels.moments", "not symmetric", "pass (A + A^T) / 2")


def _two_by_two(matrix: FloatArray, diagonal: FloatArray) -> bool:
    """Whether the 2 x 2 blocks of a matrix are semidefinite up to what norms are rounded up by."""
    root = np.sqrt(np.maximum(diagonal, 0.0))
    inside = np.abs(matrix) <= root[:, None] * root * (1.0 + 1e-7)
    np.fill_diagonal(inside, diagonal >= 0.0)
    return bool(inside.all())


def _dip_of(matrix: FloatArray) -> float:
    """How far below 0 the eigenvalues of a matrix that was accepted as semidefinite may be."""
    order = len(matrix)
    largest = float(np.abs(matrix).max(initial=0.0))
    rounding = order * np.finfo(np.float64).eps * largest * (order + 8)
    return 2.0 * DEFINITENESS_TOLERANCE * _size_of(matrix) + rounding if order else 0.0


def _size_of(hessian: FloatArray) -> float:
    """Size against which an eigenvalue counts as rounding."""
    order = int(hessian.shape[0])
    return max(float(np.abs(np.diagonal(hessian)).mean()), float(np.abs(hessian).max()) / order)


def _check_range(problem: BlockProblem) -> None:
    """Refuse data whose curvatures or costs over- or underflow; O(m n).

    Products below 1e-308 lose their digits without notice, and no bound on rounding covers that.
    """
    weights, gradient = np.abs(problem.weights), np.abs(problem.gradient_or_zero)
    for name, entries in (("weights", weights), ("gradient", gradient)):
        if entries.size and float(entries.max()) > LARGEST_ENTRY:
            found = f"an entry of size {float(entries.max()):.3g}"
            raise ArgumentError(name, found, f"rescale the data to at most {LARGEST_ENTRY:g}")
    if 0.0 < problem.damping < SMALLEST:
        found = f"{problem.damping:.3g}, which underflows in float64"
        raise ArgumentError("damping", found, "set it to 0, or rescale the block")
    tag = "hessian" if problem.rows is None else "rows"
    with np.errstate(over="ignore"):
        diagonal = np.abs(problem.hessian_diagonal())
        costs = np.concatenate(
            (
                diagonal * weights * weights,
                gradient * weights,
                np.divide(gradient, diagonal, out=np.zeros(problem.n), where=diagonal > 0.0) * gradient,
            )
        )
    small = np.flatnonzero(diagonal < SMALLEST)
    entries = np.diagonal(problem._hessian)[small] if problem.rows is None else problem.rows[:, small]
    if (problem.damping > 0.0 and small.size) or bool((entries != 0.0).any()):
        found = f"curvatures down to {float(diagonal[small].min()):.3g}, which underflow in float64"
        raise ArgumentError(tag, found, "rescale the block, or set negligible entries and damping to 0")
    largest = float(diagonal.max(initial=0.0))
    if not largest <= LARGEST:
        raise ArgumentError(tag, f"curvatures up to {largest:.3g}", f"rescale to at most {LARGEST:g}")
    cost = float(costs.max(initial=0.0))
    curved, moved = diagonal > 0.0, weights > 0.0
    costly = bool(((curved & moved) | ((gradient > 0.0) & (curved | moved))).any())
    if cost > LARGEST or (costly and cost < SMALLEST):
        found = f"terms of the loss up to {cost:.3g}"
        raise ArgumentError(
            "weights", found, f"rescale the block so that they lie in {SMALLEST:g} to {LARGEST:g}"
        )
