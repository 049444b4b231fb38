"""Tune the parameters of a solver with optuna; every trial is a study, so it is limited, kept and resumed.

The tuned setting is judged against the default on blocks that the search has not seen.

    pip install "cbs-opt[tune]"
    python -m experiments.tune_solver --method highs:selection_mccormick --program selection
    cbs-opt report results/tune
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbs_opt.study.config import Study, parse_study
from cbs_opt.study.results import read_results
from cbs_opt.study.runner import run_study
from cbs_opt.study.statistics import SHIFT_SECONDS, charged_seconds, shifted_geometric_mean
from formulations.errors import ArgumentError

if TYPE_CHECKING:
    import optuna

TUNED_ON = ("digits_16_s50", "digits_24_s80", "digits_32_s90")
HELD_OUT = ("digits_16_s80", "digits_24_s50", "digits_32_s80")
SPACES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "branch_and_bound": {
        "search": ("best", "depth"),
        "fixing": (True, False),
        "reduction": (True, False),
        "diagonal_split": (True, False),
        "swaps": (True, False),
    },
    "highs:selection_mccormick": {
        "presolve": ("choose", "off"),
        "mip_heuristic_effort": (0.05, 0.0, 0.02, 0.1, 0.3),
        "mip_pscost_minreliable": (8, 0, 2, 32),
        "mip_detect_symmetry": (True, False),
        "mip_allow_restart": (True, False),
    },
    "scip:selection_low_rank": {
        "presolving/maxrounds": (-1, 0, 5),
        "separating/maxrounds": (-1, 0, 1),
        "separating/maxroundsroot": (-1, 0, 5),
        "branching/relpscost/maxreliable": (5.0, 1.0, 20.0),
        "nodeselection/childsel": ("h", "d", "u"),
    },
}
"""Values to choose from, the default first."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What came out: options, and shifted geometric mean seconds before and after on both sets of blocks."""

    options: dict[str, Any]
    default_seconds: float
    tuned_seconds: float
    default_held_out: float
    tuned_held_out: float


def tune(
    method: str,
    program: str,
    folder: Path,
    *,
    trials: int = 20,
    time_limit: float = 10.0,
    jobs: int = 1,
    seed: int = 0,
    tuned_on: Sequence[str] = TUNED_ON,
    held_out: Sequence[str] = HELD_OUT,
) -> Tuning:
    """Search the space of a method for the options that prove fastest; the first trial is the default.

    Parameters
    ----------
    method : str
        A key of `SPACES`.
    program : {"selection", "joint"}
    folder : path
        Keeps every run; a setting that has been tried costs nothing the second time.
    trials : int, default 20
    time_limit : float, default 10
        Seconds a solve; a solve without a proof counts with all of them.
    jobs : int, default 1
        Worker processes. More make the times less comparable.
    seed : int, default 0
        Of the sampler.
    tuned_on, held_out : sequence of str
        Shipped blocks.
    """
    import optuna

    if method not in SPACES:
        raise ArgumentError("method", f"{method!r}", f"choose one of {', '.join(SPACES)}")
    default = {name: values[0] for name, values in SPACES[method].items()}

    def seconds(options: Mapping[str, Any], blocks: Sequence[str]) -> float:
        run_study(_study(method, program, options, blocks, time_limit), folder, jobs=jobs)
        return shifted_geometric_mean(
            charged_seconds(read_results(folder).table).to_numpy(float), SHIFT_SECONDS
        )

    def objective(trial: optuna.Trial) -> float:
        options = {
            name: trial.suggest_categorical(name, list(values)) for name, values in SPACES[method].items()
        }
        return seconds(options, tuned_on)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed), direction="minimize")
    search.enqueue_trial(default)
    search.optimize(objective, n_trials=trials, show_progress_bar=False)
    best = dict(search.best_params)
    tuning = Tuning(
        options=best,
        default_seconds=seconds(default, tuned_on),
        tuned_seconds=seconds(best, tuned_on),
        default_held_out=seconds(default, held_out),
        tuned_held_out=seconds(best, held_out),
    )
    # What `cbs-opt report` will show: both settings on all blocks, nothing of it run again.
    both = _study(method, program, default, [*tuned_on, *held_out], time_limit, best)
    run_study(both, folder, jobs=jobs)
    return tuning


def _study(
    method: str,
    program: str,
    options: Mapping[str, Any],
    blocks: Sequence[str],
    time_limit: float,
    *others: Mapping[str, Any],
) -> Study:
    """One or several settings of a method on some blocks."""
    group = {"program": program, "methods": [method]}
    return parse_study(
        {
            "name": f"tuning of {method}",
            "description": "The default parameters and those that a search found.",
            "limits": {"time_limit": time_limit},
            "instances": [{"library": list(blocks)}],
            "methods": [{**group, "options": dict(chosen)} for chosen in (options, *others)],
        }
    )


def main(
    method: Annotated[str, typer.Option(help=f"One of {', '.join(SPACES)}.")] = "highs:selection_mccormick",
    program: Annotated[str, typer.Option(help="selection or joint.")] = "selection",
    trials: Annotated[int, typer.Option(help="Settings to try.")] = 20,
    time_limit: Annotated[float, typer.Option(help="Seconds a solve.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("results/tune"),
) -> None:
    """Tune a solver and compare with its defaults on blocks that were not tuned on."""
    found = tune(method, program, out, trials=trials, time_limit=time_limit, seed=seed)
    changed = {name: value for name, value in found.options.items() if value != SPACES[method][name][0]}
    typer.echo(f"changed from the default: {changed or 'nothing'}")
    typer.echo(f"tuned on: {found.default_seconds:.3g} s -> {found.tuned_seconds:.3g} s")
    typer.echo(f"held out: {found.default_held_out:.3g} s -> {found.tuned_held_out:.3g} s")


if __name__ == "__main__":
    typer.run(main)
