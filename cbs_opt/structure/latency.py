"""Milliseconds of layers at several widths on this machine, for a budget of time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cbs_opt.errors import ForwardError
from cbs_opt.network.data import Inputs, device_of, forward
from cbs_opt.network.eligible import unwrapped
from cbs_opt.network.state import evaluation_mode, kept
from cbs_opt.structure.groups import GroupSet, Structure, groups
from cbs_opt.structure.reading import watching
from cbs_opt.structure.removal import restate
from cbs_opt.structure.tracing import run
from cbs_opt.structure.widths import Cost
from cbs_opt.system.checks import path as checked_path
from cbs_opt.system.checks import whole_number
from cbs_opt.system.versions import machine
from formulations.errors import ArgumentError
from formulations.files import write_atomically

IntArray = NDArray[np.int64]
MILLI = 1e3
FORMAT = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyTable:
    """What layers cost at several widths, in milliseconds of a pass over one batch.

    Attributes
    ----------
    machine : str
        Processor or accelerator, threads and version of PyTorch that it was measured with.
    network : str
        Layers, sizes and inputs that it belongs to.
    offered : mapping of str to int64 array
        Widths of each set of groups, increasing; the last one is the whole.
    costs : tuple of Cost
        For each layer that depends on sets: milliseconds at every choice of them.
    fixed : float
        Milliseconds of all the rest, as the network is: normalisations, activations, layers that stay whole.
    """

    machine: str
    network: str
    offered: Mapping[str, IntArray]
    costs: tuple[Cost, ...]
    fixed: float

    @property
    def total(self) -> float:
        """Milliseconds of the whole network."""
        return self.fixed + sum(float(entry.table.reshape(-1)[-1]) for entry in self.costs)

    def to_json(self) -> str:
        """Return the table as text."""
        body = {
            "format": FORMAT,
            "machine": self.machine,
            "network": self.network,
            "offered": {name: widths.tolist() for name, widths in self.offered.items()},
            "costs": [{"sets": list(entry.sets), "table": entry.table.tolist()} for entry in self.costs],
            "fixed": self.fixed,
        }
        return json.dumps(body, indent=1)

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Return the table of a text; `ValueError`, `KeyError` or `TypeError` if it is none."""
        body = json.loads(text)
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']}")
        costs = [
            Cost(sets=tuple(entry["sets"]), table=np.asarray(entry["table"], dtype=np.float64))
            for entry in body["costs"]
        ]
        offered = {name: np.asarray(widths, dtype=np.int64) for name, widths in body["offered"].items()}
        return cls(
            machine=str(body["machine"]),
            network=str(body["network"]),
            offered=offered,
            costs=tuple(costs),
            fixed=float(body["fixed"]),
        )

    def require(self, structure: Structure, argument: str) -> None:
        """Raise `ArgumentError` if it was measured on another machine, or belongs to another network."""
        here = _machine(torch.device(self.machine.partition(":")[0]))
        if self.machine != here:
            found = f"a table of {self.machine}, and this is {here}"
            raise ArgumentError(argument, found, "measure it here by measure_latency, or set threads alike")
        sizes = {part.name: part.n_groups for part in structure.sets}
        own = {name: int(widths[-1]) for name, widths in self.offered.items()}
        if sizes != own:
            different = sorted(name for name in {*sizes, *own} if sizes.get(name) != own.get(name))
            found = f"a table of another network: {', '.join(different[:3])} differ"
            raise ArgumentError(argument, found, "measure this network by measure_latency")


def measure_latency(
    model: nn.Module,
    example: Inputs,
    *,
    choices: int = 8,
    passes: int = 5,
    cache: str | os.PathLike[str] | None = None,
) -> LatencyTable:
    """Measure linear layers and convolutions at several widths of the groups that they make and read.

    Parameters
    ----------
    model : nn.Module
        Not changed. Runs on its device, with the threads that PyTorch has now.
    example : Tensor, or tuple or dict of them
        The batch whose time counts.
    choices : int, default 8
        Widths of each set.
    passes : int, default 5
        Of which the shortest counts.
    cache : path, optional
        File to read the table from, or to write it to where there is none.

    Returns
    -------
    LatencyTable

    Raises
    ------
    ArgumentError
        If the file is damaged, of another machine or of another network; nothing is measured then. If a layer
        depends on more than two sets.
    ForwardError
        If the network raises on the example.

    Notes
    -----
    With one thread on a processor it is processor time that counts, otherwise that of the clock on the wall.
    A layer of two sets is measured at ``choices**2`` pairs. Times add up layer by layer: what a smaller layer
    spares its neighbours in caches is not in the table.

    Examples
    --------
    >>> table = measure_latency(model, x[:64], cache="latency.json")  # doctest: +SKIP
    >>> small, report = prune_groups(model, (x, y), milliseconds=3.0, latency=table)  # doctest: +SKIP
    """
    whole_number("choices", choices, least=2)
    whole_number("passes", passes)
    file = checked_path("cache", cache)
    model = unwrapped(model)
    structure = groups(model, example)
    uses = _uses(model, example)
    name = _network(model, uses, choices)
    if file is not None and Path(file).exists():
        return _read(Path(file), structure, name)
    offered = offered_widths(structure.sets, choices)
    costs = []
    whole = 0.0
    for layer, shapes in uses.items():
        axes = _axes(structure, layer)
        sets = tuple(dict.fromkeys(part for part, _, _ in axes))
        if not sets:
            continue
        if len(sets) > 2:
            found = f"{layer}, which depends on {', '.join(sets)}"
            raise ArgumentError("model", found, "use flops or keep for such a network")
        table = np.zeros([len(offered[part]) for part in sets])
        for places in product(*(range(size) for size in table.shape)):
            widths = {part: int(offered[part][place]) for part, place in zip(sets, places, strict=True)}
            narrow = _narrow(model.get_submodule(layer), structure, axes, widths)
            table[places] = sum(_milliseconds(narrow, _input(narrow, shape), passes) for shape in shapes)
        whole += float(table.reshape(-1)[-1])
        costs.append(Cost(sets=sets, table=table))
    total = _network_milliseconds(model, example, passes)
    made = LatencyTable(
        machine=_machine(device_of(model)),
        network=name,
        offered=offered,
        costs=tuple(costs),
        fixed=max(total - whole, 0.0),
    )
    if file is not None:
        write_atomically(file, made.to_json().encode())
    return made


def offered_widths(sets: Sequence[GroupSet], choices: int) -> dict[str, IntArray]:
    """Return so many widths of each set, evenly from few groups to all; fewer where it has fewer groups."""
    shares = np.arange(1, choices + 1) / choices
    return {part.name: np.unique(np.ceil(shares * part.n_groups).astype(np.int64)) for part in sets}


def _machine(device: torch.device) -> str:
    """Return what a time depends on: device, its name, threads, version of PyTorch."""
    if device.type == "cpu":
        where = f"{machine()['processor']}, {torch.get_num_threads()} threads"
    else:
        where = str(getattr(torch, device.type).get_device_name(device))
    return f"{device.type}: {where}, torch {torch.__version__}"


def _uses(model: nn.Module, example: Inputs) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes that every linear layer and convolution is given, in the order of calls."""
    kinds = nn.Linear | nn.modules.conv._ConvNd
    layers = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    found: dict[str, list[tuple[int, ...]]] = {}

    def told(name: str, _: nn.Module, x: Tensor, __: Tensor) -> None:
        found.setdefault(name, []).append(tuple(x.shape))

    with watching(model, layers, told):
        run(model, example, [], ForwardError, "pass inputs that the network takes")
    return found


def _network(model: nn.Module, uses: Mapping[str, Sequence[tuple[int, ...]]], choices: int) -> str:
    """Return what a table belongs to: layers with their sizes, inputs and number of widths."""
    layers = [f"{name} {model.get_submodule(name)} {list(shapes)}" for name, shapes in uses.items()]
    return "; ".join([f"{choices} widths", *layers])


def _read(file: Path, structure: Structure, name: str) -> LatencyTable:
    """Return the table of a file, if it is one of this machine and network."""
    try:
        table = LatencyTable.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = f"{file}, which is no latency table ({type(error).__name__}: {error})"
        raise ArgumentError("cache", found, "delete it, and it is measured anew") from error
    table.require(structure, "cache")
    if table.network != name:
        found = f"{file}, a table of another network, other inputs or another number of widths"
        raise ArgumentError("cache", found, "delete it, or name another file")
    return table


Axis = tuple[str, int, int]
"""Name of a set, axis of a weight that it owns a part of, and how many indices a group has there."""


def _axes(structure: Structure, layer: str) -> list[Axis]:
    """Return the axes of a layer's weight that sets own."""
    return [
        (part.name, member.axis, member.index.shape[1])
        for part in structure.sets
        for member in part.members
        if member.name == f"{layer}.weight".lstrip(".")
    ]


def _narrow(
    layer: nn.Module, structure: Structure, axes: Sequence[Axis], widths: Mapping[str, int]
) -> nn.Module:
    """Return a copy of a layer with so many groups of each set."""
    narrow = deepcopy(layer)
    weight = narrow.weight
    assert isinstance(weight, Tensor)
    old = tuple(weight.shape)
    sizes = list(old)
    for part, axis, each in axes:
        sizes[axis] -= (structure[part].n_groups - widths[part]) * each
    narrow.weight = nn.Parameter(weight.detach()[tuple(slice(size) for size in sizes)].contiguous())
    restate(narrow, old)
    if isinstance(narrow.bias, Tensor):
        made = narrow.out_features if isinstance(narrow, nn.Linear) else narrow.out_channels
        assert isinstance(made, int)
        narrow.bias = nn.Parameter(narrow.bias.detach()[:made].contiguous())
    return narrow


def _input(layer: nn.Module, shape: Sequence[int]) -> Tensor:
    """Return zeros of a shape, with the channels that a layer reads."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    sizes = list(shape)
    if isinstance(layer, nn.Linear):
        sizes[-1] = layer.in_features
    else:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        sizes[-weight.ndim + 1] = layer.in_channels
    return torch.zeros(sizes, dtype=weight.dtype, device=weight.device)


def _milliseconds(layer: nn.Module, x: Tensor, passes: int) -> float:
    """Return the shortest time of a pass."""
    with torch.inference_mode():
        return min(_timed(layer, x) for _ in range(passes + 1)) * MILLI


def _network_milliseconds(model: nn.Module, example: Inputs, passes: int) -> float:
    with kept(model), evaluation_mode(model), torch.inference_mode():
        return min(_timed(partial(forward, model), example) for _ in range(passes + 1)) * MILLI


def _timed(act: Any, x: Any) -> float:
    """Return the seconds of a call; of the processor where one thread runs, so that others do not count."""
    on_accelerator = isinstance(x, Tensor) and x.device.type != "cpu"
    if on_accelerator:
        torch.accelerator.synchronize(x.device)
    clock = time.perf_counter if on_accelerator or torch.get_num_threads() > 1 else time.process_time
    start = clock()
    act(x)
    if on_accelerator:
        torch.accelerator.synchronize(x.device)
    return clock() - start


def within_sets(table: LatencyTable, sets: Sequence[str]) -> tuple[float, list[Cost]]:
    """Return the fixed milliseconds and the tables for a choice among some sets; the others stay whole."""
    fixed, costs = table.fixed, []
    for entry in table.costs:
        grid = entry.table[tuple(slice(None) if name in sets else -1 for name in entry.sets)]
        if np.ndim(grid):
            costs.append(Cost(sets=tuple(name for name in entry.sets if name in sets), table=grid))
        else:
            fixed += float(grid)
    return fixed, costs
