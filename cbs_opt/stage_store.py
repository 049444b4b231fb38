"""The state of a run on disk: one file a stage, each written at once and never again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cbs_opt.batches import LossFunction, map_tensors
from cbs_opt.errors import RunMismatchError
from cbs_opt.prune_options import PruneOptions
from cbs_opt.report_format import plain
from cbs_opt.stage_options import StageOptions
from cbs_opt.stage_record import StageRecord, StageState
from formulations.errors import InstanceFormatError
from formulations.files import checksum, json_object, read_container, write_atomically, write_container

PathLike = str | os.PathLike[str]
RUN_FILE = "run.json"
KIND = "cbs-opt stage"
VERSION = 1


def fingerprint(
    model: nn.Module,
    loss_fn: LossFunction,
    options: PruneOptions,
    plan: StageOptions,
    sample: list[tuple[Any, Tensor]],
) -> dict[str, Any]:
    """Everything that decides the result, as plain values that JSON has.

    The weights, buffers and the samples of the first pass over the data go in by their SHA-256, the
    loss function by its name.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(name.encode())
        _absorb(state, tensor)
    data = hashlib.sha256()
    for inputs, labels in sample:
        map_tensors(lambda tensor: _absorb(data, tensor), inputs)
        _absorb(data, labels)
    return {
        "network": state.hexdigest(),
        "data": data.hexdigest(),
        "loss_fn": plain(loss_fn),
        "options": plain(options.settings()),
        "plan": plain(plan),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cbs-opt": version("cbs-opt"),
        },
    }


class StageStore:
    """Stages of one run in a directory.

    Parameters
    ----------
    directory : path
        Made if missing.
    told : mapping
        The fingerprint of the run; written to ``run.json`` by the first run.
    device : torch.device
        Where states are read to.

    Raises
    ------
    RunMismatchError
        If the directory holds another run.
    """

    def __init__(self, directory: PathLike, told: Mapping[str, Any], *, device: torch.device) -> None:
        self.directory = Path(directory)
        self.device = device
        if self.directory.exists() and not self.directory.is_dir():
            raise RunMismatchError("run_dir", f"{directory} is a file", "pass a directory")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / RUN_FILE
        text = json.dumps(told, indent=1, sort_keys=True) + "\n"
        self._run = checksum(json.loads(text))
        if not path.exists():
            write_atomically(path, text.encode())
            return
        try:
            known = json_object(path.read_bytes())
        except (OSError, ValueError) as error:
            found = f"{path} is damaged ({error})"
            raise RunMismatchError("run_dir", found, "use an empty directory") from error
        if known != json.loads(text):
            names = sorted(key for key in {*known, *told} if known.get(key) != json.loads(text).get(key))
            found = f"{directory} holds a run with another {', '.join(names)}"
            raise RunMismatchError(
                "run_dir", found, "repeat the first call exactly, or use an empty directory"
            )

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
                records=tuple(_record(entry) for entry in header["records"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            found = f"{path} is no stage of this release ({type(error).__name__}: {error})"
            raise InstanceFormatError("run_dir", found, "use an empty directory") from error

    def _path(self, stages: int) -> Path:
        return self.directory / f"stage_{stages:04d}.npz"

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.tensor(array, device=self.device)


def _record(entry: Mapping[str, Any]) -> StageRecord:
    """A record from JSON, where losses that are not finite are strings."""
    numbers = ("loss_before", "loss", "best_rejected", "predicted_change")
    values: dict[str, Any] = {
        name: float(value) if name in numbers and value is not None else value
        for name, value in entry.items()
    }
    return StageRecord(**values)


def _absorb(digest: Any, tensor: Tensor) -> Tensor:
    """Feed dtype, shape and content of a tensor to a hash; returns the tensor."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous()
    digest.update(content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b"")
    return tensor
