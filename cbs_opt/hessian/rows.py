"""``A = R^T R`` from gradient rows R, and what its solves share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from cbs_opt.hessian import products
from cbs_opt.hessian.operators import Factor, Hessian, PlainHessian
from formulations.errors import ShapeError

SPLIT_SHARE = 0.5
"""Share of the smallest eigenvalue that stands in for a damping of 0."""
SHARED_GRAM_SIZE = 1 << 26
"""Numbers in the Gram matrices that are kept from one tried network to the next: 512 MiB."""


class KeptGram:
    """``R_K R_K^T`` of a kept set that changes little from one call to the next.

    Only columns that enter or leave K are multiplied: O(m^2 |change|), from the empty set at first. The rows
    have to be the same in every call; they are not held in between. The rounding depends on all sets seen.
    """

    def __init__(self) -> None:
        self._seen: tuple[Tensor, Tensor] | None = None

    def of(self, rows: Tensor, keep: Tensor) -> Tensor:
        """Return the Gram matrix of the columns where `keep` (n,) is True, (m, m) float64, read-only."""
        if self._seen is None or int((keep != self._seen[0]).sum()) > int(keep.sum()):
            nothing = rows.new_zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
            self._seen = torch.zeros_like(keep), nothing
        members, gram = self._seen
        entering = (keep & ~members).nonzero().squeeze(1)
        leaving = (members & ~keep).nonzero().squeeze(1)
        gram = gram + products.inner_gram(rows, entering) - products.inner_gram(rows, leaving)
        self._seen = keep.clone(), gram
        return gram


class SharedGrams:
    """A `KeptGram` for every one of so many blocks, where they are few enough to keep them."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._grams: dict[str, KeptGram] = {}

    def of(self, name: str, rows: int) -> KeptGram | None:
        """Return that of block `name` with so many rows, or None where it is not worth its memory."""
        if self._blocks * rows**2 > SHARED_GRAM_SIZE:
            return None
        return self._grams.setdefault(name, KeptGram())


class RowsHessian(PlainHessian):
    """``A = R^T R``.

    R (m, n) is of any precision, often a view of the rows of the whole network. `gram` is shared by operators
    of the same rows whose kept sets differ little. If `spectral`, the diagonal of the whole inverse comes
    from eigenvectors of A: it is cheap for all dampings but the first. They are kept in the precision of the
    rows and take as much memory as they do.

    `factored` solves through the kept block where it is no larger than m, and through the m x m Woodbury
    system otherwise: O(m s min(m, s)) for the first damping and O(m^3 + m s) for the others. No array of the
    size of the rows is made. The eigenvectors take O(m n min(m, n)) once, then O(n min(m, n)) a damping.
    """

    by_rows: ClassVar[bool] = True

    def __init__(self, rows: Tensor, gram: KeptGram | None = None, *, spectral: bool = False) -> None:
        if rows.ndim != 2:
            raise ShapeError("rows", f"shape {tuple(rows.shape)}", "pass one row a sample, (m, n)")
        self.data, self.gram, self.spectral = rows, gram, spectral
        self.rank, self.n = rows.shape

    @property
    def precision(self) -> torch.dtype:
        return self.data.dtype

    def product(self, x: Tensor) -> Tensor:
        return self.back(products.image(self.data, x))

    def diagonal(self) -> Tensor:
        return products.column_squares(self.data)

    def quadratic(self, step: Tensor) -> float:
        return float(products.image(self.data, step).square().sum())

    def dense(self) -> Tensor:
        rows = self.data.double()
        return rows.T @ rows

    def back(self, image: Tensor) -> Tensor:
        return (self.data.T @ image.to(self.data.dtype)).double()

    def back_at(self, index: Tensor, image: Tensor) -> Tensor:
        return self.columns(index).T @ image

    def square(self, image: Tensor, x: Tensor) -> Tensor:
        return image @ image

    def entries(self, left: Tensor, right: Tensor) -> Tensor:
        return self.columns(left).T @ self.columns(right)

    def part(self, index: Tensor, *, precise: bool = True) -> Tensor:
        columns = self.data.index_select(1, index)
        columns = columns.double() if precise else columns
        return (columns.T @ columns).double()

    def cross(self, kept: Tensor, removed: Tensor) -> Tensor:
        return products.kept_adjoint(self.data, kept, products.image(self.data, removed))

    def row_form(self, damping: float, name: str) -> tuple[Tensor, float]:
        if self.rank <= self.n and damping > 0.0:
            return self.data, damping
        if self.rank < self.n:
            why = f"H is singular with {self.rank} rows for {self.n} weights"
            products.raise_singular(name, damping, why)
        return reduced_rows(products.inner_gram(self.data.T), damping, name)

    def prepared(self) -> Hessian:
        return self if self.spectral else RowsHessian(self.data, self.gram, spectral=True)

    def factored(
        self, dampings: Sequence[float], keep: Tensor | None = None, name: str = ""
    ) -> Iterator[Factor]:
        whole = self.spectral and (keep is None or bool(keep.all()))
        shared = _KeptRows(self, None if whole else keep, name)
        if shared.wide and min(dampings) == 0.0 and not whole:
            why = f"H is singular with {self.rank} rows for {len(shared.kept)} kept weights"
            products.raise_singular(name, 0.0, why)
        for damping in dampings:
            yield RowsFactor(shared, damping)

    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues of A with its eigenvectors, as rows times their roots where m < n."""
        rows = self.data
        if self.rank >= self.n:
            values, vectors = torch.linalg.eigh(products.inner_gram(rows.T))
            return values.clamp_min(0.0), vectors
        everything = torch.ones(self.n, dtype=torch.bool, device=rows.device)
        gram = products.inner_gram(rows) if self.gram is None else self.gram.of(rows, everything)
        values, vectors = torch.linalg.eigh(gram)
        return values.clamp_min(0.0), vectors.T.to(rows.dtype) @ rows

    spectrum = cached_property(eigenvectors)


class _KeptRows:
    """What the factors of all dampings share: the kept columns of R, their small matrix and some images."""

    def __init__(self, hessian: RowsHessian, keep: Tensor | None, name: str) -> None:
        self.hessian, self.keep, self.name = hessian, keep, name
        self.rows = hessian.data
        self.kept = hessian.kept(keep)
        self.wide = len(self.kept) > self.rows.shape[0]
        self._images: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def matrix(self) -> Tensor:
        """``R_K R_K^T`` (m, m) where s > m, else ``R_K^T R_K`` (s, s)."""
        if not self.wide:
            return self.hessian.part(self.kept)
        everything = torch.ones(self.hessian.n, dtype=torch.bool, device=self.rows.device)
        gram = self.hessian.gram or KeptGram()
        return gram.of(self.rows, everything if self.keep is None else self.keep)

    def image(self, x: Tensor) -> Tensor:
        """Return ``R x``, or ``R_K x`` for `x` (s,): once for all dampings."""
        if id(x) not in self._images:
            whole = x
            if len(x) < self.hessian.n:
                whole = torch.zeros(self.hessian.n, dtype=torch.float64, device=x.device)
                whole[self.kept] = x
            self._images[id(x)] = x, products.image(self.rows, whole)
        return self._images[id(x)][1]


class RowsFactor:
    """`Factor` of a `RowsHessian`."""

    def __init__(self, shared: _KeptRows, damping: float) -> None:
        self.shared, self.damping = shared, damping

    @cached_property
    def factor(self) -> Tensor:
        """The Cholesky factor of ``damping I`` and the small matrix."""
        matrix = products.damped(self.shared.matrix, self.damping)
        return products.factorise(matrix, self.shared.name, self.damping)

    def solve(self, right: Tensor, removed: Tensor | None = None) -> Tensor:
        return self.solve_pulled(right, None if removed is None else self.shared.image(removed))

    def solve_pulled(self, right: Tensor, pulled: Tensor | None) -> Tensor:
        """Return ``H_KK^-1 (right + R_K^T pulled)`` for `pulled` (m,) float64.

        ``(damping I + B^T B)^-1 = (I - B^T (damping I + B B^T)^-1 B) / damping``, and applied to
        ``B^T z`` it is ``B^T (damping I + B B^T)^-1 z``, where nothing cancels however small the damping.
        """
        shared, factor = self.shared, self.factor
        if not shared.wide:
            if pulled is not None:
                right = right + shared.hessian.columns(shared.kept).T @ pulled
            return products.solved(factor, right)
        outer = (0.0 if pulled is None else pulled) - shared.image(right) / self.damping
        inner = products.solved(factor, outer)
        return right / self.damping + products.kept_adjoint(shared.rows, shared.kept, inner)

    def inverse_diagonal(self) -> Tensor:
        """Return ``diag(H_KK^-1)``, (s,) float64; O(m^2 s), or O(s^3) where that is less."""
        shared = self.shared
        index = None if shared.keep is None else shared.kept
        if index is None and shared.hessian.spectral:
            return self._spectral_diagonal(*shared.hessian.spectrum)
        if not shared.wide:
            rows = shared.rows if index is None else shared.rows.index_select(1, index)
            matrix = products.inner_gram(rows.T)
            factor = products.factorise(products.damped(matrix, self.damping), shared.name, self.damping)
            return torch.diagonal(torch.cholesky_inverse(factor))
        # H^-1 = (I - R^T (damping I + R R^T)^-1 R) / damping, so its diagonal needs |L^-1 R_i|^2.
        matrix = products.damped(products.inner_gram(shared.rows, index), self.damping)
        factor = products.factorise(matrix, shared.name, self.damping)
        seen = torch.empty(len(shared.kept), dtype=torch.float64, device=matrix.device)
        for span, columns in products.column_pieces(shared.rows, index):
            seen[span] = torch.linalg.solve_triangular(factor, columns, upper=False).square_().sum(dim=0)
        return (1.0 - seen).clamp_min(torch.finfo(torch.float64).eps) / self.damping

    def _spectral_diagonal(self, values: Tensor, vectors: Tensor) -> Tensor:
        weights = 1.0 / (values + self.damping)
        if not self.shared.wide:
            return vectors.square() @ weights
        seen = products.weighted_squares(vectors, weights)
        return (1.0 - seen).clamp_min(torch.finfo(torch.float64).eps) / self.damping


def reduced_rows(matrix: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """Return rows whose Gram matrix is `matrix`, or less by what a damping of 0 then takes."""
    values, vectors = torch.linalg.eigh(matrix)
    if damping == 0.0:
        products.factorise(matrix, name, damping)
        damping = SPLIT_SHARE * float(values[0])
        values = values - damping
    return values.clamp_min(0.0).sqrt()[:, None] * vectors.T, damping
