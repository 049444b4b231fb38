"""Which layers of a block feed which: they are pruned in that order, each fed by those before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.layers.blocks import Block, Layer, handed


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """Layers of a block of which none is fed by another; `once` if each of them runs once in the block."""

    block: Block
    once: bool


def levels(block: Block, run: Callable[[], object]) -> list[Level]:
    """Return the levels of a block's layers, each fed by those before it.

    `run` runs the block on a few tokens. Gradients of what each layer is fed, in what others make, tell
    which depend on which: one forward pass, and one backward pass for every layer. A dependence that has no
    gradient is not seen; where going back fails, a layer counts as fed by all that ran before it, and where
    the block cannot run with gradients each is a level. Layers that these tokens do not reach are in the last
    level.
    """
    if len(block.layers) < 2:
        return [Level(block=block, once=False)]
    fed: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    calls = Counter[str]()
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for layer in block.layers:
            before = layer.module.register_forward_pre_hook(_fed(layer.name, fed, calls), with_kwargs=True)
            after = layer.module.register_forward_hook(_made(layer.name, made))
            stack.callback(before.remove)
            stack.callback(after.remove)
        try:
            run()
        except RuntimeError:
            # What runs without gradients need not run with them.
            return [Level(block=replace(block, layers=(layer,)), once=False) for layer in block.layers]
        depth = _depths(fed, made)
    last = max(depth.values(), default=0)
    found: list[list[Layer]] = [[] for _ in range(last + 1)]
    for layer in block.layers:
        found[depth.get(layer.name, last)].append(layer)
    return [
        Level(
            block=replace(block, layers=tuple(layers)), once=all(calls[layer.name] == 1 for layer in layers)
        )
        for layers in found
    ]


def _depths(fed: dict[str, Tensor], made: dict[str, Tensor]) -> dict[str, int]:
    """Return the level of each layer that was reached, in the order in which they ran."""
    depth: dict[str, int] = {}
    for name, x in fed.items():
        used = _used(x, [made[other] for other in depth])
        feeding = [other for other, use in zip(depth, used, strict=True) if use]
        depth[name] = max((depth[other] + 1 for other in feeding), default=0)
    return depth


def _used(x: Tensor, made: Sequence[Tensor]) -> list[bool]:
    """Return of which tensors another one was made."""
    if not x.requires_grad or not made:
        return [False] * len(made)
    try:
        gradients = torch.autograd.grad(x.sum(), made, allow_unused=True, retain_graph=True)
    except RuntimeError:
        return [True] * len(made)
    return [gradient is not None for gradient in gradients]


def _fed(
    name: str, fed: dict[str, Tensor], calls: Counter[str]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[name] += 1
        fed.setdefault(name, handed(args, kwargs))

    return look


def _made(name: str, made: dict[str, Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # What follows may change its input in place. Weights may be frozen, hidden states carry no gradient.
        output = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
        made.setdefault(name, output)
        return output.clone()

    return look
