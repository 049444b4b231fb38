"""How each method of the tables is run: the arguments of `cbs_opt.prune`, by network and sparsity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cbs_opt.curvature.kinds import EmpiricalFisher, SketchedFisher
from cbs_opt.recipe.records import Recipe, Update, Weights
from cbs_opt.recipe.select import OBD, OBS, GreedyOBS, Magnitude, SwapSearch
from experiments.trajectories import family, staged_arguments
from formulations.errors import ArgumentError

STEP_LENGTHS = (0.25, 0.5, 0.75, 1.0)
BASELINE: Mapping[str, Sequence[Recipe]] = {
    # Rows that average many samples serve both programs better than as many single samples.
    "mlpnet": Recipe.grid(
        Recipe(
            curvature=EmpiricalFisher(samples=60_000, per_row=30), layer_inputs=0.0, choice_samples=20_000
        ),
        damping=(0.3, 1.0, 3.0, 10.0),
    ),
    "resnet20": Recipe.grid(
        Recipe(curvature=EmpiricalFisher(samples=16_000, per_row=16), layer_inputs=0.0, choice_samples=1_000),
        damping=(0.1,),
    ),
}
"""Rows and damping of the methods that stand for earlier work.

Dampings are in units of the mean diagonal of the Fisher matrix, here and below.
"""
CURVATURE: Mapping[str, Sequence[Recipe]] = {
    "mlpnet": BASELINE["mlpnet"],
    # A sketched row carries the curvature of all its samples; the layer-input term what rows leave unseen.
    "resnet20": Recipe.grid(
        Recipe(curvature=SketchedFisher(samples=8_000, per_row=16), layer_inputs=1.0, choice_samples=1_000),
        damping=(0.01,),
    ),
}
"""Rows and damping of ours."""
SELECTION_DAMPING: Mapping[str, float] = {"mlpnet": 0.0, "resnet20": 0.0}
"""Damping of the selection program, in units of the mean diagonal of the Fisher matrix."""
SWAPS: Mapping[str, tuple[int, ...]] = {"mlpnet": (100, 400, 1000), "resnet20": (0, 100)}
"""Grids of the most swaps to make; the 1-swap optimum of a sample over-fits where rows are few."""
JOINT: Mapping[str, Sequence[Recipe]] = {
    "mlpnet": Recipe.grid(
        Recipe(curvature=SketchedFisher(samples=60_000, per_row=60), layer_inputs=1.0, choice_samples=20_000),
        damping=(0.1,),
    ),
    "resnet20": CURVATURE["resnet20"],
}
"""Rows and damping of the joint recipe."""
DROP_FACTOR = 0.85
"""Share of the kept weights that each drop of joint greedy OBS keeps, about."""

METHODS = ("magnitude", "obd", "woodfisher", "update_only", "cbs_selection", "cbs", "joint", "staged")
DETERMINISTIC = ("magnitude",)
"""Methods that use no training data and no random numbers: one seed says it all."""


def prune_arguments(network: str, method: str, sparsity: float, seed: int) -> dict[str, Any]:
    """Keyword arguments of `cbs_opt.prune` for one cell of a table.

    Parameters
    ----------
    network : str
        A name of `experiments.networks.NETWORKS`.
    method : str
        One of `METHODS`:

        - "magnitude": smallest weights, no update.
        - "obd": smallest 1/2 H_ii w_i^2, no update.
        - "woodfisher": OBS saliency, independent single-weight updates added up.
        - "update_only": magnitude, then CBS-U.
        - "cbs_selection": swap search from magnitude, no update.
        - "cbs": swap search from magnitude on the rows, then CBS-U in the whole model.
        - "joint": greedy OBS on the joint program, then CBS-U in the same model.
        - "staged": the run in stages that passes `sparsity`; see `experiments.trajectories`.
    sparsity : float
    seed : int
        Chooses the training samples of the rows and of the choice.

    Raises
    ------
    ArgumentError
        If the method is unknown.
    """
    if method == "staged":
        return staged_arguments(network, sparsity, seed)
    if method not in METHODS:
        raise ArgumentError("methods", f"{method!r}", f"choose among {', '.join(METHODS)}")
    whole = Weights(blocks="global")
    recipes = [replace(recipe, weights=whole) for recipe in _recipes(network, method, sparsity)]
    return {"sparsity": sparsity, "seed": seed, "recipe": recipes}


def _recipes(network: str, method: str, sparsity: float) -> list[Recipe]:
    """Return the recipes that a method tries."""
    kind = family(network)
    updates = [Update(scale=length) for length in STEP_LENGTHS]
    swaps = [SwapSearch(program="selection", start="magnitude", max_swaps=count) for count in SWAPS[kind]]
    selecting = [SELECTION_DAMPING[kind]]
    if method == "magnitude":
        return [Recipe(select=Magnitude(program="selection"), update=None, layer_inputs=0.0)]
    if method == "obd":
        return varied(BASELINE[kind], select=[OBD(program="selection")], update=[None], damping=[0.0])
    if method == "woodfisher":
        independent = [replace(update, kind="independent") for update in updates]
        return varied(BASELINE[kind], select=[OBS(program="selection")], update=independent)
    if method == "update_only":
        return varied(CURVATURE[kind], select=[Magnitude(program="selection")], update=updates)
    if method == "cbs_selection":
        return varied(BASELINE[kind], select=swaps, update=[None], damping=selecting)
    if method == "cbs":
        return varied(CURVATURE[kind], select=swaps, update=updates, selection_damping=selecting)
    return varied(JOINT[kind], select=[GreedyOBS(drops=drops(sparsity))], update=updates)


def varied(recipes: Iterable[Recipe], **fields: Iterable[Any]) -> list[Recipe]:
    """Every recipe with every combination of other values, each of them once."""
    return list(dict.fromkeys(new for recipe in recipes for new in Recipe.grid(recipe, **fields)))


def drops(sparsity: float) -> int:
    """Return drops of joint greedy OBS: as many as keep about `DROP_FACTOR` of the weights each."""
    return max(1, math.ceil(math.log(1.0 - sparsity) / math.log(DROP_FACTOR)))
