"""Pruning a network layer by layer, block after block: `prune_layers`."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.layers.blocks import Block, find_blocks
from cbs_opt.layers.calibration import Calibration, calibrate
from cbs_opt.layers.recipe import LayerRecipe, layer_recipe
from cbs_opt.layers.record import LayerRecord, LayersReport, PackedMask, packed
from cbs_opt.network.data import Data, device_of
from cbs_opt.network.eligible import Globs, LeftOut, unwrapped
from cbs_opt.network.state import evaluation_mode, kept, require_usable
from cbs_opt.network.trial import plain_attention, write_layers
from cbs_opt.runs.fingerprint import absorb_tensor
from cbs_opt.runs.folder import Pieces, RunStore
from cbs_opt.select.layer_program.methods import layer_method
from cbs_opt.select.layer_program.program import LayerHessian, LayerProgram
from cbs_opt.select.layer_program.support import Sparsity, checked_sparsity, support_of
from cbs_opt.system.checks import whole_number, within
from cbs_opt.system.memory import peak, reset_peak
from cbs_opt.system.plain import plain
from cbs_opt.system.progress import Progress, reporting
from cbs_opt.system.versions import LIBRARIES, versions
from formulations.errors import ShapeError

FORMAT = "cbs-opt layers run"
NOT_REACHED = "no calibration token reached it"


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
    run_dir: str | os.PathLike[str] | None = None,
    progress: Progress | bool = True,
) -> LayersReport:
    """Prune the linear layers of a network of blocks in place, by what each layer is fed.

    For networks whose gradients do not fit: only forward passes are made, of one block at a time. Each row of
    a weight is pruned so that the layer's outputs change least on the calibration data (see
    `cbs_opt.select.layer_program`). Blocks go in order, each is fed by the pruned ones before it.

    Parameters
    ----------
    model : nn.Module
        With a list of like blocks, as transformers have. Changed in place, each block when it is done: what
        ends the call early leaves the blocks before pruned, the others as they were. It runs in evaluation
        mode, and is given its modes back.
    data : tensor of token ids (N, T), DataLoader, or anything that `prune` takes as data
        Labels are not looked at; of batches with an ``attention_mask`` padded tokens do not count. Read once,
        in order.
    sparsity : float in [0, 1), or "n:m"
        Share of zeros in every layer, or how many of m consecutive inputs each row keeps ("2:4").
    recipe : "fast" or LayerRecipe, default "fast"
    blocks : str, optional
        Glob of module names, such as "model.layers.*". By default the longest list of like modules.
    ignore : str or sequence of str, optional
        Globs of parameters that are left as they are, such as "*.v_proj.weight". Embeddings, heads and all
        else outside of the blocks are left out in any case; the report lists them.
    samples : int, optional
        Samples of the data to use; all by default.
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
        If no list of like blocks is found, blocks do not follow one another, or share a weight.
    ShapeError
        If m does not divide the inputs of a layer; nothing is changed.
    NonFiniteError
        If a layer is fed NaN or infinity; the layer and the batch are named.
    ArgumentError
        For tokens that the network does not know, and arguments out of their range.
    DataLoaderError, BatchFormatError, EmptyDataError, ForwardError
        If the data cannot be read, or the network cannot run on them.
    RunMismatchError, RunInUseError
        If `run_dir` holds another run, or a network that was pruned already is passed to a run.

    Notes
    -----
    Beside the network there are the hidden states of all tokens, and for one block a Gram matrix of every
    input in float64 and some ten arrays of the size of its largest weight. Two forward passes a block, then
    the method; `LayerRecipe` names what each costs.
    """
    began = time.process_time()
    reset_peak()
    sparsity, chosen, report_to = checked_sparsity(sparsity), layer_recipe(recipe), reporting(progress)
    samples = None if samples is None else whole_number("samples", samples)
    require_usable(model)
    network = unwrapped(model)
    found, left_out = find_blocks(network, blocks, ignore)
    _check_supports(found, sparsity, chosen.budget)
    records: list[LayerRecord] = []
    earlier = 0.0
    packs: dict[str, PackedMask] = {}
    with ExitStack() as stack:
        for context in (kept(network), evaluation_mode(network), plain_attention(), torch.no_grad()):
            stack.enter_context(context)
        calibration = calibrate(network, found, data, samples=samples, chunk_tokens=chosen.chunk_tokens)
        store: Pieces = Pieces()
        if run_dir is not None:
            wanted = _fingerprint(network, found, calibration, sparsity, chosen)
            store = stack.enter_context(RunStore(run_dir, wanted))
        advance = stack.enter_context(report_to.phase("blocks", len(found), unit="block"))
        for number, block in enumerate(found):
            done = _recalled(store, number, device_of(network))
            if done is not None:
                earlier += done.seconds
            else:
                done = _pruned(calibration, number, block, sparsity, chosen)
                _remember(store, number, done)
            layers = {layer.name: layer for layer in block.layers}
            write_layers({name: (layers[name].parameter, new) for name, new in done.weights.items()})
            packs |= {name: packed(keep) for name, keep in done.masks.items()}
            records += done.records
            left_out += tuple(
                LeftOut(name=name, shape=tuple(layer.parameter.shape), reason=NOT_REACHED)
                for name, layer in layers.items()
                if name not in done.weights
            )
            if number + 1 < len(found):
                calibration.advance(number, block.module)
            advance(1)
    return LayersReport(
        sparsity=sparsity,
        recipe=chosen,
        layers=tuple(records),
        left_out=left_out,
        tokens=calibration.tokens,
        seconds=earlier + time.process_time() - began,
        peak_memory=peak(),
        packed=packs,
    )


def _check_supports(blocks: Sequence[Block], sparsity: Sparsity, budget: str) -> None:
    """Raise an error that names the layer if a pattern does not fit the inputs of one."""
    for layer in (layer for block in blocks for layer in block.layers):
        rows, inputs = layer.rows(layer.parameter).shape
        try:
            with within("recipe", "budget"):
                support_of(sparsity, (rows, inputs), budget)
        except ShapeError as error:
            found = f"{layer.name}: {error.found}"
            remedy = f'leave it out, ignore="{layer.name}", or use an m that divides {inputs}'
            raise ShapeError("sparsity", found, remedy) from None


def _pruned(
    calibration: Calibration, number: int, block: Block, sparsity: Sparsity, recipe: LayerRecipe
) -> _Done:
    """Return what becomes of the layers of a block, which is not changed."""
    start = time.process_time()
    sums = calibration.grams(number, block)
    method = layer_method(recipe.method, recipe.options)
    hessians: dict[int, tuple[LayerHessian, float]] = {}
    weights: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    records = []
    for layer in block.layers:
        if layer.name not in sums:
            continue
        began = time.process_time()
        total = sums[layer.name]
        if id(total) not in hessians:
            gram, shrinkage = total.mean(recipe.shrinkage)
            hessians[id(total)] = LayerHessian(gram, recipe.damping, name=layer.name), shrinkage
        hessian, shrinkage = hessians[id(total)]
        rows = layer.rows(layer.parameter.detach())
        support = support_of(sparsity, (rows.shape[0], rows.shape[1]), recipe.budget)
        program = LayerProgram(weights=rows, hessian=hessian, support=support)
        solution = method(program)
        new = solution.weights.to(rows.dtype)
        weights[layer.name], masks[layer.name] = layer.rows(new), layer.rows(solution.keep)
        loss, error = program.relative(new)
        records.append(
            LayerRecord(
                name=layer.name,
                block=number,
                rows=program.rows,
                inputs=hessian.n,
                pruned=int((~solution.keep).sum()),
                loss=loss,
                output_error=error,
                proved=solution.proved,
                tokens=total.tokens,
                shrinkage=shrinkage,
                dead=hessian.dead,
                seconds=time.process_time() - began,
            )
        )
    seconds = time.process_time() - start
    return _Done(weights=weights, masks=masks, records=records, seconds=seconds)


def _remember(store: Pieces, number: int, done: _Done) -> None:
    """Write a block that is done, its weights in float32 or float64, which hold those of every parameter."""
    if not store.writes:
        return
    arrays = {f"mask {name}": keep.cpu().contiguous().numpy() for name, keep in done.masks.items()}
    for name, new in done.weights.items():
        wide = new if new.dtype == torch.float64 else new.float()
        arrays[f"weights {name}"] = wide.cpu().contiguous().numpy()
    header = {"records": plain(done.records), "seconds": done.seconds}
    store.keep(f"block_{number:04d}", header, arrays, compress=False)


def _recalled(store: Pieces, number: int, device: torch.device) -> _Done | None:
    """Return a block that was done before, None if it was not."""
    piece = store.recall(f"block_{number:04d}")
    if piece is None:
        return None
    header, arrays = piece
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    kinds = [
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("weights ", "mask ")
    ]
    records = [LayerRecord(**body) for body in header["records"]]
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
