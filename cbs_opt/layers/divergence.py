"""The loss of the network itself: how far its predictions are from those of the dense network.

A layer program knows nothing of what comes after its layer. Here the kept weights of all blocks move
together, by gradients, on the Kullback-Leibler divergence from the dense network's predictions to the pruned
one's, over the calibration tokens and without any label. Steps are those of AdamW with masks: that is what
anyone can do, and the gain over it has to come from where it begins. Samples that are set aside decide what
is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from cbs_opt.layers.calibration import by_tokens, counted, token_positions
from cbs_opt.network.data import Batch, device_of, forward, structure
from cbs_opt.network.masks import Masks, masked
from cbs_opt.network.objective import logits_of
from cbs_opt.network.trial import lent, write_layers
from cbs_opt.select.layer_program.support import Sparsity
from cbs_opt.system.checks import RUN_SEEDS, check_fields, finite_number, seed_number, whole_number
from cbs_opt.system.progress import Advance
from formulations.errors import ArgumentError
from formulations.support import NofM, n_of_m

Weights = Mapping[str, Tensor]
"""Tensors in the shapes of parameters, by their names."""
WARM_UP = 0.125
"""Share of the steps over which the step length grows to its full size; then it falls along a cosine."""
ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How kept weights move on the divergence from the dense network's predictions.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    passes : int, default 2
        Over the calibration samples that are not set aside, in all stages together. They are differentiated
        so often.
    rate : float, default 2e-4
        Largest step length of AdamW.
    stages : int, default 1
        Prunings of which each begins at the weights that the passes after the one before have moved, with
        fresh Gram matrices. Sparsity grows from `first` to the target in equal steps; n:m keeps more of m.
    first : float, default 0.3
        Sparsity of the first of several stages.
    held : float, default 0.125
        Share of the samples, the last ones and at least one, that are not differentiated: they decide
        after every pass whether its weights are taken.
    step_tokens : int, default 512
        Tokens of a step, or one sample of more.
    seed : int, default 0
        Of the order of the samples.
    """

    passes: int = 2
    rate: float = 2e-4
    stages: int = 1
    first: float = 0.3
    held: float = 0.125
    step_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, "divergence.", whole_number, "passes", "stages", "step_tokens")
        check_fields(self, "divergence.", seed_number, "seed", below=RUN_SEEDS)
        check_fields(self, "divergence.", finite_number, "rate", above=True)
        check_fields(self, "divergence.", finite_number, "first", "held", most=0.9)
        if self.passes < self.stages:
            found = f"{self.passes} passes for {self.stages} stages"
            raise ArgumentError("divergence.passes", found, "make at least one pass a stage")


@dataclass(frozen=True, kw_only=True)
class DivergenceRecord:
    """What moving the kept weights came to.

    Parameters
    ----------
    stage : int
    before, after : float
        Divergence a token (natural logarithm) on the samples that are set aside, of the weights that the
        layer programs left and of those that were taken.
    passes : tuple of float
        The same after each pass.
    tokens : int
        Tokens that were differentiated, each counted as often as it was.
    held : int
        Tokens that were set aside.
    """

    stage: int
    before: float
    after: float
    passes: tuple[float, ...]
    tokens: int
    held: int

    def __str__(self) -> str:
        return (
            f"stage {self.stage}: divergence {self.before:.4f} to {self.after:.4f} a token on {self.held} "
            f"tokens set aside, {self.tokens} tokens differentiated"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The network, and what makes the predictions that are aimed at.

    `dense` are the weights of its layers before pruning, or the dense network where it is another one.
    `moving` and `held` are samples, cut into steps.
    """

    network: nn.Module
    dense: Weights | nn.Module
    moving: tuple[Batch, ...]
    held: tuple[Batch, ...]

    def divergence(self, weights: Weights, batch: Batch) -> tuple[Tensor, int]:
        """Return the sum of the divergences of all tokens of a batch at other weights, and their number."""
        with torch.no_grad():
            wanted = self._wanted(batch).log_softmax(-1)
        found = self._scores(weights, batch).log_softmax(-1)
        return kl_div(found, wanted, reduction="sum", log_target=True), len(found)

    def held_out(self, weights: Weights) -> tuple[float, int]:
        """Return the divergence a token on the samples that are set aside, and how many tokens these have."""
        with torch.no_grad():
            sums = [self.divergence(weights, batch) for batch in self.held]
        tokens = sum(count for _, count in sums)
        return sum(float(total) for total, _ in sums) / max(1, tokens), tokens

    def _wanted(self, batch: Batch) -> Tensor:
        """Return the scores that the dense network gives."""
        if not isinstance(self.dense, nn.Module):
            return self._scores(self.dense, batch)
        return token_scores(forward(self.dense, batch.inputs), token_positions(batch), "recipe.divergence")

    def _scores(self, weights: Weights, batch: Batch) -> Tensor:
        """Return the scores of the tokens that count, (tokens, words) float32 or float64."""
        output = lent(self.network, dict(weights), lambda: forward(self.network, batch.inputs))
        return token_scores(output, token_positions(batch), "recipe.divergence")


def token_scores(output: Any, positions: Tensor | None, argument: str) -> Tensor:
    """Return the scores of the tokens that count, (tokens, words) float32 or float64.

    `positions` says which do, all without. `argument` is what needs them, for messages.
    """
    scores = logits_of(output)
    if scores is None or scores.ndim < 2 or not scores.is_floating_point():
        found = f"a network that returns {structure(output)}, which are no scores of classes"
        remedy = 'pass the network with its head, or recipe="fast", which needs no predictions'
        raise ArgumentError(argument, found, remedy)
    scores = counted(scores, positions)
    return scores if scores.dtype == torch.float64 else scores.float()


def held_samples(samples: int, options: Divergence) -> int:
    """Return how many of the samples, the last ones, are set aside."""
    return max(1, round(options.held * samples))


def predictions(
    network: nn.Module, dense: Weights | nn.Module, batches: Sequence[Batch], options: Divergence
) -> Predictions:
    """Return what a pruned network is compared with, its samples parted in those that move and those held.

    Raises `ArgumentError` if there is one sample only.
    """
    samples = sum(batch.size for batch in batches)
    held = held_samples(samples, options)
    if held >= samples:
        found = f"{samples} sample, of which {held} is to be set aside"
        raise ArgumentError("data", found, 'pass at least two samples, or recipe="fast"')
    moving: list[Batch] = []
    last: list[Batch] = []
    left = samples - held
    for batch in (batch.to(device_of(network)) for batch in batches):
        first = min(left, batch.size)
        left -= first
        for steps, part in ((moving, slice(first)), (last, slice(first, None))):
            cut = batch.take(part)
            if cut.size:
                steps += by_tokens(cut, options.step_tokens)
    return Predictions(network=network, dense=dense, moving=tuple(moving), held=tuple(last))


def move(
    aim: Predictions,
    parameters: Mapping[str, nn.Parameter],
    masks: Masks,
    options: Divergence,
    stage: int,
    advance: Advance,
) -> DivergenceRecord:
    """Move kept weights in place by passes of one stage; they are as they were if none lowers the divergence.

    Without `masks` all weights of `parameters` move.
    The weights after the pass of least divergence on the samples set aside are written. Beside the network
    there are five tensors of the size of each weight that moves. One forward pass of the dense weights and
    one forward and backward pass a step.
    """
    passes = stage_passes(options, stage)
    start = {name: parameter.detach() for name, parameter in parameters.items()}
    # Steps are small beside what half precision resolves.
    own = {
        name: (tensor if tensor.dtype == torch.float64 else tensor.float()).clone().requires_grad_()
        for name, tensor in start.items()
    }
    before, held = aim.held_out(start)
    best, after, found = start, before, []
    optimizer = torch.optim.AdamW(list(own.items()), lr=options.rate, weight_decay=0.0)
    if masks:
        masked(optimizer, masks)
    steps, done, tokens = passes * len(aim.moving), 0, 0
    for number in range(passes):
        for batch in _shuffled(aim.moving, options.seed + 1_000 * stage + number):
            for group in optimizer.param_groups:
                group["lr"] = options.rate * _share(done, steps)
            with torch.enable_grad():
                total, count = aim.divergence(_cast(own, start), batch)
                # Not backward(), which would leave gradients in the rest of the network.
                gradients = torch.autograd.grad(total / max(1, count), [*own.values()])
            for tensor, gradient in zip(own.values(), gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
            done, tokens = done + 1, tokens + count
            advance(1)
        now = _cast({name: tensor.detach() for name, tensor in own.items()}, start)
        found.append(aim.held_out(now)[0])
        if found[-1] < after:
            after, best = found[-1], {name: tensor.clone() for name, tensor in now.items()}
    if best is not start:
        write_layers({name: (parameters[name], tensor) for name, tensor in best.items()})
    return DivergenceRecord(
        stage=stage, before=before, after=after, passes=tuple(found), tokens=tokens, held=held
    )


def stage_passes(options: Divergence, stage: int) -> int:
    """Return how many of all passes a stage makes: as many as the others, the last ones one more."""
    return (options.passes + stage) // options.stages


def stage_sparsity(sparsity: Sparsity, options: Divergence, stage: int) -> Sparsity:
    """Return the sparsity of a stage, that of the last one being `sparsity`."""
    last = options.stages - 1
    pattern = n_of_m(sparsity) if isinstance(sparsity, str) else None
    target = 1.0 - pattern.n / pattern.m if pattern is not None else float(sparsity)
    if stage >= last or options.first >= target:
        return sparsity
    share = options.first + (target - options.first) * stage / last
    if pattern is None:
        return share
    return str(NofM(max(pattern.n, math.ceil((1.0 - share) * pattern.m - ROUNDING)), pattern.m))


def _share(step: int, steps: int) -> float:
    """Return the length of a step as a share of the largest one."""
    return min(1.0, (step + 1) / max(1.0, WARM_UP * steps)) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed), device="cpu")
    for index in order.tolist():
        yield batches[index]


def _cast(weights: Weights, like: Weights) -> dict[str, Tensor]:
    """Return tensors in the precision of others."""
    return {name: tensor.to(like[name].dtype) for name, tensor in weights.items()}
