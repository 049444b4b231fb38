"""What a run has done so far: rows, input moments, sets of blocks, certificates, stages, the result.

Each of these steps asks here before it computes; what lies between them is done again, to the same bits.
Without a directory nothing is kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cbs_opt.certify.files import BLOCK, CERTIFICATES, load_certificates, save_certificates
from cbs_opt.curvature.journal import Journal, NoJournal
from cbs_opt.network.partition import Partition
from cbs_opt.report.files import REPORT_JSON, read_json
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.choices import ChoiceLedger
from cbs_opt.runs.folder import Nowhere, Pieces, RunStore
from cbs_opt.runs.rows import RowJournal
from formulations.errors import InstanceFormatError
from formulations.files import sealed_json, write_atomically

PathLike = str | os.PathLike[str]
RESULT = "result"
STEPS = ("rows_*", "moments*", "selection_*", "certificate_*")
"""Names of pieces that a finished run no longer needs."""

log = logging.getLogger(__name__)


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

    @property
    def pieces(self) -> Pieces:
        """Where stages are kept, see `cbs_opt.stages.state`."""
        return self._pieces

    def rows(self, step: str = "") -> Journal:
        """Return the journal of the gradient rows of a step."""
        return NoJournal() if self._store is None else RowJournal(self._store, f"rows{step}")

    def moments(self, compute: Callable[[], dict[str, Tensor]], step: str = "") -> dict[str, Tensor]:
        """Return the second moments of layer inputs, computed unless they are stored."""
        name = f"moments{step}"
        piece = self._pieces.recall(name)
        if piece is None:
            moments = compute()
            arrays = {key: value.cpu().numpy() for key, value in moments.items()}
            self._pieces.keep(name, {}, arrays, compress=False)
            return moments
        return {key: torch.from_numpy(array).to(self._device) for key, array in piece[1].items()}

    def selection(self, number: int, sizes: Sequence[int]) -> ChoiceLedger:
        """Return the ledger of the sets of one selection; `sizes` are those of the blocks."""
        return ChoiceLedger(self._pieces, f"selection_{number:04d}", sizes, self._device)

    def certificate_path(self, number: int) -> Path | None:
        """Return where the certified solution of a block is; None where nothing is kept."""
        return None if self._store is None else self._store.directory / f"certificate_{number:05d}.npz"

    def forget_steps(self) -> None:
        """Remove what led to a result that is on disk."""
        for pattern in STEPS:
            self._pieces.drop(pattern)

    def finish(self, weights: Tensor, keep: Tensor, report: PruneReport, *, steps_stay: bool) -> None:
        """Put the result on disk; the steps on the way to it go, unless they are to stay."""
        if self._store is None:
            return
        directory = self._store.directory
        fingerprints = [block.fingerprint for block in report.blocks]
        save_certificates(fingerprints, report.certificates, directory / CERTIFICATES)
        write_atomically(directory / REPORT_JSON, sealed_json(report.to_dict()))
        # Last: where it is, the rest is complete.
        self._store.keep(RESULT, {}, {"weights": weights.double().cpu().numpy(), "keep": keep.cpu().numpy()})
        if not steps_stay:
            self.forget_steps()

    def finished(self, partition: Partition, block_dir: PathLike | None) -> tuple[Tensor, PruneReport] | None:
        """Return weights and report of a finished run; None if it is not, or a file of it is damaged.

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
