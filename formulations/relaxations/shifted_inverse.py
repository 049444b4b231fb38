"""Solves with ``Z^T Z + shift I`` for scaled gradient rows ``Z = R diag(scale)``, without forming ``Z``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve

from formulations.dense_forms import error_factor
from formulations.problem import FloatArray

PANEL_BYTES = 2**26
"""Memory of the scaled copy of a few columns (or rows): the rows are never copied whole."""


def scaled_gram(rows: FloatArray, scale: FloatArray, stopped: Callable[[], bool]) -> FloatArray | None:
    """Return the smaller of ``Z Z^T`` and ``Z^T Z``, summed over panels; None if `stopped` says so between.

    O(m n min(m, n)); beside the rows it needs the result and one panel.
    """
    m, n = rows.shape
    wide = m <= n
    order, length = (m, n) if wide else (n, m)
    width = max(1, PANEL_BYTES // (8 * max(order, 1)))
    gram = np.zeros((order, order))
    for start in range(0, length, width):
        if stopped():
            return None
        part = slice(start, start + width)
        panel = rows[:, part] * scale[part] if wide else (rows[part] * scale).T
        gram += panel @ panel.T
    return gram


class ShiftedInverse:
    """``(Z^T Z + shift I)^-1`` for changing shifts.

    Parameters
    ----------
    rows : (m, n) float64 array
    scale : (n,) float64 array
    gram : square array
        From `scaled_gram`. With ``m <= n`` solves go through it by Woodbury, otherwise directly.

    Notes
    -----
    A new shift costs one Cholesky factorisation of the Gram matrix, a solve O(m n).
    """

    def __init__(self, rows: FloatArray, scale: FloatArray, gram: FloatArray) -> None:
        self.rows = rows
        self.scale = scale
        self.gram = gram
        self._shift = -1.0
        self._factor: tuple[FloatArray, bool]

    def solve(self, right: FloatArray, shift: float) -> FloatArray:
        """``(Z^T Z + shift I)^-1 right`` for `right` of shape (n,)."""
        if shift != self._shift:
            self._factorise(shift)
        m, n = self.rows.shape
        if m > n:
            return np.asarray(cho_solve(self._factor, right, check_finite=False))
        inner = cho_solve(self._factor, self.rows @ (self.scale * right), check_finite=False)
        return np.asarray((right - self.scale * (self.rows.T @ inner)) / shift)

    def _factorise(self, shift: float) -> None:
        order = self.gram.shape[0]
        # Enough on the diagonal to make a semidefinite matrix definite despite its rounding.
        margin = 4.0 * error_factor(order + max(self.rows.shape)) * float(np.trace(self.gram))
        for added in (0.0, margin):
            shifted = self.gram.copy()
            shifted[np.diag_indices(order)] += shift + added
            try:
                self._factor = cho_factor(shifted, overwrite_a=True, check_finite=False)
                break
            except LinAlgError:
                if added > 0.0:
                    raise
        self._shift = shift
