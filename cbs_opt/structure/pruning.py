"""`prune_groups`: groups chosen by the quadratic program of their readers, taken out, the rest refitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from cbs_opt.errors import UnmatchedPatternError
from cbs_opt.network.data import Batch, Data, LossFunction, cut, device_of, forward, iterate
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.objective import Objective
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.solving import solve
from cbs_opt.structure import leaps
from cbs_opt.structure.attention import opened
from cbs_opt.structure.groups import READS, BoolArray, GroupSet, Structure, groups
from cbs_opt.structure.latency import LatencyTable, offered_widths, within_sets
from cbs_opt.structure.reading import (
    Moments,
    affine,
    columns_of,
    fitted,
    layers_that_read,
    moments,
    watching,
    write_affine,
)
from cbs_opt.structure.refinement import FEWEST_ROWS, Refined, refine, rows_that_fit
from cbs_opt.structure.removal import Shrinkage, shrink
from cbs_opt.structure.selection import FloatArray, GroupProgram, Reader
from cbs_opt.structure.widths import Cost, Widths, choose_widths
from cbs_opt.system.checks import check_fields, finite_number, names, one_of, whole_number
from formulations.errors import ArgumentError, NotPositiveDefiniteError

CHOICES = 16
"""Widths of a set that a budget of operations chooses among."""
ENUMERATED = 1000
"""Sets of groups up to which an exact search tries all."""
BATCH = 128
"""Samples that run at a time."""


@dataclass(frozen=True, kw_only=True)
class GroupRecipe:
    """How groups are chosen, and what the others do.

    Parameters
    ----------
    metric : {"loss", "outputs"}
        What a change of a layer's outputs costs: by the second moments of the gradients of the loss, or all
        the same, as in layer-wise reconstruction.
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
    """

    metric: str = "loss"
    swaps: int = 3
    samples: int = 1024
    damping: float = 0.01
    exact_seconds: float = 0.0
    steps: int = 3
    step_samples: int = 4096

    def __post_init__(self) -> None:
        check_fields(self, "recipe.", one_of, "metric", choices=("loss", "outputs"))
        check_fields(self, "recipe.", whole_number, "swaps", "steps", least=0)
        check_fields(self, "recipe.", whole_number, "samples", "step_samples", least=2)
        check_fields(self, "recipe.", finite_number, "exact_seconds")
        check_fields(self, "recipe.", finite_number, "damping", above=True)


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
    shrinkage : Shrinkage
    widths : Widths or None
        The knapsack's answer, where a budget of operations was asked for.
    refined : Refined or None
        What the Newton steps of the weights that are left did.
    notes : tuple of str
        Sets that were left whole because a layer of theirs is ignored.
    """

    choices: Mapping[str, SetChoice]
    shrinkage: Shrinkage
    widths: Widths | None = None
    refined: Refined | None = None
    notes: tuple[str, ...] = field(default=())

    def summary(self) -> str:
        """Return what was taken out, with the model's losses and their bounds."""
        lines = []
        for name, entry in self.choices.items():
            bound = "" if entry.bound is None else f", bound {entry.bound:.6g}"
            lines.append(f"{name}: {entry.n_keep} of {entry.n_groups} kept, loss {entry.loss:.6g}{bound}")
        lines += self.shrinkage.summary().splitlines()[-2:]
        return "\n".join([*lines, *([str(self.refined)] if self.refined else ()), *self.notes])

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
        Training data, as for `prune`.
    keep : float or mapping of str to float, optional
        Share of the groups of every set to keep, ``max(1, round(keep * n))`` of them; a mapping has it by
        glob over the names of `groups`, the first that matches, and the others are left whole.
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
    model = unwrapped(model)
    objective = Objective.of(loss_fn)
    most = max(recipe.samples, recipe.step_samples if recipe.steps else 0)
    source = iterate(data, batch_size=BATCH, max_samples=most, seed=seed, device=device_of(model))
    every = list(source)
    run = partial(forward, model)
    with kept(model), evaluation_mode(model):
        objective.settle(model, run, every[0])
    every = [objective.prepared(batch) for batch in every]
    batches = _first(every, recipe.samples)
    example = batches[0].take(slice(2)).inputs
    structure = groups(model, example)
    sets, notes = _chosen_sets(structure, ignore)
    shares = {part.name: 1.0 for part in sets} if keep is None else _shares(sets, keep)
    sets = [part for part in sets if part.name in shares]
    if not sets:
        raise ArgumentError("model", "no groups that may be taken out", "print cbs.groups for the reasons")
    dense = opened(model)
    layers = layers_that_read(dense, structure, sets)
    outputs: dict[str, FloatArray] = {}
    widths = None
    if budget is None and recipe.metric == "outputs":
        counts = _counts(sets, shares)
    else:
        measured = moments(dense, layers, batches, lambda output, batch: objective.loss(output, batch))
        if recipe.metric == "loss":
            # Gradients of a softmax add up to zero: without damping their moments are singular.
            outputs = {name: _damped(entry.outputs, recipe.damping) for name, entry in measured.items()}
        if budget is None:
            counts = _counts(sets, shares)
        else:
            programs = {part.name: _program(dense, part, measured, outputs, recipe) for part in sets}
            counts, widths = _widths(structure, sets, programs, budget)
    work = deepcopy(dense)
    masks, choices = {}, {}
    for part in sets:
        program = _program_now(dense, work, part, batches, outputs, recipe)
        masks[part.name], choices[part.name] = _choose(program, counts[part.name], recipe)
        _write(work, part, program, masks[part.name])
    free = fitted_layers(dense, structure, ignore)
    refit(dense, work, free, batches, recipe.damping)
    small, shrinkage = shrink(_closed(model, work, free), example, keep=masks)
    refined = None
    rows = rows_that_fit(small)
    if recipe.steps and rows < FEWEST_ROWS:
        notes.append(f"no Newton steps of what is left: free memory holds {rows} gradient rows of it")
    elif recipe.steps:
        globs = names("ignore", ignore)
        refined = refine(small, every, objective, steps=recipe.steps, ignore=globs, rows=rows, seed=seed)
    report = GroupReport(
        choices=choices, shrinkage=shrinkage, widths=widths, refined=refined, notes=tuple(notes)
    )
    return small, report


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


def _readers(model: nn.Module, part: GroupSet) -> list[tuple[str, nn.Module, Any]]:
    """Return name, module and columns of every layer that reads a set."""
    members = [entry for entry in part.members if entry.role == READS]
    layers = [entry.name.rpartition(".")[0] for entry in members]
    modules = [model.get_submodule(name) for name in layers]
    columns = [columns_of(module, entry.index) for module, entry in zip(modules, members, strict=True)]
    return list(zip(layers, modules, columns, strict=True))


def _program(
    model: nn.Module,
    part: GroupSet,
    found: Mapping[str, Moments],
    outputs: Mapping[str, FloatArray],
    recipe: GroupRecipe,
) -> GroupProgram:
    """Return the program of a set around the dense network, by which widths are compared."""
    return GroupProgram(
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
    structure: Structure, sets: Sequence[GroupSet], programs: Mapping[str, GroupProgram], budget: _Budget
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
    errors = {}
    for part in sets:
        _, losses = programs[part.name].greedy(1)
        errors[part.name] = losses[part.n_groups - offered[part.name]]
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
    order: list[str] = []
    noted = watching(model, layers, lambda name, *_: order.append(name))
    with torch.no_grad(), kept(model), evaluation_mode(model), noted:
        forward(model, batches[0].take(slice(2)).inputs)
    for name in dict.fromkeys(order):
        write_affine(work.get_submodule(name), fitted(model, work, name, batches, damping)[0])
