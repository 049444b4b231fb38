"""What weights are multiplied with in a forward pass, watched where torch does the multiplications."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cbs_opt.network.operations import OperationMode
from cbs_opt.network.partition import ParameterSpan, Partition

PATCH_NUMBERS = 1 << 20
"""Numbers in the patches of a convolution that are unfolded at once: 8 MiB. More are no faster."""
VECTORS = 48
"""Vectors for every dimension of a layer's input, over all samples, that a second moment is taken of.

Neighbouring positions of a sample are alike, so that more of them add little. In ResNet20 the moments of
1 000 samples are then off by 1 to 6 % in the Frobenius norm, those of 1 000 other samples by 2 to 9 %.
"""
SINGLE = (1e-12, 1e12)
"""Sizes of the largest input whose products float32 can hold."""
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, eq=False)
class _Weight:
    """A parameter, or a copy of it in another dtype, which is kept alive so that its memory stays its own."""

    span: ParameterSpan
    values: Tensor

    def holds(self, view: Tensor) -> bool:
        """Whether a tensor of the same storage begins within the parameter."""
        extent = sum((s - 1) * t for s, t in zip(self.values.shape, self.values.stride(), strict=True))
        return 0 <= view.storage_offset() - self.values.storage_offset() <= extent


class InputRecorder(OperationMode):
    """Adds up ``x x^T`` of the inputs of weights, while it is active as a context.

    `tensors` are the parameters that the network is run with, by name. A product counts if one of its factors
    is a parameter, or some of its output channels, as it is or transposed. Of inputs with a row for every
    position of `positions`, a boolean tensor or None, those count where it is True.

    Of a batch of `samples` samples out of `total`, a layer looks at so many positions that there are
    `VECTORS` times its fan-in in all, and at one a sample at least. They are drawn by `seed`; their sum is
    scaled to an unbiased estimate of that over all positions. Layers with no more positions see them all.
    `centred` if the mean of the inputs of every batch, or of every few samples of a convolution, is taken
    from them.
    """

    positions: Tensor | None = None
    samples: int = 1
    total: int = 1

    def __init__(
        self, partition: Partition, tensors: Mapping[str, Tensor], seed: int, *, centred: bool = False
    ) -> None:
        super().__init__()
        self.seed = seed
        self._centred = centred
        self._generator = torch.Generator().manual_seed(seed)
        self._spans = partition.parameters
        self._weights: dict[int, list[_Weight]] = {}
        self._moments: dict[str, dict[tuple[int, int], Tensor]] = {}
        for span in self._spans:
            self._watch(_Weight(span=span, values=tensors[span.name].detach()))
        self._products: dict[Any, Callable[..., None]] = {
            aten.mm.default: self._product,
            aten.bmm.default: self._product,
            aten.mv.default: lambda left, right: self._product(left, right.unsqueeze(1)),
            aten.addmm.default: lambda _, left, right, **__: self._product(left, right),
            aten.baddbmm.default: lambda _, left, right, **__: self._product(left, right),
            aten.addmv.default: lambda _, left, right, **__: self._product(left, right.unsqueeze(1)),
            aten.linear.default: lambda x, weight, *_: self._product(x, weight.mT),
            aten.convolution.default: self._convolution,
            aten._trilinear.default: self._bilinear,
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation of torch, and look at it."""
        product = self._products.get(func)
        if product is not None:
            # Under autocast the sums of products would be rounded to half precision, which is too coarse.
            with torch.autocast(args[0].device.type, enabled=False):
                product(*args)
        result = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default:
            weight = self._weight_of(args[0])
            if weight is not None and args[0].shape == weight.values.shape == result.shape:
                self._watch(_Weight(span=weight.span, values=result))
        return result

    def totals(self) -> dict[str, Tensor]:
        """Return the sums by parameter name, (f, f), or (groups, f, f) where channels are fed differently."""
        return {
            span.name: _by_group(span.channels, self._moments[span.name])
            for span in self._spans
            if span.name in self._moments
        }

    def _watch(self, weight: _Weight) -> None:
        self._weights.setdefault(weight.values.untyped_storage().data_ptr(), []).append(weight)

    def _weight_of(self, view: Tensor) -> _Weight | None:
        """Return the parameter of which a tensor is a view, None if it is none."""
        if view.layout is not torch.strided or view.is_nested:
            return None
        candidates = self._weights.get(view.untyped_storage().data_ptr(), ())
        return next((weight for weight in candidates if weight.holds(view)), None)

    def _add(self, span: ParameterSpan, first: int, last: int, moment: Tensor) -> None:
        moments = self._moments.setdefault(span.name, {})
        before = moments.get((first, last))
        moments[first, last] = moment if before is None else before + moment

    def _enough(self, fan_in: int) -> int:
        """Return how many vectors of the present batch are enough for a layer."""
        return self.samples * -(-VECTORS * fan_in // self.total)

    def _drawn(self, count: int, of: int, device: torch.device) -> Tensor:
        """Return `count` of `of` places, (count,) int64: one in each of as many equal parts."""
        offsets = torch.rand(count, generator=self._generator, dtype=torch.float64)
        places = (torch.arange(count) + offsets) * (of / count)
        return places.long().clamp_(max=of - 1).to(device)

    def _moment(self, rows: Tensor) -> Tensor:
        """Return ``sum x x^T`` over rows x (N, f) in float64, or an estimate of it from enough of them."""
        count, enough = len(rows), self._enough(rows.shape[1])
        if count <= enough:
            rows = self._less_mean(rows.double(), 0)
            return rows.T @ rows
        chosen = self._less_mean(_for_estimate(rows[self._drawn(enough, count, rows.device)]), 0)
        return (chosen.T @ chosen).double() * (count / enough) + _zero(rows)

    def _less_mean(self, vectors: Tensor, axis: int) -> Tensor:
        """Return vectors, of which there is one at each place of an axis, without their mean if asked to."""
        return vectors - vectors.mean(dim=axis, keepdim=True) if self._centred else vectors

    def _product(self, left: Tensor, right: Tensor) -> None:
        """Look at ``left @ right``, either of which may be the weight."""
        if not self._matrix(left, right):
            self._matrix(right.mT, left.mT)

    def _matrix(self, x: Tensor, matrix: Tensor) -> bool:
        """Add the moment of `x` (..., f) if `matrix` (..., f, k) has channels of a weight in its columns.

        Returns whether it is that of a weight.
        """
        if matrix.ndim == 3 and (matrix.shape[0] == 1 or matrix.stride(0) == 0):
            matrix = matrix[0]
        weight = self._weight_of(matrix) if matrix.ndim == 2 else None
        if weight is None or len(weight.span.shape) != 2:
            return False
        span, values = weight.span, weight.values
        table = values.T if span.by_columns else values
        columns = _strides(matrix.mT)
        distance = int(matrix.storage_offset()) - int(values.storage_offset())
        first, rest = divmod(distance, max(1, table.stride(0)))
        fits = matrix.shape[0] == span.fan_in and rest == 0 and first + matrix.shape[1] <= span.channels
        own = _strides(table[first : first + matrix.shape[1]]) if fits else None
        if own == columns and not x.is_nested:
            flat = x.reshape(-1, x.shape[-1])
            if self.positions is not None and self.positions.numel() == len(flat):
                flat = flat[self.positions.reshape(-1)]
            self._add(span, first, first + matrix.shape[1], self._moment(flat))
        return True

    def _bilinear(self, left: Tensor, matrix: Tensor, right: Tensor, *_: Any) -> None:
        weight = self._weight_of(matrix)
        if weight is None or matrix.shape != weight.span.shape:
            return
        pairs = left.double().unsqueeze(-1) * right.double().unsqueeze(-2)
        moment = self._moment(pairs.reshape(-1, weight.span.fan_in))
        self._add(weight.span, 0, weight.span.channels, moment)

    def _convolution(self, x: Tensor, kernel: Tensor, _: Any, *geometry: Any) -> None:
        weight = self._weight_of(kernel)
        stride, padding, dilation, transposed, more, groups = geometry
        if weight is None or kernel.shape != weight.span.shape or transposed != weight.span.by_columns:
            return
        sizes = kernel.shape[2:]
        padding = [*padding] * (len(sizes) // len(padding))
        if transposed:
            x = _stretched(x, stride)
            reach = [d * (k - 1) for d, k in zip(dilation, sizes, strict=True)]
            stride = [1] * len(sizes)
            sides = [(r - p, r - p + m) for r, p, m in zip(reach, padding, more, strict=True)]
        else:
            sides = [(p, p) for p in padding]
        pads = [pad for pair in reversed(sides) for pad in pair]
        windows = _Windows(kernel=sizes, dilation=dilation, stride=stride, backwards=transposed)
        shape = [n + sum(pair) for n, pair in zip(x.shape[2:], sides, strict=True)]
        positions = math.prod(windows.places(shape))
        span, fan_in = weight.span, weight.span.fan_in
        enough = -(-self._enough(fan_in) // len(x))
        total = x.new_zeros(groups, fan_in, fan_in, dtype=torch.float64)
        numbers = max(x[0].numel(), groups * fan_in * min(enough, x[0, 0].numel()))
        for part in torch.split(x, max(1, PATCH_NUMBERS // numbers)):
            if positions <= enough:
                patches = self._less_mean(windows.all(F.pad(part.double(), pads), groups), -1)
                total += patches @ patches.mT
                continue
            places = self._drawn(enough * len(part), positions * len(part), x.device)
            padded = F.pad(part.movedim(1, -1), [0, 0, *pads])
            patches = self._less_mean(_for_estimate(windows.some(padded, groups, places)), -2)
            total += _squared(patches).double() * (positions / enough) + _zero(part)
        if positions > enough:
            total = windows.by_channels(total)
        members = span.channels // groups
        for group in range(groups):
            self._add(span, group * members, (group + 1) * members, total[group])


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """What a kernel sees of padded inputs; `backwards` where it is turned round in every axis."""

    kernel: Sequence[int]
    dilation: Sequence[int]
    stride: Sequence[int]
    backwards: bool

    def places(self, shape: Sequence[int]) -> list[int]:
        """Return the number of windows along every axis of inputs of that shape."""
        axes = zip(shape, self.kernel, self.dilation, self.stride, strict=True)
        return [(n - d * (k - 1) - 1) // s + 1 for n, k, d, s in axes]

    def all(self, x: Tensor, groups: int) -> Tensor:
        """Return the patches of inputs x (B, C, ...), (groups, fan-in, B positions)."""
        patches = _patches(x, self.kernel, self.dilation, self.stride)
        if self.backwards:
            patches = patches.flip(tuple(range(2, 2 + len(self.kernel))))
        size = x.shape[1] // groups * math.prod(self.kernel)
        return patches.reshape(len(x), groups, size, -1).permute(1, 2, 0, 3).flatten(2)

    def some(self, x: Tensor, groups: int, places: Tensor) -> Tensor:
        """Return patches of inputs x (B, ..., C) at places (K,) of samples times positions.

        (groups, K, fan-in), the entries of a patch in another order than the weights': see `by_channels`.
        """
        _, *shape, channels = x.shape
        corners, offsets = places, torch.zeros(1, dtype=torch.int64, device=x.device)
        corner: list[Tensor] = []
        for count in reversed(self.places(shape)):
            # What `unravel_index` does, which would import sympy first: 1.5 s.
            corner.insert(0, corners % count)
            corners = corners // count
        axes = zip(shape, corner, self.kernel, self.dilation, self.stride, strict=True)
        for n, at, size, dilation, stride in axes:
            steps = torch.arange(size, device=x.device) * dilation
            corners = corners * n + at * stride
            offsets = (offsets.unsqueeze(1) * n + (steps.flip(0) if self.backwards else steps)).flatten()
        entries = (corners.unsqueeze(1) + offsets).flatten()
        patches = x.reshape(-1, channels).index_select(0, entries)
        patches = patches.view(len(places), len(offsets), groups, channels // groups)
        return patches.permute(2, 0, 1, 3).flatten(2)

    def by_channels(self, moments: Tensor) -> Tensor:
        """Return moments (groups, f, f) of `some` patches in the order of the weights, channels first."""
        entries = math.prod(self.kernel)
        sides = moments.view(len(moments), entries, -1, entries, moments.shape[-1] // entries)
        return sides.permute(0, 2, 1, 4, 3).reshape(moments.shape)


def _squared(rows: Tensor) -> Tensor:
    """Return ``X^T X`` of rows X (groups, K, f)."""
    # Batched products of one matrix are twice as slow.
    return (rows[0].mT @ rows[0]).unsqueeze(0) if len(rows) == 1 else rows.mT @ rows


def _for_estimate(vectors: Tensor) -> Tensor:
    """Return vectors in float32 where its products are as good as the estimate, in float64 elsewhere."""
    rounded = torch.get_float32_matmul_precision() != "highest"
    if rounded or vectors.dtype == torch.float64:
        return vectors.double()
    least, most = SINGLE
    return vectors.float() if least < float(vectors.abs().amax()) < most else vectors.double()


def _zero(x: Tensor) -> Tensor:
    """Return 0, or NaN if any entry is NaN or infinite, also where it is not drawn."""
    return 0.0 * x.sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _strides(matrix: Tensor) -> list[tuple[int, int]]:
    """Return size and stride of every axis; an axis of one entry has no stride that says anything."""
    pairs = zip(matrix.shape, matrix.stride(), strict=True)
    return [(size, 0 if size == 1 else stride) for size, stride in pairs]


def _by_group(channels: int, moments: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Return sums over ranges of channels as those of equal groups, or of all channels where there is one."""
    size = math.gcd(channels, *(edge for span in moments for edge in span))
    groups = []
    for first in range(0, channels, size):
        parts = [moment for (start, stop), moment in moments.items() if start <= first < stop]
        groups.append(sum(parts[1:], parts[0]) if parts else torch.zeros_like(next(iter(moments.values()))))
    return groups[0] if len(groups) == 1 else torch.stack(groups)


def _stretched(x: Tensor, stride: Sequence[int]) -> Tensor:
    """Return inputs (B, C, ...) with ``stride - 1`` zeros between neighbours."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], stride, strict=True)]
    wide = x.new_zeros(*x.shape[:2], *sizes)
    spread = (slice(None), slice(None), *(slice(None, None, step) for step in stride))
    wide[spread] = x
    return wide


def _patches(x: Tensor, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return the patches of padded inputs, (B, C, *kernel, positions)."""
    axes = len(kernel)
    if axes == 3:
        for axis, (k, d, s) in enumerate(zip(kernel, dilation, stride, strict=True)):
            # Every axis is moved to the end and back in turn: windows of it come last.
            x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
        return x.permute(0, 1, 5, 6, 7, 2, 3, 4).flatten(5)
    sizes = [tuple(size) for size in (kernel, dilation, stride)]
    if axes == 1:
        x, sizes = x.unsqueeze(-2), [(1, *size) for size in sizes]
    patches = F.unfold(x, sizes[0], sizes[1], 0, sizes[2])
    return patches.view(len(x), x.shape[1], *kernel, patches.shape[-1])
