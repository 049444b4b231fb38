"""`BlockProblem`: the data of one block, validated once, and products with its Hessian."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import LinAlgError, cholesky

from formulations.errors import ArgumentError, NonFiniteError, NotPositiveDefiniteError, ShapeError

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

PROGRAMS = ("selection", "joint")
NUMBERS = (int, float, np.integer, np.floating)
SYMMETRY_TOLERANCE = 1e-8
"""Largest accepted ``|H_ij - H_ji|`` relative to ``max |H|``; smaller differences are averaged."""
DEFINITENESS_TOLERANCE = 1e-10
"""Negative eigenvalues down to this share of the mean diagonal count as rounding."""


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
    try:
        given = np.asarray(value)
        if np.iscomplexobj(given):
            raise ArgumentError(name, "complex numbers", "pass an array of real numbers")
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
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

    The model is ``dL(d) = g.d + 1/2 d.H d`` with ``H = rows^T rows + damping I`` or
    ``H = hessian + damping I``; `n_prune` of the weights are to become zero.

    Parameters
    ----------
    weights : (n,) array_like
        Trained weights.
    n_prune : int
        Number of weights to remove, ``0 <= n_prune <= n``.
    rows : (m, n) array_like, optional
        Scaled gradient rows ``R = G / sqrt(m)``. Exactly one of `rows` and `hessian` is given.
    hessian : (n, n) array_like, optional
        Symmetric positive semidefinite matrix, without the damping.
    damping : float, default 0
        Added to the diagonal; non-negative.
    gradient : (n,) array_like, optional
        Gradient of the loss at `weights`; absent means zero.
    name : str, default ""
        A label for tables.

    Raises
    ------
    ArgumentError
        If an argument is missing, of the wrong shape, not finite, or `hessian` is not symmetric
        positive semidefinite (that test costs one Cholesky factorisation, O(n^3)).

    Notes
    -----
    All arrays are float64 and read-only. Writable arrays are copied, read-only ones are shared.
    Two problems with the same data have the same `fingerprint`.
    """

    weights: FloatArray
    n_prune: int
    rows: FloatArray | None = None
    hessian: FloatArray | None = None
    damping: float = 0.0
    gradient: FloatArray | None = None
    name: str = ""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "weights", frozen_array("weights", self.weights, 1))
        if (self.rows is None) == (self.hessian is None):
            found = "neither" if self.rows is None else "both"
            raise ArgumentError("rows, hessian", f"{found} given", "pass exactly one of them")
        put(self, "n_prune", _checked_count(self.n_prune, self.n))
        put(self, "damping", _checked_damping(self.damping))
        if self.rows is not None:
            put(self, "rows", frozen_array("rows", self.rows, 2))
            _check_width("rows", self.rows, self.n)
        if self.hessian is not None:
            put(self, "hessian", _checked_hessian(self.hessian, self.n, self.damping))
        if self.gradient is not None:
            put(self, "gradient", frozen_array("gradient", self.gradient, 1))
            _check_width("gradient", self.gradient, self.n)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for value in state.values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False
        self.__dict__.update(state)

    def __repr__(self) -> str:
        data = f"rows={self.rows.shape}" if self.rows is not None else "hessian"
        label = f"{self.name!r}, " if self.name else ""
        return f"BlockProblem({label}n={self.n}, n_prune={self.n_prune}, {data}, damping={self.damping:g})"

    @property
    def n(self) -> int:
        """Number of weights."""
        return int(self.weights.shape[0])

    @property
    def n_keep(self) -> int:
        """Number of weights that stay."""
        return self.n - self.n_prune

    @property
    def gradient_or_zero(self) -> FloatArray:
        """The gradient, (n,), zeros where none was given."""
        return np.zeros(self.n) if self.gradient is None else self.gradient

    def hessian_product(self, x: FloatArray) -> FloatArray:
        """``H x`` for `x` of shape (n,) or (n, p); O(m n p) with rows, O(n^2 p) with a Hessian."""
        x = np.asarray(x, dtype=np.float64)
        product = self.rows.T @ (self.rows @ x) if self.rows is not None else self._hessian @ x
        return np.asarray(product + self.damping * x, dtype=np.float64)

    def hessian_diagonal(self) -> FloatArray:
        """``diag(H)``, (n,)."""
        if self.rows is not None:
            diagonal = np.einsum("ij,ij->j", self.rows, self.rows)
        else:
            diagonal = np.diagonal(self._hessian).copy()
        return np.asarray(diagonal + self.damping, dtype=np.float64)

    def hessian_columns(self, index: ArrayLike) -> FloatArray:
        """``H[:, index]``, (n, p); O(m n p) with rows."""
        columns = np.atleast_1d(np.asarray(index, dtype=np.int64))
        if self.rows is not None:
            block = self.rows.T @ self.rows[:, columns]
        else:
            block = self._hessian[:, columns].copy()
        block[columns, np.arange(columns.size)] += self.damping
        return np.asarray(block, dtype=np.float64)

    def dense_hessian(self) -> FloatArray:
        """``H`` as a new writable (n, n) array; O(m n^2) with rows."""
        hessian = self._hessian.copy() if self.rows is None else self.rows.T @ self.rows
        hessian[np.diag_indices(self.n)] += self.damping
        return np.asarray(hessian, dtype=np.float64)

    def linear_term(self) -> FloatArray:
        """``b = H w - g`` of the joint program written in the new weights, (n,)."""
        return self.hessian_product(self.weights) - self.gradient_or_zero

    def constant_term(self) -> float:
        """``1/2 w.H w - g.w``: the loss increase of removing every weight."""
        w = self.weights
        return float(0.5 * (w @ self.hessian_product(w)) - self.gradient_or_zero @ w)

    def require_definite(self) -> None:
        """Raise `NotPositiveDefiniteError` unless ``H`` is positive definite (joint needs it).

        With positive damping this holds by construction and costs nothing; otherwise one Cholesky
        factorisation of the dense matrix.
        """
        if self.damping > 0.0 or self.n == 0:
            return
        remedy = "add damping > 0"
        if self.rows is not None and self.rows.shape[0] < self.n:
            found = f"0 with {self.rows.shape[0]} rows for {self.n} weights: H is singular"
            raise NotPositiveDefiniteError("damping", found, remedy)
        try:
            factor = cholesky(self.dense_hessian(), lower=True, check_finite=False)
        except LinAlgError:
            raise NotPositiveDefiniteError("damping", "0 and H is singular", remedy) from None
        pivots = np.diagonal(factor) ** 2
        if pivots.min() <= np.finfo(np.float64).eps * self.n * pivots.max():
            raise NotPositiveDefiniteError("damping", "0 and H is singular to rounding", remedy)

    def fingerprint(self) -> str:
        """SHA-256 of the data (not of the name), as 64 hex digits."""
        digest = hashlib.sha256(f"{self.n} {self.n_prune} {self.damping.hex()}".encode())
        for tag in ("weights", "rows", "hessian", "gradient"):
            array = getattr(self, tag)
            if array is not None:
                digest.update(f"{tag} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array, dtype="<f8").data)
        return digest.hexdigest()

    @property
    def _hessian(self) -> FloatArray:
        assert self.hessian is not None
        return self.hessian


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


def _checked_hessian(value: ArrayLike, n: int, damping: float) -> FloatArray:
    hessian = frozen_array("hessian", value, 2)
    if hessian.shape != (n, n):
        raise ShapeError("hessian", f"shape {hessian.shape} for {n} weights", f"pass ({n}, {n})")
    if n == 0:
        return hessian
    asymmetry = float(np.abs(hessian - hessian.T).max())
    if asymmetry > SYMMETRY_TOLERANCE * float(np.abs(hessian).max()):
        remedy = "pass (H + H^T) / 2 if the difference is rounding"
        raise NotPositiveDefiniteError("hessian", f"not symmetric (differs by {asymmetry:.3g})", remedy)
    if asymmetry > 0.0:
        hessian = 0.5 * (hessian + hessian.T)
        hessian.flags.writeable = False
    _check_semidefinite(hessian, damping)
    return hessian


def _check_semidefinite(hessian: FloatArray, damping: float) -> None:
    n = hessian.shape[0]
    scale = max(float(np.abs(np.diagonal(hessian)).mean()), float(np.abs(hessian).max()) / n)
    shifted = hessian.copy()
    shifted[np.diag_indices(n)] += DEFINITENESS_TOLERANCE * scale + np.finfo(np.float64).tiny
    try:
        cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        lowest = float(np.linalg.eigvalsh(hessian)[0])
        found = f"indefinite: smallest eigenvalue {lowest:.3g} before damping {damping:g}"
        remedy = "pass a positive semidefinite model such as a Fisher or Gauss-Newton matrix"
        raise NotPositiveDefiniteError("hessian", found, remedy) from None
