"""What pruning layer by layer did: every layer with its loss, the masks, and the files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from cbs_opt.layers.blocks import NOT_LINEAR, NOT_REACHED
from cbs_opt.layers.certificates import LayerBounds
from cbs_opt.layers.divergence import DivergenceRecord
from cbs_opt.layers.recipe import LayerRecipe
from cbs_opt.network.eligible import LeftOut, unwrapped
from cbs_opt.network.masks import save_masks
from cbs_opt.select.layer_program.support import Sparsity
from cbs_opt.system.memory import readable
from cbs_opt.system.plain import plain
from cbs_opt.system.versions import library_versions
from formulations.files import sealed_json, write_atomically

MODEL_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
REPORT_FILE = "layers.json"
KIND = "cbs-opt layers"
PackedMask = tuple[tuple[int, ...], NDArray[np.uint8]]
"""Shape and bits of a mask."""
ZEROS = (
    "Zeros do not make a dense product faster. What does: 2:4 with semi-structured kernels on a GPU "
    "(torch.sparse.to_sparse_semi_structured), a sparse runtime at high sparsity, or removing whole channels."
)


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One layer that was pruned.

    Parameters
    ----------
    name : str
        Of its weight in the network.
    block : int
        Number of the block that it is in.
    rows, inputs : int
        Outputs and inputs of the layer.
    pruned : int
        Weights that are zero now.
    loss : float
        Of the layer program, ``1/2 sum (w - u) H (w - u)`` over rows, relative to that of pruning everything.
    output_error : float
        Mean squared distance of the outputs on the calibration tokens from those that are aimed at, relative
        to their mean square.
    distance : float
        Between the weights that were pruned and those of the layer, relative: what makes up for the losses
        of the layers before, where the recipe is asymmetric.
    proved : int
        Rows in which no swap of a kept against a pruned weight lowers the loss. The others were not examined.
    tokens : int
        Inputs that the Gram matrix is the mean of.
    shrinkage : float
        Share of the Gram matrix that gave way to a multiple of the identity.
    dead : int
        Inputs that were zero on all tokens.
    seconds : float
        Processor time of its program. What layers share by their Gram matrix counts with the first of them.
    bounds : LayerBounds, optional
        How far from optimal a sample of its rows can be; before weights moved on the divergence.
    """

    name: str
    block: int
    rows: int
    inputs: int
    pruned: int
    loss: float
    output_error: float
    distance: float
    proved: int
    tokens: int
    shrinkage: float
    dead: int
    seconds: float
    bounds: LayerBounds | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayersReport:
    """What `prune_layers` did.

    Parameters
    ----------
    sparsity : float or str
        As it was asked for.
    recipe : LayerRecipe
    layers : tuple of LayerRecord
        In the order in which they were pruned.
    left_out : tuple of LeftOut
        Parameters that were not pruned, each with the reason.
    tokens : int
        Calibration tokens.
    written : int
        Tokens that the network wrote itself, which its layers were fed beside those.
    unwritten : str
        Why there are none though the recipe of the name has some; empty if there are.
    seconds : float
        Processor time of all of it, forward passes included; of blocks that an earlier call did, what these
        took then.
    peak_memory : int or None
        Largest resident memory in bytes, the network included; None where the system does not say.
    moved : tuple of DivergenceRecord
        What moving the kept weights on the divergence came to in each stage; () without it. `layers` are
        those of the last stage, with losses before their weights moved.
    scale_tokens : int
        Tokens that were differentiated to find out what the outputs of layers matter.
    """

    sparsity: Sparsity
    recipe: LayerRecipe
    layers: tuple[LayerRecord, ...]
    left_out: tuple[LeftOut, ...]
    tokens: int
    written: int
    unwritten: str
    seconds: float
    peak_memory: int | None
    moved: tuple[DivergenceRecord, ...]
    scale_tokens: int
    packed: Mapping[str, PackedMask]
    """Shape and bits of every mask, by name."""

    @property
    def masks(self) -> dict[str, Tensor]:
        """Kept masks by parameter name, bool, True = kept, in the shapes of the parameters."""
        return {name: unpacked(shape, bits) for name, (shape, bits) in self.packed.items()}

    @property
    def zeros(self) -> float:
        """Share of zeros over the layers that were pruned."""
        size = sum(layer.rows * layer.inputs for layer in self.layers)
        return sum(layer.pruned for layer in self.layers) / max(1, size)

    @property
    def differentiated(self) -> int:
        """Tokens that were differentiated in all, each counted as often as it was."""
        return self.scale_tokens + sum(step.tokens for step in self.moved)

    @property
    def table(self) -> pd.DataFrame:
        """One line a layer, with the fields of `LayerRecord` as columns.

        In the place of `bounds` are "bounded" rows, "gap", the mean of these, and "largest_gap".
        """
        lines = []
        for layer in self.layers:
            line = plain(layer)
            bounds = layer.bounds
            del line["bounds"]
            line["bounded"] = 0 if bounds is None else len(bounds.rows)
            line["gap"] = np.nan if bounds is None else bounds.mean
            line["largest_gap"] = np.nan if bounds is None else bounds.largest
            lines.append(line)
        return pd.DataFrame(lines)

    def __str__(self) -> str:
        rows, proved = (sum(getattr(layer, name) for layer in self.layers) for name in ("rows", "proved"))
        loss = np.mean([layer.loss for layer in self.layers])
        memory = "" if self.peak_memory is None else f", {readable(self.peak_memory)} at most"
        bounded = [layer.bounds for layer in self.layers if layer.bounds is not None]
        sampled = ""
        if bounded:
            gaps = np.concatenate([bounds.gaps for bounds in bounded])
            sampled = (
                f"{gaps.size} rows drawn at random from {len(bounded)} layers and bounded: at most "
                f"{gaps.mean():.1%} of the loss of their layer programs could be saved on average, "
                f"{gaps.max():.1%} in one row; for all rows of a layer see layers[i].bounds.interval.\n"
            )
        moved = "".join(f"{step}\n" for step in self.moved)
        written = f" and {self.written} that the network wrote" if self.written else ""
        silent = f"No text was written beside the data: {self.unwritten}.\n" if self.unwritten else ""
        return (
            f"{len(self.layers)} layers at {self.sparsity} by {self.recipe.method}: {self.zeros:.4f} zeros, "
            f"mean relative loss {loss:.4f}; {proved} of {rows} rows proved 1-swap optimal, the others not "
            f"examined; {self.tokens} tokens{written}, {self.differentiated} differentiated, "
            f"{self.seconds:.1f} s of processor time{memory}.\n"
            f"{self._kept_whole()}{silent}{sampled}{moved}{ZEROS}"
        )

    def _kept_whole(self) -> str:
        """Return a line for each reason for which matrices in the blocks are as they were."""
        lines = []
        for reason in (NOT_LINEAR, NOT_REACHED):
            left = [entry for entry in self.left_out if entry.reason == reason and len(entry.shape) > 1]
            if left:
                count = sum(math.prod(entry.shape) for entry in left)
                lines.append(
                    f"{count:,} weights of {len(left)} parameters in the blocks, {left[0].name} the first, "
                    f"are as they were: {reason}.\n"
                )
        return "".join(lines)

    def save(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        """Write the network as plain dense tensors with zeros, the masks beside them, and this report.

        ``model.safetensors``, without tensors that the network ties to others; ``masks.safetensors``, see
        `save_masks`; ``layers.json``. Each file appears whole or not at all.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        seen: set[tuple[int, tuple[int, ...], int]] = set()
        for name, tensor in unwrapped(model).state_dict().items():
            key = tensor.data_ptr(), tuple(tensor.shape), tensor.storage_offset()
            if key not in seen or not tensor.numel():
                tensors[name] = tensor.detach().cpu().contiguous()
            seen.add(key)
        write_atomically(path / MODEL_FILE, save(tensors, metadata={"format": "pt"}))
        save_masks(path / MASKS_FILE, self.masks)
        document = {
            "format": KIND,
            "versions": library_versions(),
            "sparsity": self.sparsity,
            "recipe": plain(self.recipe),
            "layers": plain(self.layers),
            "left_out": plain(self.left_out),
            "tokens": self.tokens,
            "written": self.written,
            "unwritten": self.unwritten,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "moved": plain(self.moved),
            "scale_tokens": self.scale_tokens,
            "note": ZEROS,
        }
        write_atomically(path / REPORT_FILE, sealed_json(document))


def packed(keep: Tensor) -> PackedMask:
    """Return shape and bits of a mask: an eighth of its memory."""
    return tuple(keep.shape), np.packbits(keep.detach().cpu().numpy().reshape(-1))


def unpacked(shape: tuple[int, ...], bits: NDArray[np.uint8]) -> Tensor:
    """Return the mask (bool) of its shape and bits."""
    size = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits, count=size).astype(bool)).view(shape)
