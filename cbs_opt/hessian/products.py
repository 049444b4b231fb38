"""Products with gradient rows that keep float64 accuracy without a float64 copy of the rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from formulations.errors import NotPositiveDefiniteError

ROW_CHUNK = 8
"""Rows converted to float64 at a time."""
COLUMN_CHUNK = 1_024
"""Columns converted to float64 at a time: wider pieces are no faster and take more memory."""


def image(data: Tensor, x: Tensor) -> Tensor:
    """Return ``data x`` in float64, (m,), for `data` (m, n) of any precision."""
    parts = [part @ x for part in double_chunks(data)]
    return torch.cat(parts) if parts else x.new_zeros(0)


def adjoint_image(data: Tensor, y: Tensor) -> Tensor:
    """Return ``data^T y`` in float64, (n,), for `data` (m, n) of any precision."""
    total = torch.zeros(data.shape[1], dtype=torch.float64, device=data.device)
    first = 0
    for part in double_chunks(data):
        total.addmv_(part.T, y[first : first + part.shape[0]])
        first += part.shape[0]
    return total


def column_squares(rows: Tensor) -> Tensor:
    """Return squared column norms accumulated in float64, (n,)."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in double_chunks(rows):
        total += part.square().sum(dim=0)
    return total


def weighted_squares(rows: Tensor, weights: Tensor) -> Tensor:
    """Return ``sum_k weights_k rows_ki^2`` for float64 `weights` (m,), (n,) float64."""
    total = torch.empty(rows.shape[1], dtype=torch.float64, device=rows.device)
    for span, columns in column_pieces(rows):
        total[span] = weights @ columns.square()
    return total


def double_chunks(data: Tensor) -> Iterator[Tensor]:
    """Return the rows of `data` in float64, a few at a time; each chunk is gone when the next one comes."""
    if data.dtype == torch.float64:
        yield from torch.split(data, ROW_CHUNK)
        return
    # One buffer for all chunks: to allocate such a piece costs more than to work on it.
    buffer = torch.empty(ROW_CHUNK, data.shape[1], dtype=torch.float64, device=data.device)
    for part in torch.split(data, ROW_CHUNK):
        yield buffer[: part.shape[0]].copy_(part)


def column_pieces(
    rows: Tensor, index: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the columns `index` (all by default) of `rows` (m, n) in `dtype`, `COLUMN_CHUNK` at a time.

    Yields their positions among those columns, and the piece, (m, k), which is valid until the next one
    comes and not to be written to. Pieces that have to be made share one buffer: freed and made anew, they
    would be carved up by what is allocated in between, and the process would grow by one a piece.
    """
    m, count = rows.shape[0], rows.shape[1] if index is None else len(index)
    widest = min(count, COLUMN_CHUNK)
    converts = rows.dtype != dtype
    gathered = torch.empty(m * widest if index is not None else 0, dtype=rows.dtype, device=rows.device)
    converted = torch.empty(m * widest if converts else 0, dtype=dtype, device=rows.device)
    for start in range(0, count, COLUMN_CHUNK):
        span = slice(start, min(start + COLUMN_CHUNK, count))
        width = span.stop - span.start
        piece = rows[:, span]
        if index is not None:
            piece = gathered[: m * width].view(m, width)
            torch.index_select(rows, 1, index[span], out=piece)
        yield span, converted[: m * width].view(m, width).copy_(piece) if converts else piece


def inner_gram(rows: Tensor, index: Tensor | None = None) -> Tensor:
    """Return ``R_I R_I^T`` over the columns `index` (all by default), (m, m) float64; O(m^2 |I|)."""
    gram = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64, device=rows.device)
    for _, columns in column_pieces(rows, index):
        gram.addmm_(columns, columns.T)
    return gram


def kept_adjoint(rows: Tensor, kept: Tensor, y: Tensor) -> Tensor:
    """Return ``R_K^T y`` in float64, (s,), in chunks of columns."""
    product = torch.empty(len(kept), dtype=torch.float64, device=rows.device)
    for span, columns in column_pieces(rows, kept):
        product[span] = columns.T @ y
    return product


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return ``matrix + damping I``, a copy."""
    result = matrix.clone()
    result.diagonal().add_(damping)
    return result


def factorise(matrix: Tensor, name: str, damping: float) -> Tensor:
    """Return the Cholesky factor of a matrix of block `name` with `damping` in it."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    floor = torch.finfo(factor.dtype).eps * len(pivots) * max(pivots.tolist(), default=0.0)
    if int(info) != 0 or not bool((pivots > floor).all()):  # NaN fails as well
        raise_singular(name, damping, "the Hessian is singular to rounding")
    return factor


def solved(factor: Tensor, right: Tensor) -> Tensor:
    """Return the solution (s,) of a system with the Cholesky factor `factor`."""
    solution: Tensor = torch.cholesky_solve(right[:, None], factor)[:, 0]
    return solution


def inverse_of_factor(factor: Tensor, precision: torch.dtype) -> Tensor:
    """Return ``L^-1`` of a lower triangular float64 factor, in another precision."""
    identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    inverse: Tensor = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse.to(precision)


def raise_singular(name: str, damping: float, why: str) -> NoReturn:
    """Raise `NotPositiveDefiniteError` for a block and its damping."""
    found = f"{damping:g} for block {name!r}: {why}"
    raise NotPositiveDefiniteError("damping", found, "use a larger damping")
