"""The state of a run between two stages, and what is kept of it in the folder of the run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from cbs_opt.report.parts import StageRecord
from cbs_opt.runs.folder import Pieces, in_numpy
from cbs_opt.system.plain import plain, rebuilt

log = logging.getLogger(__name__)

OTHERS = "others."
"""What the names of tensors beside the weights begin with on disk."""
FIELDS = ("stages", "damping", "update_damping", "rate_kind", "rate", "decay", "passes", "samples")


@dataclass(frozen=True, kw_only=True, eq=False)
class StageState:
    """All that a run needs to go on after a number of `stages`.

    `weights` (n,) are float64, `keep` (n,) is True where kept. `damping` and `update_damping` are the centres
    of the next grids, for steps that prune and for updates alone, in the units of the run's options; None
    before the first step. `rate_kind`, `rate` and `decay` are the `Rate` of the next fine-tuning, empty and 0
    before the first one. `passes` counts how often the data were read, `samples` those
    differentiated. `others` are new tensors beside the weights, by name: batch-norm buffers that were
    estimated on the way, biases and norms that moved.
    """

    stages: int
    weights: Tensor
    keep: Tensor
    damping: float | None = None
    update_damping: float | None = None
    rate_kind: str = ""
    rate: float = 0.0
    decay: float = 0.0
    passes: int = 0
    samples: int = 0
    records: tuple[StageRecord, ...] = ()
    others: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class StageResult:
    """What `on_stage` is given when a stage is done.

    `stage` counts from 0, `stages` is how many there are. `network` is the network as it is now, to evaluate
    or to copy; valid during the call. The caller's own is untouched until the end of the run. `weights` and
    `keep` are weights and boolean masks (True = kept) by parameter name, `records` the steps of this stage.
    """

    stage: int
    stages: int
    sparsity: float
    network: nn.Module
    weights: dict[str, Tensor]
    keep: dict[str, Tensor]
    records: tuple[StageRecord, ...]


def keep_stage(pieces: Pieces, state: StageState) -> None:
    """Put the state after a stage on disk; tensors in half precision as float32, which holds them."""
    records = [plain(asdict(record)) for record in state.records]
    header = {**{name: getattr(state, name) for name in FIELDS}, "records": records}
    arrays = {"weights": state.weights.cpu().numpy(), "keep": state.keep.cpu().numpy()}
    arrays |= {f"{OTHERS}{name}": in_numpy(value) for name, value in state.others.items()}
    pieces.keep(_name(state.stages), header, arrays)


def stored_stages(pieces: Pieces, device: torch.device) -> Iterator[StageState]:
    """Yield the states on disk, from the first stage on, up to the first one missing or damaged."""
    stages = 1
    while (piece := pieces.recall(_name(stages))) is not None:
        header, arrays = piece
        try:
            state = StageState(
                weights=torch.tensor(arrays["weights"], device=device),
                keep=torch.tensor(arrays["keep"], device=device),
                records=tuple(rebuilt(StageRecord, entry) for entry in header["records"]),
                others={
                    name.removeprefix(OTHERS): torch.tensor(value, device=device)
                    for name, value in arrays.items()
                    if name.startswith(OTHERS)
                },
                **{name: header[name] for name in FIELDS},
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("stage %d is none of this release (%s); it is made again", stages, error)
            return
        yield state
        stages += 1


def _name(stages: int) -> str:
    return f"stage_{stages:04d}"
