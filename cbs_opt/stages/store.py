"""The state of a run on disk: one file a stage, each written at once and never again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbs_opt.report.parts import StageRecord
from cbs_opt.runs.folder import RunStore
from cbs_opt.stages.state import StageState
from cbs_opt.system.plain import plain
from formulations.errors import InstanceFormatError
from formulations.files import read_container, write_container

KIND = "cbs-opt stage"
VERSION = 1


class StageStore:
    """Stages of one run in its directory.

    Parameters
    ----------
    store : RunStore
    device : torch.device
        Where states are read to.
    """

    def __init__(self, store: RunStore, *, device: torch.device) -> None:
        self.directory = store.directory
        self.device = device
        self._run = store.run

    def add(self, state: StageState) -> None:
        """Put the state after a stage on disk."""
        header = {
            "format": KIND,
            "version": VERSION,
            "run": self._run,
            "stages": state.stages,
            "damping": state.damping,
            "update_damping": state.update_damping,
            "passes": state.passes,
            "samples": state.samples,
            "records": [plain(asdict(record)) for record in state.records],
        }
        arrays = {"weights": state.weights.cpu().numpy(), "keep": state.keep.cpu().numpy()}
        write_container(self._path(state.stages), header, arrays)

    def states(self) -> Iterator[StageState]:
        """The states on disk, from the first stage on, as far as there is no gap."""
        stages = 1
        while self._path(stages).exists():
            yield self.read(stages)
            stages += 1

    def read(self, stages: int) -> StageState:
        """The state after that many stages.

        Raises
        ------
        InstanceFormatError
            If the file is missing, damaged, or of another stage or run.
        """
        path = self._path(stages)
        header, arrays = read_container(path, KIND, VERSION, largest_bytes=2**40)
        if header.get("stages") != stages or header.get("run", self._run) != self._run:
            found = f"{path} is stage {header.get('stages')} of another run"
            raise InstanceFormatError("run_dir", found, "put back what the run wrote")
        try:
            return StageState(
                stages=stages,
                weights=self._tensor(arrays["weights"]),
                keep=self._tensor(arrays["keep"]),
                damping=header["damping"],
                update_damping=header["update_damping"],
                passes=header["passes"],
                samples=header["samples"],
                records=tuple(StageRecord.from_plain(entry) for entry in header["records"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            found = f"{path} is no stage of this release ({type(error).__name__}: {error})"
            raise InstanceFormatError("run_dir", found, "use an empty directory") from error

    def _path(self, stages: int) -> Path:
        return self.directory / f"stage_{stages:04d}.npz"

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(array, device=self.device)
