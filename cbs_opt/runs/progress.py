"""What a run has found so far, step by step: rows, input moments, sets, losses, certificates, the result.

Each step asks here before it computes. Without a directory nothing is kept and nothing is known.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cbs_opt.certify.files import BLOCK, CERTIFICATES, load_certificates, save_certificates
from cbs_opt.network.partition import Partition
from cbs_opt.report.files import REPORT_JSON, read_json
from cbs_opt.report.parts import StageRecord
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.choices import ChoiceLedger
from cbs_opt.runs.folder import Nowhere, Pieces, RunStore, Series
from cbs_opt.runs.rows import RowJournal
from cbs_opt.stages.state import StepState
from cbs_opt.system.plain import plain
from formulations.errors import InstanceFormatError
from formulations.files import sealed_json, write_atomically

PathLike = str | os.PathLike[str]
RESULT = "result"
STEPS = ("rows_*", "moments*", "selection_*", "losses_*", "certificate_*", "step_*")
"""Names of pieces that a finished run no longer needs."""

log = logging.getLogger(__name__)


class LossLedger:
    """Training losses of the networks that one selection gives.

    Parameters
    ----------
    pieces : Pieces
    name : str
    count : int
        How many there are.
    """

    def __init__(self, pieces: Pieces, name: str, count: int) -> None:
        self._series = Series(pieces, name)
        self._count = count
        self._known: dict[int, float] = {}
        self._waiting: dict[int, float] = {}
        for _, arrays in self._series.recall():
            self._known |= dict(zip(map(int, arrays["index"]), map(float, arrays["loss"]), strict=True))

    def lowest(self) -> float | None:
        """The lowest of all, where NaN counts as infinite; None unless all are known."""
        if len(self._known) < self._count:
            return None
        return min(math.inf if math.isnan(loss) else loss for loss in self._known.values())

    def loss(self, index: int, compute: Callable[[], float]) -> float:
        """The loss of one network, computed if it is not known."""
        if index not in self._known:
            self._known[index] = self._waiting[index] = compute()
            if self._series.due or len(self._known) == self._count:
                arrays = {
                    "index": np.array(list(self._waiting), dtype=np.float64),
                    "loss": np.array(list(self._waiting.values()), dtype=np.float64),
                }
                self._series.add({}, arrays)
                self._waiting = {}
        return self._known[index]


class RunProgress:
    """The steps of one run that are done.

    Parameters
    ----------
    store : RunStore, optional
        Where they are kept; by default nowhere.
    device : torch.device, default CPU
        Where tensors are read to.
    """

    def __init__(self, store: RunStore | None = None, device: torch.device | None = None) -> None:
        self._store = store
        self._pieces: Pieces = Nowhere() if store is None else store
        self._device = torch.device("cpu") if device is None else device

    def rows(self, step: str = "") -> RowJournal | None:
        """Of the gradient rows of a step; None where nothing is kept."""
        return None if self._store is None else RowJournal(self._store, f"rows{step}")

    def moments(self, compute: Callable[[], dict[str, Tensor]], step: str = "") -> dict[str, Tensor]:
        """The second moments of layer inputs, computed if they are not known."""
        name = f"moments{step}"
        piece = self._pieces.recall(name)
        if piece is None:
            found = compute()
            if self._store is not None:
                arrays = {key: value.cpu().numpy() for key, value in found.items()}
                self._store.keep(name, {}, arrays, compress=False)
            return found
        return {key: torch.from_numpy(array).to(self._device) for key, array in piece[1].items()}

    def selection(self, number: int, sizes: Sequence[int]) -> ChoiceLedger:
        """Of the sets of one selection; `sizes` are those of the blocks."""
        return ChoiceLedger(self._pieces, f"selection_{number:04d}", sizes, self._device)

    def losses(self, number: int, count: int) -> LossLedger:
        """Of the networks that one selection gives."""
        return LossLedger(self._pieces, f"losses_{number:04d}", count)

    def certificate_path(self, number: int) -> Path | None:
        """Where the certified solution of a block is; None where nothing is kept."""
        return None if self._store is None else self._store.directory / f"certificate_{number:05d}.npz"

    def step(self, name: str) -> StepState | None:
        """The state after a step within a stage, if it was done."""
        piece = self._pieces.recall(name)
        if piece is None:
            return None
        header, arrays = piece
        return StepState(
            weights=torch.from_numpy(arrays["weights"]).to(self._device),
            keep=torch.from_numpy(arrays["keep"]).to(self._device),
            damping=header["damping"],
            update_damping=header["update_damping"],
            passes=header["passes"],
            record=StageRecord.from_plain(header["record"]),
        )

    def keep_step(self, name: str, state: StepState) -> None:
        """Put the state after a step on disk."""
        header = {
            "damping": state.damping,
            "update_damping": state.update_damping,
            "passes": state.passes,
            "record": plain(state.record),
        }
        arrays = {"weights": state.weights.cpu().numpy(), "keep": state.keep.cpu().numpy()}
        self._pieces.keep(name, header, arrays)

    def forget_steps(self) -> None:
        """Remove what led to a result that is on disk."""
        for pattern in STEPS:
            self._pieces.drop(pattern)

    def finish(self, weights: Tensor, keep: Tensor, report: PruneReport, *, steps_stay: bool) -> None:
        """Put the result on disk; the steps on the way to it go, unless they are to stay."""
        if self._store is None:
            return
        directory = self._store.directory
        save_certificates(
            [block.fingerprint for block in report.blocks], report.certificates, directory / CERTIFICATES
        )
        write_atomically(directory / REPORT_JSON, sealed_json(report.to_dict()))
        # Last: where it is, the rest is complete.
        self._store.keep(RESULT, {}, {"weights": weights.double().cpu().numpy(), "keep": keep.cpu().numpy()})
        if not steps_stay:
            self.forget_steps()

    def finished(self, partition: Partition, block_dir: PathLike | None) -> tuple[Tensor, PruneReport] | None:
        """Weights and report of a run that is finished; None if it is not, or a file of it is damaged.

        With `block_dir` it is finished only if the data of all blocks are there.
        """
        piece = self._pieces.recall(RESULT)
        if self._store is None or piece is None:
            return None
        directory = self._store.directory
        try:
            report = PruneReport.from_dict(
                read_json(directory / REPORT_JSON),
                masks=partition.keep_by_parameter(torch.from_numpy(piece[1]["keep"])),
                certificates=load_certificates(directory / CERTIFICATES),
            )
        except InstanceFormatError as error:
            log.warning("%s; the run is finished again", error.found)
            return None
        files = 0 if block_dir is None else len(list(Path(block_dir).glob(f"*{BLOCK}")))
        wanted = 0 if report.certified is None else len(report.blocks)
        if len(report.certificates) < wanted or (block_dir is not None and files < wanted):
            return None
        return torch.from_numpy(piece[1]["weights"]).to(self._device), report
