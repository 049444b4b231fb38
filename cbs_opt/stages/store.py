"""The state after every stage, kept as pieces of the folder of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict

import torch

from cbs_opt.report.parts import StageRecord
from cbs_opt.runs.folder import Pieces
from cbs_opt.stages.state import StageState
from cbs_opt.system.plain import plain, rebuilt

log = logging.getLogger(__name__)

FIELDS = ("stages", "damping", "update_damping", "passes", "samples")


def keep_stage(pieces: Pieces, state: StageState) -> None:
    """Put the state after a stage on disk."""
    records = [plain(asdict(record)) for record in state.records]
    header = {**{name: getattr(state, name) for name in FIELDS}, "records": records}
    arrays = {"weights": state.weights.cpu().numpy(), "keep": state.keep.cpu().numpy()}
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
                **{name: header[name] for name in FIELDS},
            )
        except (KeyError, TypeError, ValueError) as error:
            log.warning("stage %d is none of this release (%s); it is made again", stages, error)
            return
        yield state
        stages += 1


def _name(stages: int) -> str:
    return f"stage_{stages:04d}"
