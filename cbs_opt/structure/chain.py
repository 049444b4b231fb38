"""Layers fitted while a chain of blocks runs: each block runs a few times, not the network for each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor, nn

from cbs_opt.errors import BlockListError, NoEligibleWeightsError
from cbs_opt.layers.blocks import Block, find_blocks
from cbs_opt.layers.calibration import Calibration, calibrate, without_cache
from cbs_opt.network.data import Batch
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.network.trial import plain_attention
from cbs_opt.structure.reading import FloatArray, affine, enough_rows, rows_of, watching

CHUNK_TOKENS = 2_048
"""Tokens that run through a block at once."""

Visit = Callable[[str, FloatArray, FloatArray], None]
"""Told of a layer: its name, and the two matrices of `reading.regression`; it may change the layer."""


class _Enough(BaseException):
    """Ends a block once the layer has run that it was made for; no network catches it by mistake."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """A network whose blocks follow each other, with what the first of them is fed.

    `layers` are those that are visited, in the order in which blocks run.
    """

    model: nn.Module
    blocks: tuple[Block, ...]
    layers: tuple[tuple[str, ...], ...]
    fed: Calibration

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]) -> Chain | None:
        """Return a network as a chain; None if it has no list of blocks, or a layer is in none of them.

        No more batches are taken than give `enough_rows` for the widest of the layers.
        """
        try:
            blocks, _ = find_blocks(model)
        except (BlockListError, NoEligibleWeightsError):
            return None
        own = tuple(tuple(name for name in layers if name.startswith(f"{block.name}.")) for block in blocks)
        if sum(map(len, own)) < len(layers) or not layers:
            return None
        with _running(model):
            try:
                fed = calibrate(model, blocks, list(batches), samples=None, chunk_tokens=CHUNK_TOKENS)
            except BlockListError:
                return None
        widest = max(affine(model.get_submodule(name)).shape[1] - 1 for name in layers)
        rows = accumulate(fed.hidden[..., 0].numel() for fed in fed.batches)
        needed = next((n for n, total in enumerate(rows, 1) if total >= enough_rows(widest)), None)
        return cls(model=model, blocks=blocks, layers=own, fed=Calibration(batches=fed.batches[:needed]))

    def run(self, work: nn.Module, visit: Visit) -> None:
        """Visit the layers in the order in which they run; `work`, a copy of the network, changes on the way.

        Each is visited with its inputs in `work` as changed so far, and in the network itself.
        """
        before = [replace(fed) for fed in self.fed.batches]
        now = [replace(fed) for fed in self.fed.batches]
        with _running(self.model), _running(work):
            for number, (block, layers) in enumerate(zip(self.blocks, self.layers, strict=True)):
                changed = work.get_submodule(block.name)
                read: list[dict[str, list[Tensor]]] = []
                for fed in before:
                    read.append({})
                    with watching(self.model, layers, _Noting(read[-1], fed.positions)):
                        fed.hidden = fed.run(number, block.module)
                for name in list(read[0]):
                    gram, cross, count = torch.zeros(()), torch.zeros(()), 0
                    for fed, found in zip(now, read, strict=True):
                        seen: dict[str, list[Tensor]] = {}
                        noting = _Noting(seen, fed.positions, calls=len(found[name]))
                        with watching(work, [name], noting), suppress(_Enough):
                            fed.run(number, changed)
                        old, new = _with_one(found.pop(name)), _with_one(seen[name])
                        gram, cross = gram + new.T @ new, cross + old.T @ new
                        count += len(new)
                    visit(name, (gram / count).cpu().numpy(), (cross / count).cpu().numpy())
                if number + 1 < len(self.blocks):
                    for fed in now:
                        fed.hidden = fed.run(number, changed)


class _Noting:
    """Hook that keeps what layers are fed, without padding, and ends the block after so many calls."""

    def __init__(
        self, rows: dict[str, list[Tensor]], positions: Tensor | None, calls: int | None = None
    ) -> None:
        self._rows = rows
        self._positions = positions
        self._calls = calls

    def __call__(self, name: str, module: nn.Module, x: Tensor, _: Tensor) -> None:
        """Keep the inputs of a layer."""
        self._rows.setdefault(name, []).append(rows_of(module, x, self._positions))
        if len(self._rows[name]) == self._calls:
            raise _Enough


def _with_one(rows: Sequence[Tensor]) -> Tensor:
    joined = torch.cat(list(rows)).double()
    return torch.cat([joined, joined.new_ones(len(joined), 1)], 1)


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """Run a network as it is in evaluation, without gradients and caches."""
    with ExitStack() as stack:
        for context in (kept(model), evaluation_mode(model), plain_attention(), without_cache(model)):
            stack.enter_context(context)
        stack.enter_context(torch.no_grad())
        yield
