"""What the blocks of a network are fed: caught before the first one, carried on from each to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.errors import BatchFormatError, BlockListError, ForwardError
from cbs_opt.layers.blocks import Block, handed, kind_of
from cbs_opt.layers.gram import FEW, GramSum
from cbs_opt.layers.levels import Level, levels
from cbs_opt.network.data import Batch, Data, device_of, forward, map_tensors, parts, read, tensors_of
from cbs_opt.network.trial import lent
from formulations.errors import ArgumentError

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
"""Keywords by which blocks are handed what earlier tokens left; not wanted here."""
HIDDEN = "hidden_states"
NOTED = 500_000_000
"""Bytes of what the network as it was feeds the layers of a block that are kept until it is pruned."""
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is handed besides hidden states: further positions, and keywords."""


class _Caught(Exception):
    """Ends a forward pass once the inputs of the first block are known."""


@dataclass(kw_only=True, eq=False)
class Fed:
    """What one batch brings to the present block: hidden states, and the arguments that come with them.

    `calls` are the other arguments of every block, one entry if they all take the same. `positions` says
    which tokens are no padding, where the data say so. `reference` are the hidden states of the network as it
    was before any block was pruned, where they are followed and are others; `ahead` are those after the
    present block, and `noted` is what the block feeds its layers then, by name, in the order of their calls.
    """

    hidden: Tensor
    calls: list[Call]
    positions: Tensor | None = None
    reference: Tensor | None = None
    ahead: Tensor | None = None
    noted: dict[str, list[Tensor]] | None = None

    def run(self, number: int, block: nn.Module, hidden: Tensor | None = None) -> Tensor:
        """Return what block `number` makes of the hidden states, or of others."""
        args, kwargs = self.calls[min(number, len(self.calls) - 1)]
        hidden = self.hidden if hidden is None else hidden
        if HIDDEN in kwargs:
            return _hidden_of(block(*args, **{**kwargs, HIDDEN: hidden}))
        return _hidden_of(block(hidden, *args, **kwargs))


@dataclass(kw_only=True, eq=False)
class Calibration:
    """All batches before the present block."""

    batches: list[Fed] = field(default_factory=list)
    _levels: dict[object, list[tuple[list[int], bool]]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of tokens, or of samples where hidden states have no such axis, padding left out."""
        return sum(
            int(fed.hidden[..., 0].numel()) if fed.positions is None else int(fed.positions.sum())
            for fed in self.batches
        )

    def advance(self, number: int, block: nn.Module) -> None:
        """Carry the hidden states of all batches through block `number`."""
        for fed in self.batches:
            fed.hidden = fed.run(number, block)
            if fed.ahead is not None:
                fed.reference, fed.ahead, fed.noted = fed.ahead, None, None

    def follow(self, number: int, block: Block) -> None:
        """Carry the hidden states of the network as it was through block `number`, which is not pruned yet.

        From the first block on they are followed beside those of the pruned network. What each layer is fed
        is kept until the block is done, up to `NOTED` bytes of it; beyond, `grams` has the block run again.
        """
        noted = 0
        for fed in self.batches:
            notes = _Notes()
            with _looked_at(block, notes.look, once=False):
                fed.ahead = fed.run(number, block.module, fed.reference)
            noted += notes.size
            fed.noted = notes.inputs if noted <= NOTED else None

    def levels(self, number: int, block: Block) -> list[Level]:
        """Return the levels of the layers of block `number`, found out by the first batch.

        Blocks that are alike, and have like layers, are found out about once.
        """
        own = [layer.name.removeprefix(block.name) for layer in block.layers]
        kind = kind_of(block.module), tuple(own)
        if kind not in self._levels:
            found = levels(block, lambda: self.batches[0].run(number, block.module))
            places = {layer.name: place for place, layer in enumerate(block.layers)}
            self._levels[kind] = [
                ([places[layer.name] for layer in level.block.layers], level.once) for level in found
            ]
        return [
            Level(block=replace(block, layers=tuple(block.layers[place] for place in layers)), once=once)
            for layers, once in self._levels[kind]
        ]

    def grams(
        self,
        number: int,
        block: Block,
        *,
        hold: bool = False,
        pruned: Mapping[str, Tensor] | None = None,
        once: bool = False,
    ) -> dict[str, GramSum]:
        """Return the sums of what each layer of `block`, all of block `number` or some, is fed, by name.

        Layers that are handed the very same tensor, in all batches, share one sum. With `hold` some tokens
        are set aside in sums of layers that have few tokens for their inputs. `pruned` are new weights of
        others of the block's layers, by name: layers are then fed by these, and sums are paired with what
        the network as it was feeds them. With `once` each runs once, and nothing after the last of them has
        to.
        """
        few = self.tokens / FEW if hold else 0.0
        try:
            return self._recorded(number, block, _Recorder(few, share=True), pruned, once=once)
        except _Differs:
            return self._recorded(number, block, _Recorder(few, share=False), pruned, once=once)

    def _recorded(
        self,
        number: int,
        block: Block,
        recorder: _Recorder,
        pruned: Mapping[str, Tensor] | None,
        *,
        once: bool,
    ) -> dict[str, GramSum]:
        own = {name.removeprefix(f"{block.name}."): tensor for name, tensor in (pruned or {}).items()}
        for batch, fed in enumerate(self.batches):
            wanted: Mapping[str, list[Tensor]] | None = None if pruned is None else {}
            if wanted is not None and (own or fed.reference is not None):
                wanted = fed.noted
                if wanted is None:
                    notes = _Notes()
                    with _looked_at(block, notes.look, once=once):
                        fed.run(number, block.module, fed.reference)
                    wanted = notes.inputs
            recorder.begin(batch, fed.positions, wanted)
            with _looked_at(block, recorder.look, once=once):
                lent(block.module, own, partial(fed.run, number, block.module))
        return recorder.sums


class _Differs(Exception):
    """Layers that shared their inputs in one batch do not in another."""


@contextmanager
def _looked_at(block: Block, look: Callable[[str, Tensor], None], *, once: bool) -> Iterator[None]:
    """Tell `look` the name of each layer of a block that runs within, and what it is fed.

    With `once` what runs within ends when all of them were.
    """
    left = len(block.layers)

    def hook(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        look(name, handed(args, kwargs))
        left -= 1
        if once and not left:
            raise _Caught

    with ExitStack() as stack:
        for layer in block.layers:
            handle = layer.module.register_forward_pre_hook(partial(hook, layer.name), with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(suppress(_Caught))
        yield


class _Notes:
    """What layers are fed, by name, in the order of their calls."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.size = 0
        """Bytes of them."""
        self._last: tuple[Tensor, int] | None = None
        self._copy = torch.empty(0)

    def look(self, name: str, x: Tensor) -> None:
        """Note what a layer is fed: a copy, as what follows may change it in place."""
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last, self._copy = (x, x._version), x.clone()
            self.size += x.nbytes
        self.inputs.setdefault(name, []).append(self._copy)


class _Recorder:
    """Adds up what layers are fed; more inputs than `few` are many for the tokens."""

    def __init__(self, few: float, *, share: bool) -> None:
        self._few = few
        self._share = share
        self._sums: dict[str, GramSum] = {}
        self._owners: dict[str, str] = {}
        self._batch = 0
        self._positions: Tensor | None = None
        self._wanted: Mapping[str, list[Tensor]] | None = None
        self._calls = Counter[str]()
        self._last: Tensor | None = None
        self._version = 0
        self._last_name = ""

    @property
    def sums(self) -> dict[str, GramSum]:
        """The sums by the name of every layer that ran."""
        return {name: self._sums[owner] for name, owner in self._owners.items()}

    def begin(
        self, batch: int, positions: Tensor | None, wanted: Mapping[str, list[Tensor]] | None = None
    ) -> None:
        """Take note that a batch begins, of which of its tokens count, and of the inputs that are wanted.

        These are the inputs of every layer in the order of its calls; without any, none is missing.
        """
        self._batch, self._positions, self._last = batch, positions, None
        self._wanted = wanted
        self._calls.clear()

    def look(self, name: str, x: Tensor) -> None:
        """Add what a layer is fed."""
        same = self._share and x is self._last and x._version == self._version
        owner = self._last_name if same else name
        if self._owners.setdefault(name, owner) != owner:
            raise _Differs
        if owner != name:
            return
        if name not in self._sums:
            hold = 0.0 < self._few < x.shape[-1]
            paired = self._wanted is not None
            self._sums[name] = GramSum(x.shape[-1], x.device, hold=hold, paired=paired)
        wanted = self._paired(name, x)
        self._calls[name] += 1
        counting = counted(x, self._positions)
        self._sums[name].add(
            counting, name, self._batch, None if wanted is None else counted(wanted, self._positions)
        )
        self._last, self._version, self._last_name = x, x._version, name

    def _paired(self, name: str, x: Tensor) -> Tensor | None:
        """Return the input that is wanted in the place of this one; None if nothing is missing, or known.

        Where tokens choose their layers, as among experts, these may be fed others than before.
        """
        calls = (self._wanted or {}).get(name, [])
        number = self._calls[name]
        if number >= len(calls) or calls[number].shape != x.shape:
            return None
        return calls[number]


def counted(x: Tensor, positions: Tensor | None) -> Tensor:
    """Return what belongs to the tokens that are no padding, (tokens, n), of a tensor (B, T, n)."""
    if positions is not None and x.shape[:-1] == positions.shape:
        return x[positions]
    return x.reshape(-1, x.shape[-1])


def calibrate(
    model: nn.Module, blocks: Sequence[Block], data: Data, *, samples: int | None, chunk_tokens: int
) -> Calibration:
    """Return what the first block is fed, for every batch of `data`, which are read once and in order.

    On the first batch the whole network runs, to see that the blocks follow each other and what else they
    are handed; on the others too if blocks are handed different things, else up to the first block.

    Raises `BlockListError` if a block is not fed what the one before it made; `ForwardError` if the network
    raises; `ArgumentError` for tokens outside of its vocabulary; errors of `read` for the data.
    """
    calibration = Calibration()
    device, known, whole = device_of(model), _vocabulary(model), True
    wanted = limited(read(data, max_samples=samples), samples)
    chunks = chain.from_iterable(by_tokens(batch, chunk_tokens) for batch in wanted)
    for number, batch in enumerate(chunks):
        _check_tokens(batch, known, number)
        fed = _caught(model, blocks, batch.to(device), number, whole=whole)
        whole = len(fed.calls) > 1
        calibration.batches.append(fed)
    return calibration


def limited(batches: Iterable[Batch], samples: int | None) -> Iterator[Batch]:
    """Yield batches of at most `samples` samples together, of all without a number."""
    left = samples
    for batch in batches:
        part = batch if left is None else batch.take(slice(left))
        left = None if left is None else left - part.size
        yield part


def first_tokens(batches: Iterable[Batch], tokens: int) -> list[Batch]:
    """Return single samples from the first on, until there are so many tokens, or all."""
    found: list[Batch] = []
    for sample in chain.from_iterable(by_tokens(batch, 1) for batch in batches):
        if tokens <= 0:
            break
        found.append(sample)
        first = next(tensors_of(sample.inputs))
        tokens -= first.shape[1] if first.ndim > 1 else 1
    return found


def copied(batch: Batch) -> Batch:
    """Return a batch whose inputs nobody else holds, without labels."""
    return replace(batch, inputs=map_tensors(Tensor.clone, batch.inputs), labels=None)


def by_tokens(batch: Batch, tokens: int) -> Iterator[Batch]:
    """Yield the samples of a batch in parts of at most so many tokens, or of one sample."""
    first = next(tensors_of(batch.inputs))
    length = first.shape[1] if first.ndim > 1 else 1
    return parts(batch, max(1, tokens // max(1, length)))


def _vocabulary(model: nn.Module) -> int | None:
    table = getattr(model, "get_input_embeddings", lambda: None)()
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _check_tokens(batch: Batch, known: int | None, number: int) -> None:
    """Raise an error for token ids that the network does not know, or that are not cut into sequences."""
    ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else batch.inputs
    if known is None or not isinstance(ids, Tensor) or ids.is_floating_point():
        return
    if ids.ndim == 1:
        remedy = "cut them into sequences: tokens[: n * length].view(n, length)"
        raise BatchFormatError("data", f"tokens of shape {tuple(ids.shape)}", remedy)
    bad = ids[(ids < 0) | (ids >= known)]
    if bad.numel():
        found = f"token {int(bad[0])} in batch {number}, and {bad.numel() - 1} more out of range"
        remedy = f"use the tokenizer of this network, whose tokens are 0 to {known - 1}"
        raise ArgumentError("data", found, remedy)


class _Watch:
    """Hooks around the blocks that note what each is handed, and see that one feeds the next."""

    def __init__(self, blocks: Sequence[Block], *, whole: bool) -> None:
        self.hidden: list[Tensor] = []
        self.calls: list[Call] = []
        self._blocks = blocks
        self._whole = whole
        self._made: Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a block is handed; end the pass at the first block unless the whole network runs."""
        at = len(self.calls)
        if at == len(self._blocks) or self._blocks[at].module is not module:
            raise self._not_in_sequence(module)
        hidden, call = _taken_apart(args, kwargs, self._blocks[at].name)
        if self._made is not None and not _same(self._made, hidden):
            raise self._not_in_sequence(module)
        if not self.hidden:
            self.hidden.append(hidden)
        self.calls.append(call)
        if not self._whole:
            raise _Caught

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what a block made."""
        self._made = _hidden_of(output)

    def _not_in_sequence(self, module: nn.Module) -> BlockListError:
        name = next(block.name for block in self._blocks if block.module is module)
        found = f"{name} is not fed the output of the block before it, once and in order"
        return BlockListError("model", found, "name blocks that follow each other by a glob: blocks=...")


def _caught(model: nn.Module, blocks: Sequence[Block], batch: Batch, number: int, *, whole: bool) -> Fed:
    """Return what the first block is fed by a batch; run all of them if `whole`."""
    watch = _Watch(blocks, whole=whole)
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.module.register_forward_pre_hook(watch.before, with_kwargs=True).remove)
            stack.callback(block.module.register_forward_hook(watch.after).remove)
        stack.enter_context(without_cache(model))
        try:
            forward(model, batch.inputs)
        except (_Caught, ArgumentError) as ended:
            if isinstance(ended, ArgumentError):
                raise
        except Exception as error:
            found = f"raised {type(error).__name__} at batch {number}: {error}"
            raise ForwardError("model, data", found, "pass inputs that the network takes") from error
    calls = watch.calls
    if not calls or (whole and len(calls) < len(blocks)):
        found = f"{blocks[len(calls)].name} did not run, though it is among the blocks"
        raise BlockListError("model", found, "name the blocks that run, in order, by a glob: blocks=...")
    if all(_equal_calls(calls[0], other) for other in calls[1:]):
        calls = calls[:1]
    return Fed(hidden=watch.hidden[0], calls=calls, positions=token_positions(batch))


def token_positions(batch: Batch) -> Tensor | None:
    """Return which tokens are no padding, (B, T) bool; None where nothing says so."""
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _taken_apart(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> tuple[Tensor, Call]:
    """Return the hidden states among the arguments of a block, and the others without caches."""
    others = {key: None if key in CACHES else value for key, value in kwargs.items()}
    if "use_cache" in others:
        others["use_cache"] = False
    if args and isinstance(args[0], Tensor):
        return args[0].detach(), (args[1:], others)
    if isinstance(kwargs.get(HIDDEN), Tensor):
        return kwargs[HIDDEN].detach(), (args, {**others, HIDDEN: None})
    found = f"{name} takes no tensor first, nor one named {HIDDEN}"
    raise BlockListError("model", found, "name blocks that take hidden states by a glob: blocks=...")


def _hidden_of(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(first, Tensor):
        found = f"a block that returns a {type(first).__name__}"
        raise BlockListError("model", found, "name blocks that return hidden states by a glob: blocks=...")
    return first.detach()


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and (left.data_ptr() == right.data_ptr() or torch.equal(left, right))


def _equal_calls(left: Any, right: Any) -> bool:
    """Return whether two blocks are handed the same besides their hidden states."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return isinstance(left, Tensor) and isinstance(right, Tensor) and _same(left, right)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_equal_calls, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal_calls(left[key], right[key]) for key in left)
    return left is right or bool(left == right)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Run a network of transformers without a cache of keys and values, where it has one by default.

    Parts such as a decoder may have a configuration of their own.
    """
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    cached = [config for config in configs if getattr(config, "use_cache", None) is True]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
