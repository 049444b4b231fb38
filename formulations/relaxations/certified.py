"""Products and definiteness checks whose rounding errors are bounded: what certificates rest on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import LinAlgError, cholesky

from formulations.dense_forms import error_factor, summed_entries
from formulations.problem import LARGEST_FACTORISED, BlockProblem, BoolArray, FloatArray, IntArray

CHUNK = 256
"""Columns summed by one matrix product: shorter sums have smaller error bounds."""


@dataclass(frozen=True)
class BoundedVector:
    """A computed vector and a bound on the absolute error of each entry."""

    value: FloatArray
    error: FloatArray


def column_norms(problem: BlockProblem) -> FloatArray:
    """``sqrt(H_ii)`` from above, (n,): ``|H_ij| <= d_i d_j`` bounds every rounding error of ``H``."""
    diagonal = problem.hessian_diagonal() + problem.indefiniteness
    return np.asarray(np.sqrt(diagonal) * (1.0 + 1e-6))


def row_norms(problem: BlockProblem, norms: FloatArray) -> FloatArray:
    """``sqrt(H_ii - damping)`` from above, given `column_norms`: with rows, the norms of their columns."""
    return np.asarray(np.sqrt(np.maximum(norms * norms - problem.damping, 0.0)))


def bounded_product(problem: BlockProblem, x: FloatArray, norms: FloatArray) -> BoundedVector:
    """``H x`` with an entrywise error bound; O(m n) with rows, O(n^2) with a Hessian.

    A sum of ``q`` products in any order has relative error ``gamma_q`` of the sum of magnitudes
    (Higham 2002, section 3.1). With a Hessian, ``sum_j |H_ij| |x_j| <= d_i sum_j d_j |x_j|``. With rows,
    whose columns are ``r_i``, the image ``z = R x`` errs by at most ``gamma sum_j |r_j| |x_j|`` in norm,
    and ``R^T z`` by ``|r_i|`` times that and ``gamma_m |r_i| |z|`` (Cauchy-Schwarz).
    """
    if problem.rows is None:
        value = problem.hessian_product(x)
        reach = float(norms @ np.abs(x))
        return BoundedVector(value, error_factor(problem.n + 4 + problem.n.bit_length()) * reach * norms)
    height = problem.rows.shape[0]
    image = np.zeros(height)
    for start in range(0, problem.n, CHUNK):
        image += problem.rows[:, start : start + CHUNK] @ x[start : start + CHUNK]
    ridge = problem.damping * x
    value = problem.rows.T @ image + ridge
    columns = row_norms(problem, norms)
    length = CHUNK + -(-problem.n // CHUNK) + 8
    moved = error_factor(length) * float(columns @ np.abs(x)) * 1.01
    moved += error_factor(height + 8) * float(np.linalg.norm(image)) * 1.01
    error = columns * moved
    if problem.channels is not None:
        by_channel = problem.channels.product(x)
        width = max((len(moment) for moment in problem.channels.moments), default=0)
        # Of the sum of magnitudes, which is itself computed.
        error += 1.01 * error_factor(width + 8) * problem.channels.absolute.product(np.abs(x))
        error += error_factor(8) * (np.abs(value) + np.abs(by_channel))
        value = value + by_channel
    return BoundedVector(value, error + error_factor(8) * (np.abs(value) + np.abs(ridge)))


@dataclass(frozen=True, kw_only=True)
class SplitForm:
    """What a point u says of ``H = B + Q``: ``const - 1/2 u.Q u`` and the linear term ``h = b - Q u``.

    `base` errs by `lost` at most, and each entry of `residual`, which is h, by that of `error`.
    """

    residual: FloatArray
    error: FloatArray
    base: float
    lost: float


def split_form(
    problem: BlockProblem,
    u: FloatArray,
    own: FloatArray,
    own_size: FloatArray,
    norms: FloatArray,
    width: int = 0,
) -> SplitForm:
    """Return the form of a point under a split B of `width` entries a row besides the diagonal; O(m n).

    `own` is ``B u``, `own_size` is ``|B| |u|``, `norms` are `column_norms`.
    """
    w, g = problem.weights, problem.gradient_or_zero
    # h = H (w - u) - g + B u and the constant share one product.
    change = bounded_product(problem, w - u, norms)
    sloppy = error_factor(8 + width)
    # w - u is rounded before the product.
    moved = change.error + sloppy * norms * float(norms @ (np.abs(w) + np.abs(u)))
    # 1/2 w.Hw - 1/2 u.Hu = 1/2 (w + u).H(w - u)
    both = w + u
    magnitude = np.abs(both) @ np.abs(change.value) + np.abs(g) @ np.abs(w) + np.abs(u) @ own_size
    return SplitForm(
        residual=change.value - g + own,
        error=moved + sloppy * (np.abs(change.value) + np.abs(g) + own_size),
        base=0.5 * float(both @ change.value) - float(g @ w) + 0.5 * float(u @ own),
        lost=0.5 * float(np.abs(both) @ moved) + error_factor(problem.n + width + 16) * float(magnitude),
    )


def definiteness_margin(problem: BlockProblem, order: int) -> float:
    """``eta``: what forming and factorising `order` rows of ``H`` may lose of ``diag(H)`` by rounding."""
    return 4.0 * order * (error_factor(summed_entries(problem) + 4) + error_factor(order + 4))


def provable_split(problem: BlockProblem, split: FloatArray) -> FloatArray:
    """Return the largest split up to `split` that `split_is_valid` proves if ``H - split`` is semidefinite.

    A damping that came with a Hessian proves nothing by itself: the split gives way for the rounding of a
    Cholesky factorisation, twice, and may no longer be positive then.
    """
    if _damping_proves(problem, split):
        return split
    return np.asarray(split - 2.0 * definiteness_margin(problem, problem.n) * column_norms(problem) ** 2)


def split_is_valid(problem: BlockProblem, split: FloatArray, norms: FloatArray, part: BoolArray) -> bool:
    """Whether ``H - diag(split)`` restricted to the indices in `part` is proved semidefinite.

    Free where rows alone are given and the split is at most the damping. Otherwise a Cholesky
    factorisation of ``H - diag(split) - eta diag(H)`` must succeed, ``eta`` covering the rounding of
    forming and factorising it; O(m q^2 + q^3) for q indices. With channels it is enough that each of
    them, without the rows, passes that test; the whole of ``H`` is asked where it is small enough.
    """
    index = np.flatnonzero(part)
    if _damping_proves(problem, split[index]):
        return True
    n = index.size
    if n == 0:
        return True
    if problem.channels is not None:
        if _channels_prove(problem, split, norms, index):
            return True
        if n > LARGEST_FACTORISED:
            return False
    margin = definiteness_margin(problem, n)
    if problem.rows is not None:
        columns = problem.rows[:, index]
        shifted = columns.T @ columns
        if problem.channels is not None:
            shifted += problem.channels.restricted(index).dense()
    else:
        assert problem.hessian is not None
        shifted = problem.hessian[np.ix_(index, index)]
    shifted[np.diag_indices(n)] += problem.damping
    shifted[np.diag_indices(n)] -= split[index] + margin * norms[index] ** 2
    try:
        cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return False
    return True


def rest_is_definite(problem: BlockProblem, split: FloatArray, norms: FloatArray) -> bool:
    """Whether ``H - split`` is proved semidefinite for a whole matrix (n, n); O(m n^2 + n^3)."""
    shifted = problem.dense_hessian() - split
    shifted[np.diag_indices(problem.n)] -= definiteness_margin(problem, problem.n) * norms**2
    try:
        cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return False
    return True


def _damping_proves(problem: BlockProblem, split: FloatArray) -> bool:
    """Whether ``H - D`` is semidefinite because rows alone are beside a damping of at least `split`."""
    alone = problem.rows is not None and problem.channels is None
    return alone and bool((split <= problem.damping).all())


def _channels_prove(problem: BlockProblem, split: FloatArray, norms: FloatArray, index: IntArray) -> bool:
    """Whether the channels, damped, less the split on `index` are proved semidefinite one by one."""
    assert problem.channels is not None
    term = problem.channels.restricted(index)
    less, squares = split[index] - problem.damping, norms[index] ** 2
    for channel, span in enumerate(term.spans()):
        shifted = term.matrix(channel)
        margin = definiteness_margin(problem, len(shifted))
        shifted[np.diag_indices(len(shifted))] -= less[span] + margin * squares[span]
        try:
            cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
        except LinAlgError:
            return False
    return True


def value_ceiling(problem: BlockProblem, new_weights: FloatArray) -> float:
    """Return the loss increase of `new_weights`, rounded up by a proven bound on all rounding; O(m n)."""
    value, lost = bounded_value(problem, new_weights)
    return value + lost


def bounded_value(problem: BlockProblem, new_weights: FloatArray) -> tuple[float, float]:
    """Return the loss increase of `new_weights` and a proven bound on its error; O(m n).

    ``d = u - w`` has relative error ``e`` in each entry, which moves ``1/2 d.H d`` by at most
    ``2 e (sum_i d_i |H_ii|^1/2)^2``.
    """
    step = new_weights - problem.weights
    gradient = problem.gradient_or_zero
    norms = column_norms(problem)
    product = bounded_product(problem, step, norms)
    size, reach = np.abs(step), float(norms @ np.abs(step))
    lost = 0.5 * float(size @ product.error) + error_factor(8) * (
        reach * reach + float(np.abs(gradient) @ size)
    )
    magnitude = 0.5 * float(size @ np.abs(product.value)) + float(np.abs(gradient) @ size)
    lost += error_factor(problem.n + 16) * magnitude
    return 0.5 * float(step @ product.value) + float(gradient @ step), 2.0 * lost


def largest_sum(values: FloatArray, count: int) -> float:
    """Sum of the `count` largest entries."""
    if count <= 0:
        return 0.0
    if count >= values.size:
        return float(values.sum())
    return float(np.partition(values, values.size - count)[values.size - count :].sum())
