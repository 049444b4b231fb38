"""How each method of the tables is run: the arguments of `cbs_opt.prune`, by network and sparsity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from experiments.trajectories import staged_arguments
from formulations.errors import ArgumentError

STEP_LENGTHS = (0.25, 0.5, 0.75, 1.0)
BASELINE: Mapping[str, Mapping[str, Any]] = {
    # Rows that average many samples serve both programs better than as many single samples.
    "mlpnet": {
        "curvature": "empirical_fisher",
        "samples": 60_000,
        "samples_per_row": 30,
        "damping": (0.3, 1.0, 3.0, 10.0),
        "choice_samples": 20_000,
    },
    "resnet20": {
        "curvature": "empirical_fisher",
        "samples": 16_000,
        "samples_per_row": 16,
        "damping": (0.1,),
        "choice_samples": 1_000,
    },
}
"""Rows and damping of the methods that stand for earlier work.

Dampings are in units of the mean diagonal of the Fisher matrix, here and below.
"""
CURVATURE: Mapping[str, Mapping[str, Any]] = {
    "mlpnet": BASELINE["mlpnet"],
    # A sketched row carries the curvature of all its samples; the layer-input term what rows leave unseen.
    "resnet20": {
        "curvature": "sketched_fisher",
        "samples": 8_000,
        "samples_per_row": 16,
        "layer_inputs": 1.0,
        "damping": (0.01,),
        "choice_samples": 1_000,
    },
}
"""Rows and damping of ours."""
SELECTION_DAMPING: Mapping[str, float] = {"mlpnet": 0.0, "resnet20": 0.0}
"""Damping of the selection program, in units of the mean diagonal of the Fisher matrix."""
SWAPS: Mapping[str, tuple[int, ...]] = {"mlpnet": (100, 400, 1000), "resnet20": (0, 100)}
"""Grids of the most swaps to make; the 1-swap optimum of a sample over-fits where rows are few."""
JOINT: Mapping[str, Mapping[str, Any]] = {
    "mlpnet": {
        "curvature": "sketched_fisher",
        "samples_per_row": 60,
        "layer_inputs": 1.0,
        "damping": (0.1,),
    },
    "resnet20": {},
}
"""What the joint recipe changes in the rows and the update of the others."""
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
    family = "mlpnet" if network.startswith("mlpnet") else "resnet20"
    common = {"sparsity": sparsity, "seed": seed, "program": "selection", "partition": "global"}
    rows = {**CURVATURE[family], "relative_damping": True}
    baseline = {**BASELINE[family], "relative_damping": True}
    swaps = [{"start": "magnitude", "max_swaps": count} for count in SWAPS[family]]
    update = {"update": True, "update_scale": STEP_LENGTHS}
    recipes: dict[str, dict[str, Any]] = {
        "magnitude": {"method": "magnitude", "update": False},
        "obd": {**baseline, "method": "obd", "update": False, "damping": 0.0},
        "woodfisher": {**baseline, **update, "method": "obs", "update": "independent"},
        "update_only": {**rows, **update, "method": "magnitude"},
        "cbs_selection": {
            **baseline,
            "method": "swap_search",
            "update": False,
            "damping": SELECTION_DAMPING[family],
            "method_options": swaps,
        },
        "cbs": {
            **rows,
            **update,
            "method": "swap_search",
            "selection_damping": SELECTION_DAMPING[family],
            "method_options": swaps,
        },
        "joint": {
            **rows,
            **update,
            **JOINT[family],
            "program": "joint",
            "method": "greedy_obs",
            "method_options": {"drops": drops(sparsity)},
        },
    }
    if method not in recipes:
        raise ArgumentError("methods", f"{method!r}", f"choose among {', '.join(METHODS)}")
    return {**common, **recipes[method]}


def drops(sparsity: float) -> int:
    """Drops of joint greedy OBS: as many as keep about `DROP_FACTOR` of the weights each."""
    return max(1, math.ceil(math.log(1.0 - sparsity) / math.log(DROP_FACTOR)))
