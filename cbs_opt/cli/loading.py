"""The user's own files: networks, weights, data and losses named on the command line."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.torch
import torch
import typer
from safetensors import SafetensorError
from torch import Tensor, nn

from cbs_opt.cli.errors import UserCodeError
from cbs_opt.network.data import Data, LossFunction

LOSSES: dict[str, LossFunction] = {
    "cross_entropy": nn.functional.cross_entropy,
    "mse_loss": nn.functional.mse_loss,
}


def load_network(specification: str, weights: Path | None, device: str) -> nn.Module:
    """Return the network that ``FILE.py:factory`` makes, in evaluation mode, with `weights` if given.

    Raises
    ------
    UserCodeError
        If the factory raises or makes no network, or the weights do not fit.
    typer.BadParameter
        If the specification names no file or no function in it.
    """
    network = _call(specification, "--model")
    if not isinstance(network, nn.Module):
        found = type(network).__name__
        raise UserCodeError(f"--model: {specification} returned {found}; return a torch.nn.Module")
    if weights is not None:
        _require_file(weights, "--weights")
        try:
            safetensors.torch.load_model(network, weights)
        except (SafetensorError, RuntimeError) as error:
            raise UserCodeError(
                f"--weights: {weights} does not fit {specification} ({error}); "
                "pass the safetensors state dict of this network"
            ) from error
    try:
        return network.to(device).eval()
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from error


def load_data(specification: str, option: str, dtype: torch.dtype) -> Data:
    """Return samples from ``FILE.npz`` (arrays x and y) or from what ``FILE.py:factory`` returns.

    Floating-point arrays become `dtype`; integers become int64, as class labels and embeddings
    need.

    Raises
    ------
    UserCodeError
        If the file is not readable or the factory raises.
    typer.BadParameter
        If there is no such file, function or array.
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
        raise UserCodeError(
            f"{option}: {path} is unreadable ({error}); save arrays by numpy.savez"
        ) from error


def load_loss(specification: str) -> LossFunction:
    """Return a loss by name, or the function ``FILE.py:function`` itself."""
    if specification in LOSSES:
        return LOSSES[specification]
    if ":" not in specification:
        known = ", ".join(LOSSES)
        raise typer.BadParameter(
            f"{specification!r} is no loss; use one of {known}, or FILE.py:function", param_hint="--loss"
        )
    return _function(specification, "--loss")


def dtype_of(network: nn.Module) -> torch.dtype:
    """Return the dtype of the first floating-point parameter; float32 without any."""
    for parameter in network.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:
    if array.dtype.kind in "iub":
        return torch.as_tensor(array.astype(np.int64))
    return torch.as_tensor(array).to(dtype)


def _call(specification: str, option: str) -> Any:
    factory = _function(specification, option)
    try:
        return factory()
    except Exception as error:
        raise UserCodeError(f"{option}: {specification} raised {type(error).__name__}: {error}") from error


def _function(specification: str, option: str) -> Callable[..., Any]:
    file, separator, name = specification.rpartition(":")
    if not separator or not file.endswith(".py") or not name:
        raise typer.BadParameter(f"{specification!r}; write FILE.py:function", param_hint=option)
    path = Path(file)
    _require_file(path, option)
    found = getattr(_module(path, option), name, None)
    if not callable(found):
        raise typer.BadParameter(f"{path} defines no function {name}", param_hint=option)
    return found  # type: ignore[no-any-return]


def _module(path: Path, option: str) -> ModuleType:
    """Run a file as a module; its own directory is importable, as for a script."""
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
