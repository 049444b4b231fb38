"""The eigenvalues of a Fisher model, so that every damping after the first costs next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from cbs_opt.hessian.products import inner_gram, weighted_squares


class RowSpectrum:
    """Eigenvalues and eigenvectors of ``R^T R``, for solves with ``R^T R + damping I``.

    Parameters
    ----------
    rows : (m, n) tensor
    gram : (m, m) float64 tensor, optional
        ``R R^T``, where it is known already.

    Notes
    -----
    O(m n min(m, n)) once; then O(n min(m, n)) a damping. The eigenvectors are kept in the precision
    of the rows and take as much memory as they do.
    """

    def __init__(self, rows: Tensor, gram: Tensor | None = None) -> None:
        m, n = rows.shape
        self.n = n
        self._dual = m < n
        if not self._dual:
            values, vectors = torch.linalg.eigh(inner_gram(rows.T))
            self._values, self._vectors = values.clamp_min(0.0), vectors
            return
        values, vectors = torch.linalg.eigh(inner_gram(rows) if gram is None else gram)
        self._values = values.clamp_min(0.0)
        # U^T R, whose rows are eigenvectors of R^T R times the roots of their eigenvalues.
        self._vectors = vectors.T.to(rows.dtype) @ rows

    def inverse_diagonal(self, damping: float) -> Tensor:
        """``diag((R^T R + damping I)^-1)``, (n,) float64; `damping` > 0 unless R has full column rank."""
        weights = 1.0 / (self._values + damping)
        if not self._dual:
            diagonal: Tensor = self._vectors.square() @ weights
            return diagonal
        seen = weighted_squares(self._vectors, weights)
        return (1.0 - seen).clamp_min(torch.finfo(torch.float64).eps) / damping
