"""Memory that the methods take for one block beside its rows, from the arrays that they make.

Written for a block of n weights with m rows of e bytes an entry. Vectors of length n are counted together;
m x m matrices in float64 (8 m^2), pieces of at most `COLUMN_CHUNK` columns, and whatever grows with n are
counted one by one. Where two steps follow one another the larger counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt.hessian.channel_system import GROUP
from cbs_opt.hessian.products import COLUMN_CHUNK, ROW_CHUNK
from cbs_opt.select.joint_program.selectors import DENSE_JOINT
from cbs_opt.select.selection_program.pair_scan import DIRECTIONS
from cbs_opt.select.selection_program.tuning import TUNING

DOUBLE = 8
PANEL = 64 << 20
"""Bytes of scaled rows that `formulations.relaxations.matrix_free` works on at a time."""
PRODUCT_VECTORS = 2 * ROW_CHUNK + 2
"""Vectors of length n in a pass over the rows in float64: a chunk of them, its squares and the sums."""


@dataclass(frozen=True, kw_only=True)
class BlockSize:
    """What decides the memory that a method takes for a block.

    Parameters
    ----------
    n : int
        Weights.
    n_keep : int
        Those that stay, as far as it is known before the budget is spent.
    m : int
        Rows.
    itemsize : int
        Bytes of an entry of the rows.
    factors : int
        Bytes of the factors of all channels of the layer-input term in float64; 0 without the term.
    alike : int, default 1
        Blocks of this very size in the network.
    """

    n: int
    n_keep: int
    m: int
    itemsize: int
    factors: int
    alike: int = 1

    @property
    def square(self) -> int:
        """An m x m matrix."""
        return DOUBLE * self.m**2

    def piece(self, columns: int, itemsize: int = DOUBLE) -> int:
        """A piece of the rows as the products take them."""
        return self.m * min(columns, COLUMN_CHUNK) * itemsize

    def gathered(self, columns: int) -> int:
        """Columns that are picked out and brought to float64."""
        wide = 0 if self.itemsize == DOUBLE else DOUBLE
        return self.piece(columns, self.itemsize + wide)


def score_bytes(name: str, size: BlockSize) -> int:
    """Of a saliency: `name`, or "joint" for that of the joint program."""
    vectors = PRODUCT_VECTORS * DOUBLE * size.n
    if name in ("obs", "joint"):
        if size.factors:
            return max(vectors, _channel_system(size, size.n))
        if size.m >= size.n:
            return size.piece(size.m) + 5 * DOUBLE * size.n**2
        squares = 2 if name == "obs" else 4
        return max(vectors, 2 * size.piece(size.n) + squares * size.square)
    return vectors if name in ("obd", "gradient_norm") else 3 * DOUBLE * size.n


def update_bytes(kind: str, size: BlockSize) -> int:
    """Of CBS-U ("cbs") or the independent updates."""
    if kind == "independent":
        return score_bytes("obs", size)
    vectors = PRODUCT_VECTORS * DOUBLE * size.n
    if size.factors and size.n_keep > size.m:
        return max(vectors, size.gathered(size.n_keep), _channel_system(size, size.n_keep))
    if size.n_keep > size.m:
        return max(vectors, size.gathered(size.n_keep) + 2 * size.square)
    return vectors + size.gathered(size.n_keep) + 3 * DOUBLE * size.n_keep**2


def selection_bytes(method: str, program: str, size: BlockSize) -> int | None:
    """Of a method; None where it is not known, as for solvers."""
    if method in ("magnitude", "randomized_magnitude"):
        return 4 * DOUBLE * size.n
    if method in ("obd", "obs", "loss_preservation", "gradient_norm"):
        return score_bytes(method, size)
    if method == "swap_search" and program == "selection":
        return _selection_swaps(size)
    if method not in ("swap_search", "greedy_obs", "iterative_hard_threshold") or program != "joint":
        return None
    if method == "iterative_hard_threshold":
        return max(6 * size.square, size.gathered(size.n_keep) + 2 * size.square)
    if size.n <= DENSE_JOINT:
        return DOUBLE * (size.m * size.n + 6 * size.n**2)
    return _joint_swaps(method, size)


def _selection_swaps(size: BlockSize) -> int:
    """Whole Gram matrices of a batch, or that of a pool and the pairs."""
    if size.n <= TUNING.dense_limit:
        own = DOUBLE * size.n**2
        batch = min(size.alike, max(1, TUNING.batch_bytes // own))
        return batch * own + size.gathered(size.n) + 3 * own
    pool = min(TUNING.pool // 2, size.n_keep) + min(TUNING.pool // 2, size.n - size.n_keep)
    pools = 3 * DOUBLE * pool**2 + size.m * pool * DOUBLE
    pairs = 4 * DIRECTIONS * size.n
    return PRODUCT_VECTORS * DOUBLE * size.n + max(pools, pairs)


def _joint_swaps(method: str, size: BlockSize) -> int:
    """By rows: the relaxation that a search starts from, greedy drops, and the scores of a search."""
    if size.factors:
        greedy = _channel_system(size, size.n)
        searched = _channel_system(size, size.n_keep) + 4 * size.square
        return greedy if method == "greedy_obs" else max(greedy, searched)
    greedy = size.gathered(size.n) + 5 * size.square
    if method == "greedy_obs":
        return greedy
    rows = DOUBLE * size.m * size.n
    relaxed = rows + min(rows, PANEL) + 3 * size.square
    return max(relaxed, 2 * size.piece(size.n) + 5 * size.square)


def _channel_system(size: BlockSize, kept: int) -> int:
    """`ChannelSystem` of `kept` weights: channel factors, groups of columns, and the small system."""
    factors = round(size.factors * (kept / size.n) ** 2)
    if kept <= size.m:
        return size.gathered(kept) + 4 * DOUBLE * kept**2
    return factors + 2 * size.piece(min(kept, GROUP), size.itemsize) + 3 * size.square
