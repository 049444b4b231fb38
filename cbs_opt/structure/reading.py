"""What the layers that read groups are fed, and how much the loss feels their outputs: Gram matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt.layers.calibration import counted, token_positions, without_cache
from cbs_opt.network.data import Batch, forward
from cbs_opt.network.eligible import by_columns
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.network.trial import plain_attention
from cbs_opt.structure.groups import READS, GroupSet, Structure
from formulations.errors import ArgumentError, NonFiniteError, UnsupportedProblemError

FloatArray = NDArray[np.float64]

ROWS_A_COLUMN = 32
FEWEST_ROWS = 16_384
"""Rows that second moments need: so many for each input, and so many in all."""

Hook = Callable[[str, nn.Module, Tensor, Tensor], None]


@dataclass(kw_only=True, eq=False)
class Moments:
    """Second moments of a layer: ``gram`` of its inputs, ``outputs`` of the gradients at its outputs."""

    gram: FloatArray
    outputs: FloatArray


def layers_that_read(model: nn.Module, structure: Structure, sets: Sequence[GroupSet]) -> list[str]:
    """Return the layers that read some sets, in network order.

    `model` was opened by `attention.opened`. Raises `UnsupportedProblemError`, which names it, if one is no
    linear layer or plain convolution.
    """
    names = {entry.name for part in sets for entry in part.members if entry.role == READS}
    found = []
    for path, module in model.named_modules():
        if f"{path}.weight".lstrip(".") in names:
            names.discard(f"{path}.weight".lstrip("."))
            if not _is_plain(module):
                names.add(f"{path}.weight")
            found.append(path)
    if names:
        told = f"{', '.join(sorted(names))}: read groups, and belong to no linear layer or plain convolution"
        raise UnsupportedProblemError("model", told, "name the groups that they read in ignore")
    return found


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return is_linear(module)


def is_linear(module: nn.Module) -> bool:
    """Return whether a layer is linear: `nn.Linear`, or the `Conv1D` of transformers."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Return whether a layer is linear, and outputs are the second axis of its weight."""
    return by_columns(module) and not isinstance(module, nn.modules.conv._ConvNd)


def columns_of(module: nn.Module, index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the columns of the flattened weight that input channels own, (n_groups, k)."""
    places = 1 if is_linear(module) else int(np.prod(module.kernel_size))  # type: ignore[arg-type]
    return np.asarray((index[:, :, None] * places + np.arange(places)).reshape(len(index), -1))


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer multiplies its flattened weight with, (tokens, p)."""
    if isinstance(module, nn.Conv1d):
        x, kernel = x[:, :, None], (1, *module.kernel_size)
        options = [(1, *module.dilation), (0, *_padding(module)), (1, *module.stride)]
        return F.unfold(x, kernel, *options).transpose(1, 2).flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        padded = F.pad(x, module._reversed_padding_repeated_twice)
        unfolded = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return unfolded.transpose(1, 2).flatten(0, 1)
    return x.reshape(-1, x.shape[-1])


def rows_of(module: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
    """Return `inputs_of` without tokens that are padding: `positions` (B, T) says which are none."""
    return counted(x, positions) if is_linear(module) else inputs_of(module, x)


def _padding(module: nn.Conv1d) -> tuple[int, ...]:
    if isinstance(module.padding, str):
        raise UnsupportedProblemError("model", f"padding {module.padding!r}", "give padding as a number")
    return tuple(module.padding)


def outputs_of(y: Tensor, module: nn.Module) -> Tensor:
    """Return outputs, or gradients at them, as (tokens, out)."""
    if is_linear(module):
        return y.reshape(-1, y.shape[-1])
    return y.flatten(2).transpose(1, 2).flatten(0, 1)


@contextmanager
def watching(model: nn.Module, layers: Sequence[str], told: Hook) -> Iterator[None]:
    """Tell of the inputs and outputs of layers while they run: ``told(name, module, x, y)``.

    Transformers of torch run by the modules that they are made of.
    """

    def hook(name: str) -> Any:
        return lambda module, args, output: told(name, module, args[0], output)

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    try:
        with plain_attention():
            yield
    finally:
        for entry in hooks:
            entry.remove()


def enough_rows(columns: int) -> int:
    """Return how many rows say enough of the second moments of so many inputs: what more would add is noise.

    Convolutions read a row at every place of every sample; a layer that reads one row a sample has fewer.
    """
    return max(FEWEST_ROWS, ROWS_A_COLUMN * columns)


def moments(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch], loss: Callable[[Any, Batch], Tensor]
) -> Mapping[str, Moments]:
    """Return the moments of layers over samples, at the labels of the data.

    `loss` gives the mean loss of a batch. Inputs are averaged over the places of a sample, gradients summed
    over them, both averaged over samples: their product is the Fisher matrix if the two are independent
    (Grosse and Martens 2016). Of inputs no more batches are taken than give `enough_rows`. One forward and
    one backward pass.

    Raises `ArgumentError`, which names it, if a layer did not run, and `NonFiniteError` for NaN or infinity.
    """
    gram: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    samples = sum(batch.size for batch in batches)
    scale, waiting = 1, set(layers)
    positions: Tensor | None = None
    counts, seen = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def told(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in waiting:
            rows = rows_of(module, x.detach(), positions).double()
            places = max(len(rows) // scale, 1)
            gram[name] = gram.get(name, torch.zeros(())) + rows.T @ rows / samples / places
            counts[name] += len(rows)

        def gradient(g: Tensor) -> None:
            flat = outputs_of(g.detach(), module).double() * scale
            outputs[name] = outputs.get(name, torch.zeros(())) + flat.T @ flat / samples

        y.register_hook(gradient)  # type: ignore[no-untyped-call]

    sources = _sources(model, layers)
    quiet = without_cache(model)
    with kept(model), evaluation_mode(model), torch.enable_grad(), watching(model, layers, told), quiet:
        for batch in batches:
            scale, positions = batch.size, token_positions(batch)
            value = loss(forward(model, batch.inputs), batch)
            torch.autograd.grad(value, sources, allow_unused=True)
            for name in [*waiting]:
                seen[name] += batch.size
                if name in gram and counts[name] >= enough_rows(len(gram[name])):
                    waiting.remove(name)
    missing = [name for name in layers if name not in outputs]
    if missing:
        found = f"{', '.join(missing)} did not run, or do not reach the loss"
        raise ArgumentError("model", found, "name the groups that they read in ignore")
    for name in layers:
        if not bool(gram[name].isfinite().all() and outputs[name].isfinite().all()):
            found = f"NaN or infinity in what {name} reads, or in the gradients of what it makes"
            raise NonFiniteError("model, data", found, "check the data, the loss and the weights")
    means = {name: (gram[name] * (samples / seen[name])).numpy() for name in layers}
    return {name: Moments(gram=means[name], outputs=outputs[name].numpy()) for name in layers}


def _sources(model: nn.Module, layers: Sequence[str]) -> list[nn.Parameter]:
    """Return parameters whose gradients pass by the outputs of all layers: their own, if they have them."""
    own = [parameter for name in layers for parameter in model.get_submodule(name).parameters()]
    if all(parameter.requires_grad for parameter in own):
        return own
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def affine(module: nn.Module) -> FloatArray:
    """Return weight and bias of a linear layer or convolution side by side, (out, p + 1)."""
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    rows = weight.T if _is_transposed(module) else weight.flatten(1)
    last = bias if isinstance(bias, Tensor) else weight.new_zeros(len(rows))
    return np.asarray(torch.cat([rows, last[:, None]], 1).detach().double().cpu().numpy())


class _Enough(BaseException):
    """Ends a forward pass once the layer has run that it was made for; no network catches it by mistake."""


def regression(
    model: nn.Module, work: nn.Module, name: str, batches: Sequence[Batch]
) -> tuple[FloatArray, FloatArray]:
    """Return ``E[s s^T]`` and ``E[d s^T]`` of what a layer reads now (s) and read before (d), with a one.

    No more batches are taken than give `enough_rows`.
    """
    seen: list[Tensor] = []
    calls = math.inf
    positions: Tensor | None = None

    def told(_: str, module: nn.Module, x: Tensor, __: Tensor) -> None:
        rows = rows_of(module, x, positions).double()
        seen.append(torch.cat([rows, rows.new_ones(len(rows), 1)], 1))
        if len(seen) >= calls:
            raise _Enough

    def read(network: nn.Module, batch: Batch) -> Tensor:
        nonlocal positions
        seen.clear()
        positions = token_positions(batch)
        measuring = watching(network, [name], told)
        with torch.no_grad(), kept(network), evaluation_mode(network), measuring, suppress(_Enough):
            forward(network, batch.inputs)
        if not seen:
            raise ArgumentError("model", f"{name} did not run", "name the groups that it reads in ignore")
        return torch.cat(seen)

    # A pass over two samples goes to the end, and shows how often the layer runs.
    read(model, batches[0].take(slice(2)))
    calls = len(seen)
    total: list[Any] = [0.0, 0.0]
    count = 0
    for batch in batches:
        before, now = read(model, batch), read(work, batch)
        total[0] = total[0] + now.T @ now
        total[1] = total[1] + before.T @ now
        count += len(now)
        if count >= enough_rows(now.shape[1]):
            break
    gram, cross = (entry.cpu().numpy() / count for entry in total)
    return gram, cross


def fitted(
    model: nn.Module, work: nn.Module, name: str, batches: Sequence[Batch], damping: float
) -> tuple[FloatArray, FloatArray]:
    """Return the weights and bias with which a layer of `work` gives what it gave in `model`, (out, p + 1).

    And the matrix of that least-squares problem, (p + 1, p + 1). Inputs whose weights are all zero stay out
    of it. `damping` times the mean diagonal draws the others to where they are.
    """
    gram, cross = regression(model, work, name, batches)
    return solved(model.get_submodule(name), work.get_submodule(name), gram, cross, damping)


def solved(
    before: nn.Module, layer: nn.Module, gram: FloatArray, cross: FloatArray, damping: float
) -> tuple[FloatArray, FloatArray]:
    """Return what `fitted` does, of a layer whose two matrices of `regression` are known.

    `gram` is changed.
    """
    wanted, now = affine(before), affine(layer)
    idle = ~np.append(np.abs(now[:, :-1]).any(0), True)
    level = damping * float(np.trace(gram)) / len(gram)
    gram[idle], gram[:, idle] = 0.0, 0.0
    system = gram + (level if level > 0.0 else 1e-12) * np.eye(len(gram))
    right = wanted @ cross + level * now
    right[:, idle] = 0.0
    return np.asarray(np.linalg.solve(system, right.T).T), system


def write_affine(module: nn.Module, values: FloatArray) -> None:
    """Write weight and bias (out, p + 1) into a layer, which gets a bias if it has none."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = values[:, :-1].T if _is_transposed(module) else values[:, :-1]
    with torch.no_grad():
        weight.copy_(torch.from_numpy(rows).reshape(weight.shape))
        module.bias = nn.Parameter(torch.from_numpy(values[:, -1]).to(weight))
