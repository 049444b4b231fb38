"""Pruning a network layer by layer, block after block: `prune_layers`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.layers.asymmetry import Asymmetry
from cbs_opt.layers.blocks import NOT_REACHED, Block, Layer, find_blocks
from cbs_opt.layers.calibration import Calibration, calibrate, copied, first_tokens, limited, without_cache
from cbs_opt.layers.certificates import RowSample, bound_rows
from cbs_opt.layers.divergence import (
    DivergenceRecord,
    Predictions,
    move,
    predictions,
    stage_passes,
    stage_sparsity,
)
from cbs_opt.layers.gram import GramSum
from cbs_opt.layers.recipe import LayerRecipe, layer_recipe
from cbs_opt.layers.record import LayerRecord, LayersReport, PackedMask, packed, unpacked
from cbs_opt.layers.shares import SCALE_TOKENS, Scales, kept_counts, measure_scales, row_factors
from cbs_opt.layers.shrinkage import chosen_shrinkage
from cbs_opt.layers.writing import NO_TEXT, batch_of, why_not, write
from cbs_opt.network.data import Batch, Data, device_of, read
from cbs_opt.network.eligible import Globs, LeftOut, unwrapped
from cbs_opt.network.state import evaluation_mode, kept, require_usable
from cbs_opt.network.trial import plain_attention, write_layers
from cbs_opt.runs.fingerprint import absorb_tensor
from cbs_opt.runs.folder import Pieces, RunStore, in_numpy
from cbs_opt.select.layer_program.methods import LayerMethod, layer_method
from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram, LayerSolution
from cbs_opt.select.layer_program.support import (
    LayerCount,
    LayerSupport,
    Sparsity,
    checked_sparsity,
    support_of,
)
from cbs_opt.system.checks import whole_number, within
from cbs_opt.system.memory import peak, reset_peak
from cbs_opt.system.plain import plain, rebuilt
from cbs_opt.system.progress import Progress, reporting
from cbs_opt.system.versions import LIBRARIES, versions
from formulations.errors import ArgumentError, ShapeError

FORMAT = "cbs-opt layers run"
TEXT = "written"
"""What the text is kept by that the network wrote."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Done:
    """New weights and kept masks of a block in the shapes of its parameters, by name, and their records.

    `seconds` is the processor time that they took.
    """

    weights: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    records: Sequence[LayerRecord]
    seconds: float


def prune_layers(
    model: nn.Module,
    data: Data,
    *,
    sparsity: Sparsity,
    recipe: str | LayerRecipe = "fast",
    blocks: str | None = None,
    ignore: Globs = (),
    samples: int | None = None,
    certify: RowSample | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | bool = True,
) -> LayersReport:
    """Prune the linear layers of a network of blocks in place, by what each layer is fed.

    Each row of a weight is pruned so that the layer's outputs change least on the calibration data (see
    `cbs_opt.select.layer_program`). Blocks go in order, each is fed by the pruned ones before it. The recipe
    "fast" makes only forward passes, of one block at a time, for networks whose gradients do not fit;
    "balanced" differentiates the network on a few samples first, and gives more weights to the layers and
    rows that matter more to its predictions (`cbs_opt.layers.shares`); "best" then moves the kept weights of
    all blocks towards the dense network's predictions (`cbs_opt.layers.divergence`).

    Parameters
    ----------
    model : nn.Module
        With a list of blocks of one class, as transformers have. Changed in place, each block when it is
        done: what ends the call early leaves the blocks before pruned, the others as they were. It runs in
        evaluation mode, and is given its modes back.
    data : tensor of token ids (N, T), DataLoader, or anything that `prune` takes as data
        Labels are not looked at; of batches with an ``attention_mask`` padded tokens do not count. Read once,
        in order.
    sparsity : float in [0, 1), or "n:m"
        Share of zeros in every layer, or how many of m consecutive inputs each row keeps ("2:4").
    recipe : "fast", "balanced", "best" or LayerRecipe, default "fast"
        With n:m, where every row has the pattern and there is nothing to share, "balanced" moves the kept
        weights in one pass, "best" in two.
    blocks : str, optional
        Glob of module names, such as "model.layers.*". By default the list of modules of one class that has
        the most weights of linear layers.
    ignore : str or sequence of str, optional
        Globs of parameters that are left as they are, such as "*.v_proj.weight". Embeddings, heads and all
        else outside of the blocks are left out in any case; the report lists them.
    samples : int, optional
        Samples of the data to use; all by default.
    certify : RowSample, optional
        Bound a random sample of the rows of every layer: how far above the optimum of its layer program each
        can be. By default none.
    run_dir : path-like, optional
        Folder that keeps every block that is done. The same call on the same dense network goes on after
        the last of them.
    progress : bool or Progress, default True

    Returns
    -------
    LayersReport

    Raises
    ------
    BlockListError
        If no list of blocks of one class is found, blocks do not follow one another, or share a weight.
    ShapeError
        If m does not divide the inputs of a layer; nothing is changed.
    NonFiniteError
        If a layer is fed NaN or infinity; the layer and the batch are named.
    ArgumentError
        For tokens that the network does not know, and arguments out of their range; for a network that
        returns no scores of classes, or fewer than two samples, where the recipe needs them; for text that
        the caller asks a network for that writes none.
    DataLoaderError, BatchFormatError, EmptyDataError, ForwardError
        If the data cannot be read, or the network cannot run on them.
    RunMismatchError, RunInUseError
        If `run_dir` holds another run, or a network that was pruned already is passed to a run.

    Notes
    -----
    Beside the network there are the hidden states of all tokens, and for one block a Gram matrix of every
    input in float64 and some ten arrays of the size of its largest weight. Two forward passes a block, then
    the method; `LayerRecipe` names what each costs. Gradients take a pass of the whole network with what it
    keeps for going back, of one sample at a time, and moving weights five copies of those that move.
    """
    began = time.process_time()
    reset_peak()
    sparsity, report_to = checked_sparsity(sparsity), reporting(progress)
    chosen = layer_recipe(recipe, sparsity)
    samples = None if samples is None else whole_number("samples", samples)
    require_usable(model)
    network = unwrapped(model)
    found, left_out = find_blocks(network, blocks, ignore)
    _check_supports(found, sparsity, chosen.budget)
    with ExitStack() as stack:
        stack.enter_context(kept(network))
        for context in (evaluation_mode(network), plain_attention(), without_cache(network), torch.no_grad()):
            stack.enter_context(context)
        batches: list[Batch] = []
        if chosen.differentiates or chosen.written:
            # A loader may fill one and the same tensor again and again.
            batches = [copied(batch) for batch in limited(read(data, max_samples=samples), samples)]
            data = batches
        calibration = calibrate(network, found, data, samples=samples, chunk_tokens=chosen.chunk_tokens)
        chosen = layer_recipe(recipe, sparsity, calibration.tokens)
        store: Pieces = Pieces()
        if run_dir is not None:
            wanted = _fingerprint(network, found, calibration, sparsity, chosen) | {
                "certify": plain(certify and (certify.rows, certify.seed, certify.time_limit))
            }
            store = stack.enter_context(RunStore(run_dir, wanted))
        run = _Run(network=network, blocks=found, recipe=chosen, store=store, progress=report_to)
        tokens, text, unwritten = calibration.tokens, [], ""
        try:
            text = run.text(batches)
        except ArgumentError as error:
            if isinstance(recipe, LayerRecipe):
                raise
            unwritten = error.found
            run.recipe = replace(chosen, written=0, asymmetric=None)
        calibration.batches += run.fed(text).batches
        scales = run.scales(batches) if chosen.budget == "network" else None
        plans = run.plans(sparsity, scales)
        plans[-1] = replace(plans[-1], certify=certify)
        if chosen.divergence is None:
            run.sweep(calibration, plans[0])
            moved: tuple[DivergenceRecord, ...] = ()
        else:
            moved = run.moved(batches, text, calibration, plans)
    reached = {layer.name for layer in run.records}
    left_out += tuple(
        LeftOut(name=layer.name, shape=tuple(layer.parameter.shape), reason=NOT_REACHED)
        for block in found
        for layer in block.layers
        if layer.name not in reached
    )
    return LayersReport(
        sparsity=sparsity,
        recipe=run.recipe,
        layers=tuple(run.records),
        left_out=left_out,
        tokens=tokens,
        written=calibration.tokens - tokens,
        unwritten=unwritten,
        seconds=run.earlier + time.process_time() - began,
        peak_memory=peak(),
        moved=moved,
        scale_tokens=0 if scales is None else scales.tokens,
        packed=run.packs,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    """What a sweep leaves of every layer.

    Where the layers of the network share a budget, `kept` is how many weights each keeps and `scales` (r,)
    what a change of each output matters, relative and as a factor of the outputs. `certify`: which rows are
    bounded.
    """

    sparsity: Sparsity
    budget: str
    kept: Mapping[str, int] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    certify: RowSample | None = None

    def support(self, name: str, shape: tuple[int, int]) -> LayerSupport:
        """Return what a layer may keep."""
        if name in self.kept:
            return LayerCount(self.kept[name])
        return support_of(self.sparsity, shape, self.budget)

    def solution(self, name: str, program: LayerProgram, method: LayerMethod) -> LayerSolution:
        """Return what a method makes of a layer whose outputs matter as they do here."""
        if name not in self.scales:
            return method(program)
        scale = self.scales[name].to(program.weights).unsqueeze(1)
        solution = method(replace(program, weights=program.weights * scale))
        weights = solution.weights / scale.to(solution.weights)
        return replace(solution, weights=weights, losses=program.losses(weights))


@dataclass(kw_only=True, eq=False)
class _Run:
    """A run on one network: what it has done so far, and where that is kept.

    `records` and `packs`, shape and bits of the masks, are those of the last sweep over the blocks; `earlier`
    is the processor time that calls before took for what is recalled.
    """

    network: nn.Module
    blocks: Sequence[Block]
    recipe: LayerRecipe
    store: Pieces
    progress: Progress
    records: list[LayerRecord] = field(default_factory=list)
    packs: dict[str, PackedMask] = field(default_factory=dict)
    earlier: float = 0.0

    @property
    def weights(self) -> dict[str, Tensor]:
        """Present weights of all layers by name, not copied."""
        return {layer.name: layer.parameter.detach() for block in self.blocks for layer in block.layers}

    def text(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the text that the dense network writes in the form of the data, none if it is not to.

        Raises `ArgumentError` if it cannot.
        """
        if not self.recipe.written:
            return []
        if reason := why_not(self.network, batches):
            raise ArgumentError("recipe.written", reason, NO_TEXT)
        piece = self.store.recall(TEXT)
        if piece is not None:
            self.earlier += piece[0]["seconds"]
            ids = torch.from_numpy(piece[1]["ids"])
        else:
            began = time.process_time()
            with self.progress.phase("writing", self.recipe.written, unit="token") as advance:
                ids = write(
                    self.network, batches, self.recipe.written, seed=self.recipe.seed, advance=advance
                )
            self.store.keep(TEXT, {"seconds": time.process_time() - began}, {"ids": ids.numpy()})
        return [batch_of(ids, batches[0], device_of(self.network))]

    def fed(self, batches: Sequence[Batch]) -> Calibration:
        """Return what the first block is fed of some batches by the network as it is."""
        if not batches:
            return Calibration()
        tokens = self.recipe.chunk_tokens
        return calibrate(self.network, self.blocks, batches, samples=None, chunk_tokens=tokens)

    def scales(self, batches: Sequence[Batch]) -> Scales:
        """Return what the outputs of every layer matter to the predictions of the network as it is."""
        few = first_tokens(batches, SCALE_TOKENS)
        with self.progress.phase("scales", sum(batch.size for batch in few), unit="sample") as advance:
            return measure_scales(self.network, self.blocks, few, self.recipe.seed, advance)

    def plans(self, sparsity: Sparsity, scales: Scales | None) -> list[_Plan]:
        """Return what each stage leaves of every layer of the network as it is."""
        options = self.recipe.divergence
        shares = [sparsity]
        if options is not None:
            shares = [stage_sparsity(sparsity, options, stage) for stage in range(options.stages)]
        if scales is None:
            return [_Plan(sparsity=share, budget=self.recipe.budget) for share in shares]
        layers = [layer for block in self.blocks for layer in block.layers]
        rows = {layer.name: layer.rows(layer.parameter.detach()) for layer in layers}
        return [
            _Plan(
                sparsity=share,
                budget="layer",
                kept=kept_counts(rows, scales, float(share)),
                scales={name: row_factors(layer.rows) for name, layer in scales.layers.items()},
            )
            for share in shares
        ]

    def sweep(self, calibration: Calibration, plan: _Plan, stage: int = 0) -> None:
        """Prune all blocks in order, in place."""
        self.records.clear()
        self.packs.clear()
        with self.progress.phase("blocks", len(self.blocks), unit="block") as advance:
            for number, block in enumerate(self.blocks):
                name = f"stage_{stage:02d}_block_{number:04d}"
                done = _recalled(self.store, name, device_of(self.network))
                last = number + 1 == len(self.blocks)
                if self.recipe.asymmetric and not (last and done is not None):
                    calibration.follow(number, block)
                if done is not None:
                    self.earlier += done.seconds
                else:
                    done = _pruned(calibration, number, block, plan, self.recipe)
                    _remember(self.store, name, done)
                layers = {layer.name: layer for layer in block.layers}
                write_layers({layer: (layers[layer].parameter, new) for layer, new in done.weights.items()})
                self.packs.update((layer, packed(keep)) for layer, keep in done.masks.items())
                self.records += done.records
                if not last:
                    calibration.advance(number, block.module)
                advance(1)

    def moved(
        self,
        batches: Sequence[Batch],
        text: Sequence[Batch],
        calibration: Calibration,
        plans: Sequence[_Plan],
    ) -> tuple[DivergenceRecord, ...]:
        """Prune in stages, after each of which the kept weights of all blocks move by the data alone."""
        options = self.recipe.divergence
        assert options is not None
        parameters = {layer.name: layer.parameter for block in self.blocks for layer in block.layers}
        dense = {name: weight.clone() for name, weight in self.weights.items()}
        aim = predictions(self.network, dense, batches, options)
        records = []
        for stage, plan in enumerate(plans):
            if stage:
                calibration = self.fed([*batches, *text])
            self.sweep(calibration, plan, stage)
            name = f"stage_{stage:02d}_moved"
            piece = self.store.recall(name)
            if piece is None:
                records.append(self._move(aim, parameters, stage, name))
                continue
            header, arrays = piece
            write_layers({key: (parameters[key], torch.from_numpy(a)) for key, a in arrays.items()})
            self.earlier += header["seconds"]
            records.append(rebuilt(DivergenceRecord, header["record"]))
        return tuple(records)

    def _move(
        self, aim: Predictions, parameters: Mapping[str, nn.Parameter], stage: int, name: str
    ) -> DivergenceRecord:
        """Move the kept weights after the sweep of a stage, and keep them under a name."""
        began = time.process_time()
        options = self.recipe.divergence
        assert options is not None
        masks = {layer: unpacked(*pack).to(parameters[layer].device) for layer, pack in self.packs.items()}
        moving = {layer: parameters[layer] for layer in masks}
        steps = stage_passes(options, stage) * len(aim.moving)
        with self.progress.phase("divergence", steps, unit="step") as advance:
            record = move(aim, moving, masks, options, stage, advance)
        if self.store.writes:
            header = {"record": plain(record), "seconds": time.process_time() - began}
            arrays = {layer: in_numpy(parameter) for layer, parameter in moving.items()}
            self.store.keep(name, header, arrays, compress=False)
        return record


def _check_supports(blocks: Sequence[Block], sparsity: Sparsity, budget: str) -> None:
    """Raise an error that names the layer if a pattern does not fit the inputs of one."""
    for layer in (layer for block in blocks for layer in block.layers):
        rows, inputs = layer.rows(layer.parameter).shape
        try:
            with within("recipe", "budget"):
                support_of(sparsity, (rows, inputs), "layer" if budget == "network" else budget)
        except ShapeError as error:
            found = f"{layer.name}: {error.found}"
            remedy = f'leave it out, ignore="{layer.name}", or use an m that divides {inputs}'
            raise ShapeError("sparsity", found, remedy) from None


def _pruned(calibration: Calibration, number: int, block: Block, plan: _Plan, recipe: LayerRecipe) -> _Done:
    """Return what becomes of the layers of a block, which is not changed."""
    start = time.process_time()
    weights: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    records: dict[str, LayerRecord] = {}
    places = {layer.name: index for index, layer in enumerate(block.layers)}
    for layers, sums in _fed(calibration, number, block, weights, recipe):
        shared: dict[int, _Shared] = {}
        for layer in (layer for layer in layers if layer.name in sums):
            began = time.process_time()
            total = sums[layer.name]
            fed = shared.setdefault(id(total), _Shared(total))
            program, shrinkage, distance = fed.program(layer, plan, recipe)
            solution = plan.solution(layer.name, program, layer_method(recipe.method, recipe.options))
            new = solution.weights.to(layer.parameter.dtype)
            weights[layer.name], masks[layer.name] = layer.rows(new), layer.rows(solution.keep)
            loss, error = program.relative(new)
            spent = time.process_time() - began
            bounds = None
            if plan.certify is not None:
                place = number, places[layer.name]
                bounds = bound_rows(program, solution.keep, new, plan.certify, place, layer.name)
            records[layer.name] = LayerRecord(
                name=layer.name,
                block=number,
                rows=program.rows,
                inputs=program.hessian.n,
                pruned=int((~solution.keep).sum()),
                loss=loss,
                output_error=error,
                distance=distance,
                proved=solution.proved,
                tokens=total.tokens,
                shrinkage=shrinkage,
                dead=program.hessian.dead,
                seconds=spent,
                bounds=bounds,
            )
    found = [records[name] for name in places if name in records]
    return _Done(weights=weights, masks=masks, records=found, seconds=time.process_time() - start)


def _fed(
    calibration: Calibration, number: int, block: Block, pruned: Mapping[str, Tensor], recipe: LayerRecipe
) -> Iterator[tuple[Sequence[Layer], dict[str, GramSum]]]:
    """Yield the layers of a block with the sums of what they are fed: all, or a level at a time.

    `pruned` are the new weights of those that were yielded before.
    """
    hold = recipe.shrinkage is None
    if not recipe.asymmetric:
        yield block.layers, calibration.grams(number, block, hold=hold)
        return
    for level in calibration.levels(number, block):
        sums = calibration.grams(number, level.block, hold=hold, pruned=pruned, once=level.once)
        yield level.block.layers, sums


class _Shared:
    """What layers that are fed the same have in common."""

    def __init__(self, sums: GramSum) -> None:
        self._sums = sums
        self._asymmetry = Asymmetry(sums) if sums.paired else None
        self._hessian: LayerHessian | None = None
        self._shrinkage = 0.0

    def program(self, layer: Layer, plan: _Plan, recipe: LayerRecipe) -> tuple[LayerProgram, float, float]:
        """Return the program of a layer, its shrinkage, and how far what it prunes is from the weights."""
        rows, distance = layer.rows(layer.parameter.detach()), 0.0
        support = plan.support(layer.name, (rows.shape[0], rows.shape[1]))
        if self._asymmetry is not None:
            rows, distance = self._asymmetry.target(rows)
        if self._hessian is None:
            wanted = recipe.shrinkage
            if wanted is None and self._sums.hold:
                wanted = chosen_shrinkage(self._sums, rows, support, recipe.damping)
            gram, self._shrinkage = self._sums.mean(wanted)
            self._hessian = LayerHessian(gram, recipe.damping, name=layer.name)
        program = LayerProgram(weights=rows, hessian=self._hessian, support=support)
        return program, self._shrinkage, distance


def _remember(store: Pieces, piece: str, done: _Done) -> None:
    """Write a block that is done."""
    if not store.writes:
        return
    arrays = {f"mask {name}": keep.cpu().contiguous().numpy() for name, keep in done.masks.items()}
    arrays |= {f"weights {name}": in_numpy(new) for name, new in done.weights.items()}
    header = {"records": plain(done.records), "seconds": done.seconds}
    store.keep(piece, header, arrays, compress=False)


def _recalled(store: Pieces, name: str, device: torch.device) -> _Done | None:
    """Return a block that was done before, None if it was not."""
    piece = store.recall(name)
    if piece is None:
        return None
    header, arrays = piece
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    kinds = [
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("weights ", "mask ")
    ]
    records = [rebuilt(LayerRecord, body) for body in header["records"]]
    return _Done(weights=kinds[0], masks=kinds[1], records=records, seconds=header["seconds"])


def _fingerprint(
    network: nn.Module,
    blocks: Sequence[Block],
    calibration: Calibration,
    sparsity: Sparsity,
    recipe: LayerRecipe,
) -> dict[str, Any]:
    """Return everything that decides the result, as plain values."""
    state, fed = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        state.update(name.encode())
        absorb_tensor(state, tensor)
    for batch in calibration.batches:
        absorb_tensor(fed, batch.hidden)
        if batch.positions is not None:
            absorb_tensor(fed, batch.positions)
    return {
        "format": FORMAT,
        "network": state.hexdigest(),
        "inputs": fed.hexdigest(),
        "layers": [layer.name for block in blocks for layer in block.layers],
        "sparsity": sparsity,
        "recipe": plain(recipe),
        "threads": torch.get_num_threads(),
        "versions": {name: found for name, found in versions().items() if name in ("python", *LIBRARIES)},
    }
