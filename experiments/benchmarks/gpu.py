"""What a GPU brings: gradient rows, swaps and updates a second, against the CPU and a plain torch loop.

    python -m experiments.benchmarks.gpu
    python -m experiments.benchmarks.gpu --device cpu --small

Rows are those of ResNet20 on random images. Swaps are best-improvement swaps of the selection program on
4 096 blocks of 4 096 weights that share one Gram matrix, from the smallest weights, so many in each block:

- `shared`: `experiments.benchmarks.shared_swaps`, all blocks at once, on the device;
- `shared, CPU`: the same on the CPU, on fewer blocks;
- `compiled, CPU`: `cbs_opt.select.selection_program.dense`, block by block, each with its own Gram matrix,
  whose making is timed too;
- `plain loop`: block by block on the device, with the table of all pairs at every step.

Every engine must choose the same sets on the blocks that all of them search, in single precision sets of the
same value. Updates are CBS-U of one block
for one pruned set. Without a GPU the program says so and ends with exit code 2; ``--device cpu`` runs the
same on the CPU, for which ``--small`` makes everything small.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.partition import Partition
from cbs_opt.select.selection_program.dense import swap_dense
from cbs_opt.update.cbs import cbs_update
from experiments.benchmarks.shared_swaps import swap_shared
from experiments.networks import ResNet20

NO_GPU = "there is no CUDA device here; --device cpu runs the same on the CPU"
TOLERANCE = 1e-9
"""Relative to the objective at the start: how much a swap must bring."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much work there is; the `few` blocks are those of the engines that take one at a time."""

    samples: int = 1_000
    blocks: int = 4_096
    n: int = 4_096
    swaps: int = 64
    sparsity: float = 0.5
    cpu_blocks: int = 64
    few: int = 4
    update_rows: int = 1_000
    update_n: int = 1_000_000


SMALL = Sizes(samples=8, blocks=24, n=64, swaps=8, cpu_blocks=12, few=3, update_rows=20, update_n=500)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One measurement: `count` things in `seconds`; `same` is whether the result is that of the CPU."""

    what: str
    engine: str
    device: str
    count: int
    seconds: float
    same: bool | None = None

    @property
    def rate(self) -> float:
        """Things a second."""
        return self.count / max(self.seconds, 1e-12)


@dataclass(frozen=True, kw_only=True)
class SwapInstance:
    """Blocks that share a Gram matrix: weights (B, n), their starts, and the threshold of each block."""

    gram: Tensor
    weights: Tensor
    start: Tensor
    threshold: Tensor

    def part(self, blocks: int, device: torch.device) -> SwapInstance:
        """Return the first blocks, on a device."""
        return SwapInstance(
            gram=self.gram.to(device),
            weights=self.weights[:blocks].to(device),
            start=self.start[:blocks].to(device),
            threshold=self.threshold[:blocks].to(device),
        )


def swap_instance(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> SwapInstance:
    """Correlated inputs of a layer, Gaussian weights, the smallest ones pruned."""
    generator = torch.Generator(device=device).manual_seed(0)
    inputs = torch.randn(2 * sizes.n, sizes.n, generator=generator, device=device, dtype=dtype)
    inputs += torch.randn(2 * sizes.n, 1, generator=generator, device=device, dtype=dtype)
    gram = inputs.T @ inputs / len(inputs)
    gram.diagonal().add_(0.01)
    weights = torch.randn(sizes.blocks, sizes.n, generator=generator, device=device, dtype=dtype)
    count = round(sizes.sparsity * sizes.n)
    start = torch.zeros(weights.shape, dtype=torch.bool, device=device)
    start.scatter_(1, weights.abs().topk(count, dim=1, largest=False).indices, True)
    removed = torch.where(start, weights, 0.0)
    value = 0.5 * ((removed @ gram) * removed).sum(1)
    return SwapInstance(gram=gram, weights=weights, start=start, threshold=TOLERANCE * value)


def shared(instance: SwapInstance, swaps: int) -> tuple[Tensor, int]:
    """All blocks at once."""
    pruned = instance.start.clone()
    found = swap_shared(
        instance.gram, instance.weights, pruned, tolerance=instance.threshold, max_swaps=swaps
    )
    return pruned, int(found.swaps.sum())


def compiled(instance: SwapInstance, swaps: int) -> tuple[Tensor, int]:
    """Block by block by the compiled engine, which takes a Gram matrix a block."""
    pruned, made = instance.start.clone(), 0
    for weights, own, threshold in zip(instance.weights, pruned, instance.threshold, strict=True):
        gram = (weights[:, None] * instance.gram * weights).double()[None]
        product = gram @ own.double()
        found = swap_dense(
            gram,
            product,
            torch.zeros_like(product),
            own[None],
            threshold.double()[None],
            torch.tensor([swaps]),
        )
        made += int(found.swaps)
    return pruned, made


def plain_loop(instance: SwapInstance, swaps: int) -> tuple[Tensor, int]:
    """Block by block, a table of all pairs at every step: what one writes first."""
    pruned, made = instance.start.clone(), 0
    for weights, own, threshold in zip(instance.weights, pruned, instance.threshold, strict=True):
        gram = weights[:, None] * instance.gram * weights
        product = gram @ own.to(gram)
        for _ in range(swaps):
            out, into = own.nonzero().squeeze(1), (~own).nonzero().squeeze(1)
            half = 0.5 * gram.diagonal()
            change = (half - product)[out][:, None] + (half + product)[into] - gram[out][:, into]
            best, flat = change.flatten().min(dim=0)
            if not bool(best < -threshold):
                break
            i, j = out[flat // len(into)], into[flat % len(into)]
            product += gram[j] - gram[i]
            own[i], own[j] = False, True
            made += 1
    return pruned, made


def timed(run: Callable[[], tuple[Tensor, int]], device: torch.device) -> tuple[Tensor, int, float]:
    """Return what `run` gives, and the seconds of its second call: the first one compiles and allocates."""
    run()
    _wait(device)
    began = time.perf_counter()
    found, count = run()
    _wait(device)
    return found.cpu(), count, time.perf_counter() - began


def swap_lines(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[Line]:
    """Return swaps a second of every engine."""
    whole = swap_instance(sizes, device, dtype)
    cpu = torch.device("cpu")
    runs = (
        ("shared", shared, device, sizes.blocks),
        ("shared, CPU", shared, cpu, sizes.cpu_blocks),
        ("compiled, CPU", compiled, cpu, sizes.few),
        ("plain loop", plain_loop, device, sizes.few),
    )
    found = []
    for name, engine, place, blocks in runs:
        instance = whole.part(blocks, place)
        sets, count, seconds = timed(lambda e=engine, i=instance: e(i, sizes.swaps), place)  # type: ignore[misc]
        found.append((name, place, sets[: sizes.few], count, seconds))
    reference = next(sets for name, _, sets, _, _ in found if name == "compiled, CPU")
    return [
        Line(
            what=f"swaps, {str(dtype).removeprefix('torch.')}",
            engine=name,
            device=place.type,
            count=count,
            seconds=seconds,
            same=equally_good(sets, reference, whole),
        )
        for name, place, sets, count, seconds in found
    ]


def equally_good(sets: Tensor, reference: Tensor, instance: SwapInstance) -> bool:
    """Whether sets are those of the reference, or in single precision have their value to 1e-5."""
    if sets.equal(reference) or instance.gram.dtype == torch.float64:
        return bool(sets.equal(reference))
    gram, weights = instance.gram.cpu().double(), instance.weights[: len(sets)].cpu().double()
    found, wanted = (
        (((weights * kept) @ gram) * (weights * kept)).sum(1) for kept in (sets.double(), reference.double())
    )
    return bool(torch.allclose(found, wanted, rtol=1e-5))


def row_lines(sizes: Sizes, device: torch.device) -> list[Line]:
    """Gradient rows a second of ResNet20, on the device and on the CPU."""
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randn(sizes.samples, 3, 32, 32, generator=generator),
        torch.randint(10, (sizes.samples,), generator=generator),
    )
    torch.manual_seed(0)
    model = ResNet20().eval()
    lines, reference = [], None
    for place in dict.fromkeys((torch.device("cpu"), device)):
        model.to(place)
        parts = Partition.from_model(model, blocks="global")

        def run(parts: Partition = parts) -> tuple[Tensor, int]:
            loss = nn.functional.cross_entropy
            found = gradient_rows(
                model, data, loss, parts, curvature=EmpiricalFisher(samples=sizes.samples), progress=False
            )
            return found.rows, len(found.rows)

        rows, count, seconds = timed(run, place)
        reference = rows if reference is None else reference
        same = bool(torch.allclose(rows, reference, rtol=1e-3, atol=1e-5 * float(reference.abs().max())))
        lines.append(
            Line(
                what="gradient rows, ResNet20",
                engine="torch.func",
                device=place.type,
                count=count,
                seconds=seconds,
                same=same,
            )
        )
    return lines


def update_lines(sizes: Sizes, device: torch.device) -> list[Line]:
    """CBS-U of one large block."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sizes.update_rows, sizes.update_n, generator=generator) / sizes.update_rows**0.5
    weights = torch.randn(sizes.update_n, generator=generator)
    lines, reference = [], None
    for place in dict.fromkeys((torch.device("cpu"), device)):
        block = FisherBlock(
            name="one", weights=weights.to(place), hessian=RowsHessian(rows.to(place)), damping=0.1
        )
        keep = block.weights.abs() >= block.weights.abs().median()
        found, count, seconds = timed(lambda b=block, k=keep: (cbs_update(b, k), 1), place)  # type: ignore[misc]
        reference = found if reference is None else reference
        lines.append(
            Line(
                what=f"updates, {sizes.update_rows} x {sizes.update_n}",
                engine="CBS-U",
                device=place.type,
                count=count,
                seconds=seconds,
                same=bool(torch.allclose(found, reference, rtol=1e-4, atol=1e-6)),
            )
        )
    return lines


def measured(sizes: Sizes, device: torch.device) -> list[Line]:
    """Everything on one device, against the CPU."""
    lines = [*row_lines(sizes, device)]
    for dtype in (torch.float64, torch.float32):
        lines += swap_lines(sizes, device, dtype)
    return [*lines, *update_lines(sizes, device)]


def table(lines: Sequence[Line]) -> str:
    """Return the measurements as text."""
    rows = [
        f"{'what':28}{'engine':16}{'device':8}{'count':>10}{'seconds':>10}{'a second':>12}  as on the CPU"
    ]
    rows += [
        f"{line.what:28}{line.engine:16}{line.device:8}{line.count:10d}{line.seconds:10.3f}{line.rate:12.1f}"
        f"  {'yes' if line.same else 'NO'}"
        for line in lines
    ]
    return "\n".join(rows)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print a table; 1 if a result differs, 2 without the device."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds on a CPU")
    parser.add_argument("--out", type=Path, help="JSON file for the measurements")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write(f"{NO_GPU}\n")
        return 2
    device = torch.device(given.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = measured(SMALL if given.small else Sizes(), device)
    if given.out is not None:
        found = [{**asdict(line), "rate": line.rate} for line in lines]
        given.out.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "lines": found}, indent=1)
        )
    sys.stdout.write(f"{name}, torch {torch.__version__}\n{table(lines)}\n")
    return 0 if all(line.same for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
