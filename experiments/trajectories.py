"""Runs in stages for the tables: one run of `cbs_opt.prune` serves every sparsity that it passes.

The network of a sparsity is the one at the end of the stage that reaches it; the last sparsity also has
the final updates. All choices are by the loss on training samples that are drawn afresh for every step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cbs_opt
from cbs_opt.curvature.kinds import SketchedFisher
from cbs_opt.network.data import Data
from cbs_opt.network.evaluation import evaluate
from cbs_opt.recipe.files import request_to_plain
from cbs_opt.recipe.records import Recipe, Request, Stages, Update, Weights
from cbs_opt.recipe.select import OBS, GreedyOBS
from cbs_opt.stages.state import StageResult
from cbs_opt.system.plain import plain
from experiments.augmentation import as_trained, is_augmented
from experiments.datasets import Dataset
from experiments.ledger import settings_key
from experiments.networks import Network
from experiments.recalibration import recalibrated_accuracy
from formulations.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Staged:
    """How a family of networks is pruned in stages; `dampings` are those that the first step tries."""

    recipe: Recipe
    dampings: tuple[float, ...]
    stages: Stages

    @property
    def schedule(self) -> tuple[float, ...]:
        """The sparsities that a run passes."""
        return tuple(share for share in self.stages.schedule if not isinstance(share, str))


SCALES = (0.5, 1.0)
"""Step lengths of every update."""
STAGES: Mapping[str, Staged] = {
    "mlpnet": Staged(
        recipe=Recipe(
            curvature=SketchedFisher(samples=30_000, per_row=30),
            choice_samples=20_000,
            select=OBS(),
            gradient=True,
        ),
        dampings=(0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
        stages=Stages(
            count=20,
            schedule=(
                *(0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.84, 0.87, 0.9, 0.92, 0.935, 0.95),
                *(0.956, 0.961, 0.965, 0.969, 0.972, 0.975, 0.9777, 0.98),
            ),
            # Rows are what a stage costs; further updates share them.
            updates=5,
            final_updates=8,
            gradient_samples=60_000,
        ),
    ),
    "resnet20": Staged(
        recipe=Recipe(
            curvature=SketchedFisher(samples=6_400, per_row=16),
            choice_samples=768,
            select=GreedyOBS(drops=3),
            selection_damping=1.0,
            # The gradient is noisier than it is large where a network has just been brought to a minimum.
            gradient=False,
            layer_inputs=1.0,
        ),
        dampings=(1.0, 10.0, 100.0),
        stages=Stages(
            count=10,
            schedule=(0.3, 0.4, 0.5, 0.6, 0.7, 0.76, 0.8, 0.84, 0.87, 0.9),
            updates=3,
            final_updates=8,
            gradient_samples=8_192,
        ),
    ),
}
"""How each family of networks is pruned in stages; every schedule passes the published sparsities."""
Change = Callable[[Staged], Staged]
PREFIX = "network."
"""Before the parameter names of a network inside `BrainFloat`."""


class BrainFloat(nn.Module):
    """A network run in bfloat16 and channels-last, two to three times as fast on recent processors.

    Its parameters, and their gradients, are those of `network` in their own precision.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            output: Tensor = self.network(x.contiguous(memory_format=torch.channels_last))
        return output.float()


def family(network: str) -> str:
    """Return the family of a network by its name."""
    return "mlpnet" if network.startswith("mlpnet") else "resnet20"


def staged_arguments(
    network: str, sparsity: float, seed: int, change: Change = lambda staged: staged
) -> dict[str, Any]:
    """Keyword arguments of `cbs_opt.prune` for the run that passes `sparsity`.

    Raises
    ------
    ArgumentError
        If it does not.
    """
    staged = change(STAGES[family(network)])
    if sparsity not in staged.schedule:
        remedy = f"choose among {', '.join(f'{share:g}' for share in staged.schedule)}"
        raise ArgumentError("sparsity", f"{sparsity:g}, which the run in stages does not pass", remedy)
    whole = replace(staged.recipe, weights=Weights(blocks="global"))
    updates = [Update(scale=scale) for scale in SCALES]
    return {
        "sparsity": staged.schedule[-1],
        "recipe": Recipe.grid(whole, damping=staged.dampings, update=updates),
        "stages": staged.stages,
        "seed": seed,
    }


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `cbs_opt.prune` as numbers, strings, lists and mappings."""
    request = Request(
        sparsity=arguments["sparsity"],
        recipes=arguments["recipe"],
        stages=arguments.get("stages"),
        seed=arguments["seed"],
    )
    return request_to_plain(request)


class Trajectories:
    """Runs in stages of one network, each kept as a table by sparsity.

    Parameters
    ----------
    data : Dataset
    directory : Path, optional
        Where the stages of every run are kept, so that a run that was stopped goes on.
    progress : bool, default False
    change : callable, optional
        Makes another protocol of that of the tables.
    """

    def __init__(
        self,
        data: Dataset,
        directory: Path | None = None,
        *,
        progress: bool = False,
        change: Change = lambda staged: staged,
    ) -> None:
        self.data = data
        self.change = change
        self.directory = directory
        self.progress = progress
        self._key = ""
        self._cells: dict[float, dict[str, Any]] = {}

    def measure(self, network: Network, sparsity: float, seed: int) -> dict[str, Any]:
        """Accuracy, losses and cost at `sparsity`; the run before is kept in memory.

        Parameters
        ----------
        network : Network
            As it was trained; pruned in place if the run is not known yet.
        """
        arguments = staged_arguments(network.name, sparsity, seed, self.change)
        key = settings_key({"network": network.name, **plain_arguments(arguments)})
        if key != self._key:
            self._cells = self._run(network, arguments, key)
            self._key = key
        return self._cells[sparsity]

    def _run(self, network: Network, arguments: dict[str, Any], key: str) -> dict[float, dict[str, Any]]:
        schedule = arguments["stages"].schedule
        shown = copy.deepcopy(network.model)
        cells: dict[float, dict[str, Any]] = {}

        def on_stage(result: StageResult) -> None:
            for name, weights in result.weights.items():
                shown.get_parameter(name.removeprefix(PREFIX)).data.copy_(weights)
            # The final updates follow the last entry of the schedule and replace its cell.
            share = schedule[min(result.stage, len(schedule) - 1)]
            cells[share] = self._cell(network, shown, result)

        trained, data, prefix = self._prepared(network, arguments["seed"])
        weights = Weights(target=[prefix + glob for glob in network.target], blocks="global")
        report = cbs_opt.prune(
            trained,
            data,
            sparsity=arguments["sparsity"],
            recipe=[replace(recipe, weights=weights) for recipe in arguments["recipe"]],
            stages=replace(arguments["stages"], on_stage=on_stage),
            run_dir=None if self.directory is None else self.directory / f"{network.name}_{key}",
            seed=arguments["seed"],
            progress=self.progress,
        )
        seconds = 0.0
        for number, share in enumerate(cells):
            own = [
                record.seconds for record in report.stages if min(record.stage, len(schedule) - 1) == number
            ]
            seconds += sum(own)
            cells[share] |= {"seconds": seconds, "peak_memory_bytes": report.peak_memory_bytes, "n": report.n}
        return cells

    def _prepared(self, network: Network, seed: int) -> tuple[nn.Module, Data, str]:
        """Return what is pruned, on which data, and what its parameter names begin with."""
        data = as_trained(network, self.data, seed=seed)
        if not is_augmented(network.name):
            return network.model, data, ""
        return BrainFloat(network.model).eval(), data, PREFIX

    def _cell(self, network: Network, pruned: nn.Module, result: StageResult) -> dict[str, Any]:
        """Return what is known of a network on the way."""
        test = (self.data.test_x, self.data.test_y)
        found = evaluate(pruned, test, nn.functional.cross_entropy)
        last = result.records[-1]
        return {
            "accuracy": 100.0 * (found.accuracy or 0.0),
            "accuracy_recalibrated": recalibrated_accuracy(network, pruned, self.data),
            "test_loss": found.loss,
            "train_loss": last.loss,
            "n_prune": last.n_prune,
            "damping": last.damping,
            "update_scale": last.update_scale,
            "gradient_samples": last.samples,
            "steps": [plain(record) for record in result.records],
        }
