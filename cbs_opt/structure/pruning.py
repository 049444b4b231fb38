"""`prune_groups`: groups chosen by the quadratic program of their readers, taken out, the rest refitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate, chain, product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.errors import ForwardError, UnmatchedPatternError
from cbs_opt.layers.calibration import by_tokens
from cbs_opt.layers.divergence import Divergence, DivergenceRecord, held_samples
from cbs_opt.network.data import (
    Batch,
    Data,
    Inputs,
    LossFunction,
    cut,
    device_of,
    forward,
    iterate,
    map_tensors,
    tensors_of,
)
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.objective import Objective
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.solving import solve
from cbs_opt.structure import leaps
from cbs_opt.structure.attention import opened
from cbs_opt.structure.chain import Chain
from cbs_opt.structure.groups import READS, BoolArray, GroupSet, Structure, groups
from cbs_opt.structure.latency import LatencyTable, offered_widths, within_sets
from cbs_opt.structure.reading import (
    Moments,
    affine,
    columns_of,
    fitted,
    layers_that_read,
    moments,
    solved,
    watching,
    write_affine,
)
from cbs_opt.structure.refinement import (
    FEWEST_ROWS,
    Refined,
    follow,
    judged_loss,
    refine,
    rows_that_fit,
)
from cbs_opt.structure.removal import Shrinkage, shrink
from cbs_opt.structure.selection import FloatArray, GroupProgram, Reader
from cbs_opt.structure.tracing import run
from cbs_opt.structure.widths import Cost, Widths, choose_widths
from cbs_opt.system.checks import (
    RUN_SEEDS,
    check_fields,
    finite_number,
    names,
    one_of,
    seed_number,
    whole_number,
)
from formulations.errors import ArgumentError, NotPositiveDefiniteError

METRICS = ("loss", "outputs")
"""What a change of outputs may cost by; see `GroupRecipe`."""
JUDGED = 2_048
"""Samples on which the networks of two metrics are compared."""
CHOICES = 16
"""Widths of a set that a budget of operations chooses among."""
ENUMERATED = 1000
"""Sets of groups up to which an exact search tries all."""
BATCH = 128
"""Samples that run at a time."""
BATCH_TOKENS = 1024
"""Tokens that run at a time, or one sample of more."""
MOST_TOKENS = 65_536
"""Tokens that choices, fits and steps see at most."""
MOMENT_TOKENS = 8_192
"""Tokens whose gradients say what the outputs of layers matter."""
TRACED_TOKENS = 23
"""Tokens of a sequence that is traced; no size that networks have."""


@dataclass(frozen=True, kw_only=True)
class GroupRecipe:
    """How groups are chosen, and what the others do.

    Parameters
    ----------
    metric : {"loss", "outputs"}, optional
        What a change of a layer's outputs costs: by the second moments of the gradients of the loss, or all
        the same, as in layer-wise reconstruction. By default both are tried, widths by the first, and the
        network of the lower loss on samples set aside stays; with language models, and where no samples are
        left to set aside, the first alone.
    swaps : int
        Rounds of exchanges after the greedy choice.
    samples : int
        That choices and fits see; a layer that reads many places of a sample, as convolutions do, reads no
        more of them than its second moments need: 32 rows an input, and 16 384 rows in all.
    damping : float
        Share of the mean diagonal that is added to second moments, of inputs and of gradients.
    exact_seconds : float
        Where above 0, an exact search has so long for every set, and reports a bound: leaps and bounds for up
        to 64 neurons, branch and bound for sets whose readers have a thousand weights or so. Where there are
        no more than a thousand choices, as of a few heads, all are tried.
    steps : int
        Newton steps of all weights that are left, at most, each taken only if it gains on samples set aside.
    step_samples : int
        That those steps see, one in eight of them set aside.
    spread : {"set", "network"}, optional
        Whether every set keeps its share of groups, or sets whose groups are alike (the neurons of all
        blocks, the heads of all blocks) keep it together: the model's losses then say, by an exact knapsack,
        how many stay in each. With `keep` alone; by default "network" for language models, which have many
        blocks alike, and "set" for others.
    divergence : Divergence
        How the weights that are left of a language model move: by passes of AdamW on the divergence from
        the dense network's predictions, in place of Newton steps, whose rows would be too long. The samples
        that judge them are in no choice or fit. ``steps=0`` leaves the passes out as well.
    """

    metric: str | None = None
    swaps: int = 3
    samples: int = 1024
    damping: float = 0.01
    exact_seconds: float = 0.0
    steps: int = 3
    step_samples: int = 4096
    spread: str | None = None
    divergence: Divergence = field(default_factory=Divergence)

    def __post_init__(self) -> None:
        if self.metric is not None:
            one_of("recipe.metric", self.metric, METRICS)
        if self.spread is not None:
            one_of("recipe.spread", self.spread, ("set", "network"))
        check_fields(self, "recipe.", whole_number, "swaps", "steps", least=0)
        check_fields(self, "recipe.", whole_number, "samples", "step_samples", least=2)
        check_fields(self, "recipe.", finite_number, "exact_seconds")
        check_fields(self, "recipe.", finite_number, "damping", above=True)
        if not isinstance(self.divergence, Divergence):
            found = f"a {type(self.divergence).__name__}"
            raise ArgumentError("recipe.divergence", found, "pass a Divergence")


@dataclass(frozen=True, kw_only=True)
class SetChoice:
    """What was chosen of one set: groups kept and there, the model's loss, and a lower bound if proved."""

    n_keep: int
    n_groups: int
    loss: float
    bound: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupReport:
    """What `prune_groups` did.

    Attributes
    ----------
    choices : mapping of str to SetChoice
        By the names of `groups`. Losses are those of the quadratic model of each set by itself.
    metric : str
        By which groups were chosen and layers fitted, see `GroupRecipe`.
    judged : mapping of str to float
        Loss on samples set aside by metric, before weights move further, where both were tried.
    shrinkage : Shrinkage
    widths : Widths or None
        The knapsack's answer, where a budget of operations was asked for.
    refined : Refined or None
        What the Newton steps of the weights that are left did.
    moved : DivergenceRecord or None
        What the passes on the divergence from the dense network did.
    notes : tuple of str
        Sets that were left whole because a layer of theirs is ignored, and why weights did not move.
    """

    choices: Mapping[str, SetChoice]
    metric: str
    shrinkage: Shrinkage
    judged: Mapping[str, float] = field(default_factory=dict)
    widths: Widths | None = None
    refined: Refined | None = None
    moved: DivergenceRecord | None = None
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """Return what was taken out, with the model's losses and their bounds."""
        lines = []
        for name, entry in self.choices.items():
            bound = "" if entry.bound is None else f", bound {entry.bound:.6g}"
            lines.append(f"{name}: {entry.n_keep} of {entry.n_groups} kept, loss {entry.loss:.6g}{bound}")
        if self.judged:
            found = ", ".join(f"{value:.4g} by {name}" for name, value in self.judged.items())
            lines.append(f"loss on samples set aside {found}: {self.metric} taken")
        lines += self.shrinkage.summary().splitlines()[-2:]
        lines += [str(entry) for entry in (self.refined, self.moved) if entry is not None]
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.summary()


@dataclass(frozen=True, kw_only=True)
class _Budget:
    """A share of the operations, or milliseconds by a table."""

    limit: float
    latency: LatencyTable | None

    @classmethod
    def of(cls, keep: Any, flops: Any, milliseconds: Any, latency: Any) -> _Budget | None:
        """Return the budget that was asked for; None where a share of every set is."""
        asked = {"keep": keep, "flops": flops, "milliseconds": milliseconds}
        given = [name for name, entry in asked.items() if entry is not None]
        if len(given) != 1:
            found = " and ".join(given) + " given" if given else "none given"
            raise ArgumentError("keep, flops, milliseconds", found, "pass exactly one of them")
        if (milliseconds is None) != (latency is None):
            found = "without latency" if latency is None else "given without milliseconds"
            argument = "milliseconds" if latency is None else "latency"
            raise ArgumentError(argument, found, "pass milliseconds and the table of measure_latency")
        if latency is not None and not isinstance(latency, LatencyTable):
            found = f"a {type(latency).__name__}"
            raise ArgumentError("latency", found, "pass the table of measure_latency")
        if flops is not None:
            return cls(limit=finite_number("flops", flops, most=1.0, above=True), latency=None)
        if milliseconds is not None:
            limit = finite_number("milliseconds", milliseconds, above=True)
            return cls(limit=limit, latency=latency)
        return None


def prune_groups(
    model: nn.Module,
    data: Data,
    *,
    keep: float | Mapping[str, float] | None = None,
    flops: float | None = None,
    milliseconds: float | None = None,
    latency: LatencyTable | None = None,
    ignore: str | Sequence[str] = (),
    recipe: GroupRecipe | None = None,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
) -> tuple[nn.Module, GroupReport]:
    """Return a smaller network without the channels, neurons or heads that the loss misses least.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode; not changed.
    data : DataLoader, iterable of (x, y), or pair of tensors (X, y)
        Training data, as for `prune`; token ids (N, T) alone for a language model.
    keep : float or mapping of str to float, optional
        Share of the groups of every set to keep, ``max(1, round(keep * n))`` of them, or with
        `GroupRecipe.spread` of alike sets together; a mapping has it by glob over the names of `groups`, the
        first that matches, and the others are left whole.
    flops : float, optional
        Share of the operations to keep; widths are then chosen by a knapsack over the models' losses, solved
        exactly.
    milliseconds : float, optional
        Time of a pass by the table `latency`, met in the same way. Exactly one of `keep`, `flops` and this.
    latency : LatencyTable, optional
        Of `measure_latency`, on this machine; with `milliseconds` alone.
    ignore : str or sequence of str
        Globs of layers. A set in which one of them has a part is left whole, and a note says so.
    recipe : GroupRecipe, optional
    loss_fn : callable, optional
        As for `prune`.
    seed : int, default 0

    Returns
    -------
    tuple of nn.Module and GroupReport

    Raises
    ------
    ArgumentError
        If not exactly one of `keep`, `flops` and `milliseconds` is given, nothing can be taken out, the
        budget is below the smallest network, or the table is of another machine or network.
    UnmatchedPatternError
        If a glob matches nothing.
    UnsupportedProblemError
        If a set is read by a layer that is neither linear nor a plain convolution, which is named.
    StructureError, ForwardError
        As `shrink`.

    Examples
    --------
    >>> small, report = prune_groups(model, (x, y), flops=0.5)  # doctest: +SKIP
    """
    budget = _Budget.of(keep, flops, milliseconds, latency)
    recipe = GroupRecipe() if recipe is None else recipe
    if not isinstance(recipe, GroupRecipe):
        raise ArgumentError("recipe", f"a {type(recipe).__name__}", "pass a GroupRecipe")
    seed_number("seed", seed, below=RUN_SEEDS)
    model = unwrapped(model)
    objective = Objective.of(loss_fn)
    seen = recipe.samples + (JUDGED if recipe.metric is None else 0)
    most = max(seen, recipe.step_samples if recipe.steps else 0)
    source = iterate(data, batch_size=BATCH, max_samples=most, seed=seed, device=device_of(model))
    every = _at_a_time(source)
    with kept(model), evaluation_mode(model):
        objective.settle(model, partial(forward, model), every[0])
    every = [objective.prepared(batch) for batch in every]
    batches = _first(every, min(recipe.samples, _unseen(every, recipe)))
    example = batches[0].take(slice(2)).inputs
    if budget is None:
        example = _short(model, batches[0].take(slice(2)))
    structure = groups(model, example)
    sets, notes = _chosen_sets(structure, ignore)
    shares = {part.name: 1.0 for part in sets} if keep is None else _shares(sets, keep)
    sets = [part for part in sets if part.name in shares]
    if not sets:
        raise ArgumentError("model", "no groups that may be taken out", "print cbs.groups for the reasons")
    dense = opened(model)
    if budget is None and recipe.spread is None:
        recipe = replace(recipe, spread="network" if _is_tokens(batches[0]) else "set")
    outputs, curves = _models(dense, structure, sets, batches, objective, recipe, budget)
    widths = None
    if budget is not None:
        counts, widths = _widths(structure, sets, curves, budget)
    elif recipe.spread == "network":
        counts = _spread_counts(sets, shares, curves)
    else:
        counts = _counts(sets, shares)
    free = fitted_layers(dense, structure, ignore)
    judges = [] if recipe.metric or _is_tokens(batches[0]) else _first(every[len(batches) :], JUDGED)

    def made(metric: str) -> tuple[nn.Module, GroupReport]:
        matter = outputs if metric == "loss" else {}
        sweep = _Sweep(dense=dense, work=deepcopy(dense), outputs=matter, counts=counts, recipe=recipe)
        sweep.choose(sets, free, batches)
        found, shrinkage = shrink(_closed(model, sweep.work, free), example, keep=sweep.masks)
        choices = {part.name: sweep.choices[part.name] for part in sets}
        return found, GroupReport(choices=choices, metric=metric, shrinkage=shrinkage)

    tried = METRICS if judges else (recipe.metric or "loss",)
    small, report = _best(tried, made, lambda found: judged_loss(found, batches, judges, objective))
    report = replace(report, widths=widths, notes=tuple(notes))
    if not recipe.steps:
        return small, report
    every = _first(every, max(recipe.samples, recipe.step_samples))
    moved = _stepped(model, small, every, objective, recipe, names("ignore", ignore), seed)
    return small, replace(report, **moved | {"notes": (*report.notes, *moved.get("notes", ()))})


def _best(
    metrics: Sequence[str],
    made: Callable[[str], tuple[nn.Module, GroupReport]],
    loss: Callable[[nn.Module], float],
) -> tuple[nn.Module, GroupReport]:
    """Return what is made by the metric of the lowest loss, which is taken where there are several."""
    if len(metrics) == 1:
        return made(metrics[0])
    found = {metric: made(metric) for metric in metrics}
    judged = {metric: loss(small) for metric, (small, _) in found.items()}
    small, report = found[min(judged, key=judged.__getitem__)]
    return small, replace(report, judged=judged)


def _unseen(batches: Sequence[Batch], recipe: GroupRecipe) -> int:
    """Return how many of the samples choices and fits may see: not those that judge passes on the divergence.

    On what a layer was fitted to, every step away from the fit looks like a loss.
    """
    samples = sum(batch.size for batch in batches)
    if not recipe.steps or not _is_tokens(batches[0]) or samples < 2:
        return samples
    return samples - held_samples(samples, recipe.divergence)


def _models(
    dense: nn.Module,
    structure: Structure,
    sets: Sequence[GroupSet],
    batches: Sequence[Batch],
    objective: Objective,
    recipe: GroupRecipe,
    budget: _Budget | None,
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Return what the outputs of layers matter, by layer, and where widths are chosen the losses of sets."""
    layers = layers_that_read(dense, structure, sets)
    chosen = budget is not None or recipe.spread == "network"
    outputs: dict[str, FloatArray] = {}
    if recipe.metric == "outputs" and not chosen:
        return outputs, {}
    seen = _within(batches, MOMENT_TOKENS)
    measured = moments(dense, layers, seen, lambda output, batch: objective.loss(output, batch))
    if recipe.metric != "outputs":
        # Gradients of a softmax add up to zero: without damping their moments are singular.
        outputs = {name: _damped(entry.outputs, recipe.damping) for name, entry in measured.items()}
    if not chosen:
        return outputs, {}
    return outputs, {part.name: _curve(dense, part, measured, outputs, recipe) for part in sets}


def _stepped(
    model: nn.Module,
    small: nn.Module,
    batches: Sequence[Batch],
    objective: Objective,
    recipe: GroupRecipe,
    ignore: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Move the weights that are left, in place, on the loss or towards the dense network's predictions.

    Returns what the report says of it.
    """
    if _is_tokens(batches[0]) and objective.output_hessian == "softmax":
        options = replace(recipe.divergence, seed=recipe.divergence.seed + seed)
        moved = follow(model, small, batches, options, ignore)
        note = "no passes on the divergence: there is one sample alone, or no weight that may move"
        return {"moved": moved} if moved is not None else {"notes": (note,)}
    rows = rows_that_fit(small)
    if rows < FEWEST_ROWS:
        note = f"no Newton steps of what is left: free memory holds {rows} gradient rows of it"
        return {"notes": (note,)}
    found = refine(small, batches, objective, steps=recipe.steps, ignore=ignore, rows=rows, seed=seed)
    note = f"no Newton steps of what is left: there are no more than {BATCH} samples, or no weight may move"
    return {"refined": found} if found is not None else {"notes": (note,)}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sweep:
    """Sets of groups that are chosen one after the other, while the network is pruned."""

    dense: nn.Module
    work: nn.Module
    outputs: Mapping[str, FloatArray]
    counts: Mapping[str, int]
    recipe: GroupRecipe
    masks: dict[str, BoolArray] = field(default_factory=dict)
    choices: dict[str, SetChoice] = field(default_factory=dict)

    def choose(self, sets: Sequence[GroupSet], free: Sequence[str], batches: Sequence[Batch]) -> None:
        """Choose from all sets, write what their readers become, and fit all layers that may change."""
        readers = {part.name: _readers(self.dense, part) for part in sets}
        single = {own[0][0]: name for name, own in readers.items() if len(own) == 1}
        wanted = list(dict.fromkeys([*single, *free]))
        line = Chain.of(self.dense, wanted, batches) if len(single) == len(sets) else None
        if line is not None:
            parts = {part.name: part for part in sets}
            of = {layer: parts[name] for layer, name in single.items()}
            line.run(self.work, lambda *found: self._visit(of, *found))
            return
        for part in sets:
            self._decide(part, _program_now(self.dense, self.work, part, batches, self.outputs, self.recipe))
        refit(self.dense, self.work, free, batches, self.recipe.damping)

    def _visit(self, of: Mapping[str, GroupSet], name: str, gram: FloatArray, cross: FloatArray) -> None:
        """Choose from the set that a layer reads, or fit it if it reads none that is to lose groups."""
        before, layer = self.dense.get_submodule(name), self.work.get_submodule(name)
        weight, system = solved(before, layer, gram, cross, self.recipe.damping)
        if name not in of:
            write_affine(layer, weight)
            return
        ((_, _, columns),) = _readers(self.dense, of[name])
        metric = self.outputs.get(name, np.eye(len(weight)))
        reader = Reader(weight=weight, gram=system, outputs=metric, columns=columns)
        self._decide(of[name], GroupProgram([reader]))

    def _decide(self, part: GroupSet, program: GroupProgram) -> None:
        mask, self.choices[part.name] = _choose(program, self.counts[part.name], self.recipe)
        self.masks[part.name] = mask
        _write(self.work, part, program, mask)


def _is_tokens(batch: Batch) -> bool:
    """Return whether inputs are sequences of token ids."""
    first = next(tensors_of(batch.inputs))
    return first.ndim == 2 and not first.is_floating_point()


def _short(model: nn.Module, batch: Batch) -> Inputs:
    """Return inputs to trace a network with: short sequences, where it takes them."""
    if not _is_tokens(batch):
        return batch.inputs
    length = next(tensors_of(batch.inputs)).shape[1]

    def cut_short(x: Tensor) -> Tensor:
        return x[:, :TRACED_TOKENS] if x.ndim > 1 and x.shape[1] == length else x

    short = map_tensors(cut_short, batch.inputs)
    try:
        run(model, short, [], ForwardError, "")
    except ForwardError:
        # A network for sequences of one length alone.
        return batch.inputs
    return short


def _at_a_time(batches: Iterable[Batch]) -> list[Batch]:
    """Return batches as they run: tokens cut into few sequences, and no more of them than are of use."""
    found = list(batches)
    if not found or not _is_tokens(found[0]):
        return found
    return _within(list(chain.from_iterable(by_tokens(batch, BATCH_TOKENS) for batch in found)), MOST_TOKENS)


def _within(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches, with so many tokens in all; all of those that are no tokens."""
    if not _is_tokens(batches[0]):
        return list(batches)
    totals = accumulate(next(tensors_of(batch.inputs)).numel() for batch in batches)
    return [batch for batch, total in zip(batches, totals, strict=True) if total <= tokens] or [*batches[:1]]


def _chosen_sets(structure: Structure, ignore: str | Sequence[str]) -> tuple[list[GroupSet], list[str]]:
    """Return the sets without an ignored layer, and notes on the others."""
    globs = names("ignore", ignore)
    chosen: list[GroupSet] = []
    notes: list[str] = []
    matched: set[str] = set()
    for part in structure.sets:
        layers = {entry.name.rpartition(".")[0] or entry.name for entry in part.members}
        hit = sorted({(glob, layer) for glob in globs for layer in layers if fnmatchcase(layer, glob)})
        matched.update(glob for glob, _ in hit)
        if hit:
            notes.append(f"{part.name} is left whole: {', '.join(layer for _, layer in hit)} is ignored")
        else:
            chosen.append(part)
    for glob in globs:
        if glob not in matched:
            remedy = (
                f"use names of layers such as {structure.sets[0].name}" if structure.sets else "leave it out"
            )
            raise UnmatchedPatternError("ignore", f"{glob!r} matches no layer with groups", remedy)
    return chosen, notes


def _shares(sets: Sequence[GroupSet], keep: float | Mapping[str, float]) -> dict[str, float]:
    """Return the share to keep of every set that is to lose groups."""
    if not isinstance(keep, Mapping):
        share = finite_number("keep", keep, most=1.0, above=True)
        return {part.name: share for part in sets}
    shares: dict[str, float] = {}
    for glob, share in keep.items():
        finite_number(f"keep[{glob!r}]", share, most=1.0, above=True)
        hits = [part.name for part in sets if fnmatchcase(part.name, glob)]
        if not hits:
            remedy = f"choose among {', '.join(part.name for part in sets)}"
            raise UnmatchedPatternError("keep", f"{glob!r} matches no groups", remedy)
        for name in hits:
            shares.setdefault(name, float(share))
    return shares


def _first(batches: Sequence[Batch], samples: int) -> list[Batch]:
    """Return the first batches, with so many samples in all."""
    return list(cut(iter(batches), size=BATCH, max_samples=samples))


def _counts(sets: Sequence[GroupSet], shares: Mapping[str, float]) -> dict[str, int]:
    return {part.name: max(1, round(shares[part.name] * part.n_groups)) for part in sets}


def _spread_counts(
    sets: Sequence[GroupSet], shares: Mapping[str, float], curves: Mapping[str, FloatArray]
) -> dict[str, int]:
    """Return how many groups each set keeps where sets with groups that are alike share their number."""
    pools: dict[tuple[str, int, float], list[GroupSet]] = {}
    for part in sets:
        pools.setdefault((part.kind, part.parameters, shares[part.name]), []).append(part)
    counts = {}
    for (_, _, share), pool in pools.items():
        offered = offered_widths(pool, CHOICES)
        total = max(
            sum(int(offered[part.name][0]) for part in pool), round(share * sum(p.n_groups for p in pool))
        )
        errors = {part.name: curves[part.name][part.n_groups - offered[part.name]] for part in pool}
        costs = [Cost(sets=(name,), table=widths.astype(float)) for name, widths in offered.items()]
        found = choose_widths(errors, costs, float(total), argument="keep")
        counts.update({name: int(offered[name][place]) for name, place in found.choice.items()})
    return counts


def _readers(model: nn.Module, part: GroupSet) -> list[tuple[str, nn.Module, Any]]:
    """Return name, module and columns of every layer that reads a set."""
    members = [entry for entry in part.members if entry.role == READS]
    layers = [entry.name.rpartition(".")[0] for entry in members]
    modules = [model.get_submodule(name) for name in layers]
    columns = [columns_of(module, entry.index) for module, entry in zip(modules, members, strict=True)]
    return list(zip(layers, modules, columns, strict=True))


def _curve(
    model: nn.Module,
    part: GroupSet,
    found: Mapping[str, Moments],
    outputs: Mapping[str, FloatArray],
    recipe: GroupRecipe,
) -> FloatArray:
    """Return the losses of a set around the dense network after 0, 1, 2, ... removals."""
    program = GroupProgram(
        [
            Reader(
                weight=affine(module)[:, :-1],
                gram=_damped(found[name].gram, recipe.damping),
                outputs=outputs.get(name, np.eye(len(affine(module)))),
                columns=columns,
            )
            for name, module, columns in _readers(model, part)
        ]
    )
    return program.greedy(1)[1]


def _program_now(
    model: nn.Module,
    work: nn.Module,
    part: GroupSet,
    batches: Sequence[Batch],
    outputs: Mapping[str, FloatArray],
    recipe: GroupRecipe,
) -> GroupProgram:
    """Return the program of a set in the network as pruned so far: its readers are to give what they gave."""
    readers = []
    for name, _, columns in _readers(model, part):
        weight, gram = fitted(model, work, name, batches, recipe.damping)
        metric = outputs.get(name, np.eye(len(weight)))
        readers.append(Reader(weight=weight, gram=gram, outputs=metric, columns=columns))
    return GroupProgram(readers)


def _damped(gram: FloatArray, share: float) -> FloatArray:
    level = share * float(np.trace(gram)) / len(gram)
    return np.asarray(gram + (level if level > 0.0 else 1e-12) * np.eye(len(gram)))


def _choose(program: GroupProgram, n_keep: int, recipe: GroupRecipe) -> tuple[BoolArray, SetChoice]:
    """Return which groups of a set are kept, with the model's loss and its bound."""
    bound = None
    mask, _ = program.greedy(n_keep)
    mask, loss = program.swaps(mask, recipe.swaps)
    if recipe.exact_seconds and 0 < n_keep < program.n_groups:
        search: Callable[[GroupProgram, BoolArray, float], leaps.Proved] = _branch_and_bound
        if math.comb(program.n_groups, n_keep) <= ENUMERATED:
            search = _every_set
        elif leaps.applies(program):
            search = leaps.search
        try:
            found = search(program, mask, recipe.exact_seconds)
        except NotPositiveDefiniteError as error:
            singular = f"{recipe.damping:g}, with which a program is singular to rounding"
            remedy = "raise it (0.01 is the default), or leave exact_seconds at 0"
            raise ArgumentError("recipe.damping", singular, remedy) from error
        bound = found.bound
        if found.loss < loss:
            mask, loss = found.keep, found.loss
    n = program.n_groups
    return mask, SetChoice(n_keep=int(mask.sum()), n_groups=n, loss=loss, bound=bound)


def _every_set(program: GroupProgram, mask: BoolArray, _: float) -> leaps.Proved:
    """Return the best of all sets."""
    keep, loss = program.enumerated(int(mask.sum()))
    return leaps.Proved(keep=keep, loss=loss, bound=loss)


def _branch_and_bound(program: GroupProgram, mask: BoolArray, seconds: float) -> leaps.Proved:
    """Return what the exact method of blocks finds, and its bound; `mask` where it finds no set."""
    problem = program.problem(int(mask.sum()))
    found = solve(problem, "branch_and_bound", program="joint", time_limit=seconds)
    keep = mask
    if found.keep is not None:
        keep = np.zeros(program.n_groups, dtype=np.bool_)
        unit = problem.sets.unit
        assert unit is not None
        keep[unit[found.keep]] = True
    bound = -math.inf if found.bound is None else found.bound
    return leaps.Proved(keep=keep, loss=program.loss(keep), bound=bound)


def _widths(
    structure: Structure, sets: Sequence[GroupSet], curves: Mapping[str, FloatArray], budget: _Budget
) -> tuple[dict[str, int], Widths]:
    """Return how many groups of each set are kept for a budget of operations or time."""
    if budget.latency is None:
        offered = offered_widths(sets, CHOICES)
        limit, argument = budget.limit * structure.flops, "flops"
        narrowest = {part.name: np.arange(part.n_groups) < offered[part.name][0] for part in sets}
        least = structure.flops_of(narrowest) / structure.flops
        if budget.limit < least:
            needed = math.ceil(1000.0 * least) / 1000.0
            short = f"{budget.limit:g} of the operations, and the smallest network has {needed:g}"
            raise ArgumentError(argument, short, "allow that much, or ignore fewer layers")
        fixed, costs = operation_costs(structure, offered)
    else:
        budget.latency.require(structure, "latency")
        offered = {part.name: budget.latency.offered[part.name] for part in sets}
        limit, argument = budget.limit, "milliseconds"
        fixed, costs = within_sets(budget.latency, list(offered))
    errors = {part.name: curves[part.name][part.n_groups - offered[part.name]] for part in sets}
    found = choose_widths(errors, costs, limit, fixed=fixed, argument=argument)
    return {name: int(offered[name][place]) for name, place in found.choice.items()}, found


def operation_costs(structure: Structure, offered: Mapping[str, Any]) -> tuple[float, list[Cost]]:
    """Return the operations of a network as tables over widths: what is fixed, and a table for each layer.

    `offered` has the widths of each set that may shrink. Raises `ArgumentError` if a product depends on more
    than two of them.
    """
    starts, start = {}, 0
    for part in structure.sets:
        starts[part.name] = (start, start + part.n_groups)
        start += part.n_groups
    fixed = 0.0
    tables: dict[tuple[str, ...], FloatArray] = {}
    for flops, axes in structure.priced_axes:
        shares = []
        for units in axes:
            parts = {
                name: float(((units >= low) & (units < high)).mean())
                for name, (low, high) in starts.items()
                if name in offered
            }
            named: list[tuple[str | None, float]] = [(name, part) for name, part in parts.items() if part]
            shares.append([*named, (None, 1.0 - sum(parts.values()))])
        for term in product(*shares):
            involved = tuple(dict.fromkeys(name for name, _ in term if name is not None))
            weight = flops * float(np.prod([part for _, part in term]))
            if not involved:
                fixed += weight
                continue
            if len(involved) > 2:
                found = f"a product that depends on {', '.join(involved)}"
                raise ArgumentError("flops", found, "use keep, or ignore one of them")
            grid = np.full([len(offered[name]) for name in involved], weight)
            for name, _ in term:
                if name is not None:
                    low, high = starts[name]
                    shape = [-1 if other == name else 1 for other in involved]
                    grid = grid * (np.asarray(offered[name]) / (high - low)).reshape(shape)
            known = tables.get(involved)
            tables[involved] = grid if known is None else known + grid
    return fixed, [Cost(sets=involved, table=table) for involved, table in tables.items()]


def _write(work: nn.Module, part: GroupSet, program: GroupProgram, mask: BoolArray) -> None:
    """Write what the program says into the layers that read a set, with zeros for what goes."""
    for (_, module, _), values in zip(_readers(work, part), program.updated(mask), strict=True):
        write_affine(module, values)


def _closed(model: nn.Module, work: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Return a copy of a network with the weights and biases that some layers have in an opened one."""
    copy = deepcopy(model)
    for name in layers:
        layer, fitted_layer = copy.get_submodule(name), work.get_submodule(name)
        layer.weight, layer.bias = fitted_layer.weight, fitted_layer.bias
    return copy


def fitted_layers(model: nn.Module, structure: Structure, ignore: str | Sequence[str]) -> list[str]:
    """Return the layers that read groups and may change: plain ones that no glob of `ignore` names."""
    globs = names("ignore", ignore)
    found: set[str] = set()
    for part in structure.sets:
        try:
            found.update(layers_that_read(model, structure, [part]))
        except ArgumentError:
            continue
    free = {layer for layer in found if not any(fnmatchcase(layer, glob) for glob in globs)}
    return [path for path, _ in model.named_modules() if path in free]


def refit(
    model: nn.Module, work: nn.Module, layers: Sequence[str], batches: Sequence[Batch], damping: float
) -> None:
    """Fit every layer, in the order in which they run, to what it gave in the network as it was."""
    line = Chain.of(model, layers, batches)
    if line is not None:

        def visit(name: str, gram: FloatArray, cross: FloatArray) -> None:
            before, layer = model.get_submodule(name), work.get_submodule(name)
            write_affine(layer, solved(before, layer, gram, cross, damping)[0])

        line.run(work, visit)
        return
    order: list[str] = []
    noted = watching(model, layers, lambda name, *_: order.append(name))
    with torch.no_grad(), kept(model), evaluation_mode(model), noted:
        forward(model, batches[0].take(slice(2)).inputs)
    for name in dict.fromkeys(order):
        write_affine(work.get_submodule(name), fitted(model, work, name, batches, damping)[0])
