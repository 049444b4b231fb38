"""What a run has done so far: rows, input moments, sets of blocks, certificates, stages, the result.

Each of these steps asks here before it computes, a search of a large block at each of its moves; what lies
between them is done again, to the same bits.
Without a directory nothing is kept.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbs_opt.certify.files import BLOCK, CERTIFICATES, load_certificates, save_certificates
from cbs_opt.curvature.fisher import Journal
from cbs_opt.errors import RunMismatchError
from cbs_opt.network.data import Batch
from cbs_opt.network.partition import Partition
from cbs_opt.report.files import REPORT_JSON, read_json
from cbs_opt.report.record import PruneReport
from cbs_opt.runs.fingerprint import absorb_batch
from cbs_opt.runs.folder import Latest, Piece, Pieces, RunStore, Series, in_numpy
from cbs_opt.select.choice import Choice, Ledger, SearchJournal
from cbs_opt.system.progress import SILENT, Progress
from formulations.errors import InstanceFormatError
from formulations.files import sealed_json, write_atomically
from formulations.solution import Limit

PathLike = str | os.PathLike[str]
RESULT = "result"
OTHERS = "others."
"""Before the names of batch-norm buffers in the result."""
STEPS = ("rows_*", "moments*", "selection_*", "certificate_*")
"""Names of pieces that a finished run no longer needs."""
NUMBERS = ("initial_value", "iterations", "locally_optimal", "seconds", "bound")
"""Fields of a choice that are numbers, booleans or None."""
MOST_BYTES = 1 << 26
"""Rows that wait to be written: 64 MiB, or those of one chunk."""

log = logging.getLogger(__name__)


class RowJournal(Journal):
    """What is on disk of the rows of one pass over the data; a killed run loses a few seconds of them.

    Every piece has the rows since the last one, not yet scaled, the sum of gradients so far, and the digest
    of all samples so far. The samples of rows that are there are read again and compared, not differentiated:
    other samples, or chunks of other sizes, raise `RunMismatchError`.
    """

    def __init__(self, series: Series) -> None:
        self._series = series
        self._digest = hashlib.sha256()
        self._samples = 0
        self._expected = ""
        self._first = 0
        self._waiting: list[Tensor] = []

    def restore(self, gradient: Tensor) -> Iterator[Tensor]:
        for header, arrays in self._series.recall():
            if header["first"] != self._first:
                return
            yield torch.from_numpy(arrays["rows"]).to(gradient)
            self._first += len(arrays["rows"])
            gradient.copy_(torch.from_numpy(arrays["gradient"]))
            self._samples, self._expected = header["samples"], header["digest"]

    def seen(self, part: Batch, samples: int) -> bool:
        absorb_batch(self._digest, part)
        if samples >= self._samples:
            return False
        after = samples + part.size
        if after > self._samples or (after == self._samples and self._digest.hexdigest() != self._expected):
            raise self._other_samples()
        return True

    def take(self, rows: Tensor) -> None:
        self._waiting.append(rows.cpu().clone())

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        if done and samples < self._samples:
            raise self._other_samples()
        size = sum(rows.numel() * rows.element_size() for rows in self._waiting)
        if not size or not (done or self._series.due or size >= MOST_BYTES):
            return
        rows = torch.cat(self._waiting)
        header = {"first": self._first, "samples": samples, "digest": self._digest.hexdigest()}
        arrays = {"rows": rows.numpy(), "gradient": gradient.cpu().numpy()}
        self._series.add(header, arrays, compress=False)
        self._first += len(rows)
        self._waiting = []

    def _other_samples(self) -> RunMismatchError:
        found = (
            f"the first {self._samples} samples are not those of the gradient rows, or come in other batches"
        )
        remedy = "pass the same data in the same order, or use an empty run_dir"
        return RunMismatchError("data", found, remedy)


class ChoiceLedger(Ledger):
    """The choices of one selection that were made, and where further ones are put: no block is solved twice.

    `name` is that of its pieces in `store`, `sizes` are the weights in each block; sets are read to `device`.
    """

    def __init__(
        self, store: Pieces, name: str, sizes: Sequence[int], device: torch.device, progress: Progress
    ) -> None:
        super().__init__(progress)
        self._store, self._name, self._device = store, name, device
        self._series = Series(store, name)
        self._sizes = sizes
        self._waiting: dict[int, Choice] = {}
        self._known: dict[int, Choice] = {}
        for piece in self._series.recall():
            self._known |= _decoded(piece, sizes, device)

    def journal(self, index: int) -> SearchJournal:
        return StateJournal(self._store, self._name, index, self._device, self.progress)

    def choice(self, index: int) -> Choice | None:
        """Return the choice for a block, if it was made."""
        return self._known.get(index)

    @property
    def complete(self) -> bool:
        """Whether every block has its choice."""
        return len(self._known) == len(self._sizes)

    def choices(self) -> list[Choice]:
        """All of them in order."""
        return [self._known[index] for index in range(len(self._sizes))]

    def add(self, index: int, choice: Choice) -> None:
        """Put down the choice for a block; it is on disk when enough work has come together."""
        self._waiting[index] = choice
        if self._series.due:
            self._save()

    def close(self, choices: Sequence[Choice]) -> None:
        """All blocks are done: put on disk what is not there yet."""
        self._waiting = {index: c for index, c in enumerate(choices) if index not in self._known}
        self._save()

    def _save(self) -> None:
        if self._waiting:
            self._series.add(*_encoded(self._waiting))
            self._known |= self._waiting
            self._waiting = {}


class StateJournal(SearchJournal):
    """The last state of a search of one block, kept in a piece of that search in `store`.

    `name` is that of the piece, `block` the number of the block: the next block takes over the piece.
    """

    def __init__(
        self, store: Pieces, name: str, block: int, device: torch.device, progress: Progress
    ) -> None:
        super().__init__(progress)
        self._store, self._name, self._block, self._device = store, name, block, device
        self._latest = Latest(store, name)

    def named(self, name: str) -> SearchJournal:
        return StateJournal(self._store, f"{self._name}_{name}", self._block, self._device, self.progress)

    def recall(self) -> dict[str, Any]:
        piece = self._latest.recall()
        if piece is None or piece[0]["block"] != self._block:
            return {}
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in piece[1].items()}
        return {**piece[0]["numbers"], **tensors}

    def keep(self, state: Mapping[str, Any]) -> None:
        if not self._latest.due:
            return
        arrays = {name: value.cpu().numpy() for name, value in state.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in state.items() if name not in arrays}
        self._latest.replace({"block": self._block, "numbers": numbers}, arrays)


def _encoded(choices: dict[int, Choice]) -> Piece:
    """Header and arrays of some choices by the number of their block; NaN stands for None."""
    endings = [(choice.status, choice.limit and choice.limit.value) for choice in choices.values()]
    distinct = list(dict.fromkeys(endings))
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "index": np.array(list(choices), dtype=np.float64),
        "ending": np.array([distinct.index(ending) for ending in endings], dtype=np.float64),
        "keep": torch.cat([choice.keep for choice in choices.values()]).cpu().numpy(),
    }
    for name in NUMBERS:
        values = [getattr(choice, name) for choice in choices.values()]
        arrays[name] = np.array([math.nan if value is None else float(value) for value in values])
    return {"endings": distinct}, arrays


def _decoded(piece: Piece, sizes: Sequence[int], device: torch.device) -> dict[int, Choice]:
    header, arrays = piece
    indices = [int(index) for index in arrays["index"]]
    sets = torch.split(torch.from_numpy(arrays["keep"]).to(device), [sizes[index] for index in indices])
    choices = {}
    for row, (index, keep) in enumerate(zip(indices, sets, strict=True)):
        status, limit = header["endings"][int(arrays["ending"][row])]
        initial, iterations, optimal, seconds, bound = (float(arrays[name][row]) for name in NUMBERS)
        choices[index] = Choice(
            keep=keep,
            initial_value=None if math.isnan(initial) else initial,
            iterations=int(iterations),
            locally_optimal=None if math.isnan(optimal) else bool(optimal),
            seconds=seconds,
            bound=None if math.isnan(bound) else bound,
            status=status,
            limit=None if limit is None else Limit(limit),
        )
    return choices


class RunProgress:
    """The steps of one run that are done, kept in `store`; by default nowhere.

    Tensors are read to `device`, by default the CPU. `pieces` is where stages are kept, see
    `cbs_opt.stages.state`.
    """

    def __init__(self, store: RunStore | None = None, device: torch.device | None = None) -> None:
        self._store = store
        self.pieces = Pieces() if store is None else store
        self._device = torch.device("cpu") if device is None else device

    def rows(self, step: str = "") -> Journal:
        """Return the journal of the gradient rows of a step."""
        return Journal() if self._store is None else RowJournal(Series(self._store, f"rows{step}"))

    def moments(self, compute: Callable[[], dict[str, Tensor]], step: str = "") -> dict[str, Tensor]:
        """Return the second moments of layer inputs, computed unless they are stored."""
        name = f"moments{step}"
        piece = self.pieces.recall(name)
        if piece is None:
            moments = compute()
            arrays = {key: value.cpu().numpy() for key, value in moments.items()}
            self.pieces.keep(name, {}, arrays, compress=False)
            return moments
        return {key: torch.from_numpy(array).to(self._device) for key, array in piece[1].items()}

    def selection(
        self, number: int, sizes: Sequence[int], *, step: str = "", progress: Progress = SILENT
    ) -> ChoiceLedger:
        """Return the ledger of the sets of one selection of a step; `sizes` are those of the blocks."""
        return ChoiceLedger(self.pieces, f"selection{step}_{number:04d}", sizes, self._device, progress)

    def certificate_path(self, number: int) -> Path | None:
        """Return where the certified solution of a block is; None where nothing is kept."""
        return None if self._store is None else self._store.directory / f"certificate_{number:05d}.npz"

    def forget_steps(self) -> None:
        """Remove what led to a result that is on disk."""
        for pattern in STEPS:
            self.pieces.drop(pattern)

    def finish(
        self,
        weights: Tensor,
        keep: Tensor,
        others: Mapping[str, Tensor],
        report: PruneReport,
        *,
        steps_stay: bool,
    ) -> None:
        """Put the result on disk; the steps on the way to it go, unless they are to stay."""
        if self._store is None:
            return
        directory = self._store.directory
        fingerprints = [block.fingerprint for block in report.blocks]
        save_certificates(fingerprints, report.certificates, directory / CERTIFICATES)
        write_atomically(directory / REPORT_JSON, sealed_json(report.to_dict()))
        # Last: where it is, the rest is complete.
        arrays = {"weights": weights.double().cpu().numpy(), "keep": keep.cpu().numpy()}
        arrays |= {f"{OTHERS}{name}": in_numpy(value) for name, value in others.items()}
        self._store.keep(RESULT, {}, arrays)
        if not steps_stay:
            self.forget_steps()

    def finished(
        self, partition: Partition, block_dir: PathLike | None
    ) -> tuple[Tensor, dict[str, Tensor], PruneReport] | None:
        """Return weights, other tensors and report of a finished run; None if it is none, or damaged.

        With `block_dir` it is finished only if the data of all blocks are there.
        """
        piece = self.pieces.recall(RESULT)
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
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in piece[1].items()}
        others = {
            name.removeprefix(OTHERS): tensor for name, tensor in tensors.items() if name.startswith(OTHERS)
        }
        return tensors["weights"], others, report
