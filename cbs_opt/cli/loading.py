"""The user's own files: networks, weights, data and losses that are read, the directory that is written."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
import typer
from safetensors import SafetensorError
from torch import Tensor, nn

from cbs_opt.certify.files import BLOCK, CERTIFICATES
from cbs_opt.cli.errors import UserCodeError
from cbs_opt.network.data import Data, LossFunction
from cbs_opt.report.files import save_report
from cbs_opt.report.record import PruneReport

WEIGHTS_FILE = "weights.safetensors"
STATE = "state"
"""Directory within the output where a run that can be resumed keeps what it finds."""

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
"""How files end that `torch.save` wrote."""
STATE_NAMES = ("state_dict", "model_state_dict")
"""Where training runs put the state dict in such a file."""
FORM = "FILE.py:function or package.module:function"
"""How a function is named on the command line."""
LOSSES: dict[str, LossFunction] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse_loss": nn.functional.mse_loss,
}


def load_network(specification: str, weights: Path | None, device: str) -> nn.Module:
    """Return the network that a factory makes, see `_function`, in evaluation mode, with `weights` if given.

    Weights are a state dict: by safetensors, or by `torch.save` in a file that ends in .pt, .pth, .bin or
    .ckpt, of which tensors alone are read. A factory that raises or makes no network, and weights that do not
    fit, are a `UserCodeError`.
    """
    network = _call(specification, "--model")
    if not isinstance(network, nn.Module):
        found = f"--model: {specification} returned {type(network).__name__}"
        raise UserCodeError(f"{found}; return a torch.nn.Module")
    if weights is not None:
        _require_file(weights, "--weights")
        try:
            if weights.suffix in TORCH_FILES:
                network.load_state_dict(_torch_state(weights))
            else:
                safetensors.torch.load_model(network, weights)
        except (SafetensorError, RuntimeError) as error:
            found = f"--weights: {weights} does not fit {specification} ({' '.join(str(error).split())})"
            raise UserCodeError(f"{found}; pass the state dict of this network") from error
    try:
        return network.to(device).eval()
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from error


def _torch_state(path: Path) -> Mapping[str, Any]:
    """Return the state dict in a file of `torch.save`, which is refused if it has more than plain values.

    A file of a training run may have it under "state_dict" or "model_state_dict".
    """
    option = f"--weights: {path}"
    try:
        # With tensors alone nothing of the file is run.
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
    except Exception as error:
        # Pickle and zip raise what they like; of torch's many lines one says what was found.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        why = next((line for line in lines if "Unpickler error" in line), lines[0])
        remedy = "save model.state_dict() alone, or load the file in the factory if you trust it"
        raise UserCodeError(f"{option} is damaged or holds more than tensors ({why}); {remedy}") from error
    if isinstance(found, Mapping):
        found = next((found[name] for name in STATE_NAMES if isinstance(found.get(name), Mapping)), found)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserCodeError(f"{option} holds no state dict; save model.state_dict()")
    return found


def load_data(specification: str, option: str, dtype: torch.dtype) -> Data:
    """Return samples from ``FILE.npz`` (arrays x and y) or what a factory returns, see `_function`.

    Floating-point arrays become `dtype`; integers become int64, as class labels and embeddings need. A file
    that cannot be read and a factory that raises are a `UserCodeError`.
    """
    if Path(specification).suffix != ".npz":
        return _call(specification, option)  # type: ignore[no-any-return]
    path = Path(specification)
    _require_file(path, option)
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = sorted({"x", "y"} - set(archive.files))
            if missing:
                found = f"{path} has {', '.join(archive.files) or 'no array'}, not {' and '.join(missing)}"
                raise typer.BadParameter(f"{found}; name the arrays x and y", param_hint=option)
            return _tensor(archive["x"], dtype), _tensor(archive["y"], dtype)
    except (ValueError, TypeError, OSError, EOFError) as error:
        found = f"{option}: {path} is unreadable ({error})"
        raise UserCodeError(f"{found}; save arrays by numpy.savez") from error


def load_loss(specification: str) -> LossFunction:
    """Return a loss by name, or the function itself that `_function` finds."""
    if specification in LOSSES:
        return LOSSES[specification]
    if ":" not in specification:
        found = f"{specification!r} is no loss; use one of {', '.join(LOSSES)}, or {FORM}"
        raise typer.BadParameter(found, param_hint="--loss")
    return _function(specification, "--loss")


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter; float32 without any."""
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def require_free(directory: Path, force: bool, resume: bool) -> None:
    """Refuse a directory in use, unless it is that of the run which is to go on."""
    if directory.is_file():
        raise typer.BadParameter(f"{directory} is a file", param_hint="--out")
    in_use = directory.is_dir() and any(directory.iterdir())
    if in_use and not force and not (resume and (directory / STATE).is_dir()):
        message = f"{directory} is not empty; choose another directory or pass --force"
        raise typer.BadParameter(message, param_hint="--out")


@contextmanager
def block_directory(out: Path, state: Path | None, wanted: bool) -> Iterator[Path | None]:
    """Yield where the data of blocks go until the run has succeeded; None unless wanted."""
    if not wanted or state is not None:
        # What a killed run has written there is of use to the next one.
        yield state / "blocks" if wanted and state is not None else None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as directory:
        yield Path(directory)


def write_outputs(network: nn.Module, report: PruneReport, out: Path, block_dir: Path | None) -> None:
    """Write weights, masks, report and the data of blocks; report.json comes last but for the blocks."""
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".{WEIGHTS_FILE}"
    safetensors.torch.save_model(network, str(temporary))
    temporary.replace(out / WEIGHTS_FILE)
    save_report(report, out)
    # The data of the blocks belong where their certificates are.
    kept = out / CERTIFICATES
    for stale in kept.glob(f"*{BLOCK}"):
        stale.unlink()
    for path in sorted(block_dir.glob(f"*{BLOCK}")) if block_dir is not None else ():
        try:
            os.link(path, kept / path.name)
        except OSError:
            # Another file system, or one without links.
            shutil.copyfile(path, kept / path.name)


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    whole = array.dtype.kind in "iub"
    return torch.as_tensor(array.astype(np.int64)) if whole else torch.as_tensor(array).to(dtype)


def _call(specification: str, option: str) -> Any:
    factory = _function(specification, option)
    try:
        return factory()
    except Exception as error:
        raise UserCodeError(f"{option}: {specification} raised {type(error).__name__}: {error}") from error


def _function(specification: str, option: str) -> Callable[..., Any]:
    """Return the function that ``FILE.py:name`` or ``package.module:name`` names.

    A module is looked for as by ``python -m``: in the working directory first, then where packages are.
    """
    place, separator, name = specification.rpartition(":")
    if not separator or not place or not name:
        raise typer.BadParameter(f"{specification!r}; write {FORM}", param_hint=option)
    found: object = _file_module(Path(place), option) if place.endswith(".py") else _module(place, option)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise typer.BadParameter(f"{place} defines no function {name}", param_hint=option)
    return found


def _module(name: str, option: str) -> ModuleType:
    """Import a module by its dotted name."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise typer.BadParameter(f"{name!r} names no module; write {FORM}", param_hint=option)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserCodeError(f"{option}: importing {name} needs {error.name}; install it") from error
        found = f"there is no module {name} in {Path.cwd()} or installed"
        raise typer.BadParameter(f"{found}; write {FORM}", param_hint=option) from error
    except Exception as error:
        raise UserCodeError(f"{option}: importing {name} raised {type(error).__name__}: {error}") from error


def _file_module(path: Path, option: str) -> ModuleType:
    """Run a file as a module; its own directory is importable, as for a script."""
    _require_file(path, option)
    resolved = path.resolve()
    name = f"cbs_opt_user_{resolved.stem}_{abs(hash(str(resolved))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise UserCodeError(f"{option}: {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    if str(resolved.parent) not in sys.path:
        sys.path.append(str(resolved.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserCodeError(f"{option}: running {path} raised {type(error).__name__}: {error}") from error
    return module


def _require_file(path: Path, option: str) -> None:
    if not path.is_file():
        raise typer.BadParameter(f"there is no file {path}", param_hint=option)
