"""What studies are summed up by: performance profiles, shifted geometric means, excess over optima."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pandas as pd

from formulations.problem import FloatArray

SHIFT_SECONDS = 0.1
"""Added to times before the logarithm, so that milliseconds do not decide a mean."""
SHIFT_NODES = 10.0
PROCESSOR, WALL = "cpu_seconds", "seconds"
CLOCKS = {PROCESSOR: "Processor time", WALL: "Wall-clock time"}
"""Columns that a run's time may be taken from, and what they are called."""
HEURISTIC = ("saliency", "search")
"""Kinds of methods that prove nothing."""


def shifted_geometric_mean(values: Sequence[float] | FloatArray, shift: float) -> float:
    """Return ``exp(mean(log(values + shift))) - shift``; NaN of nothing.

    Examples
    --------
    >>> round(shifted_geometric_mean([1.0, 4.0], 0.0), 6)
    2.0
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return float("nan")
    return (
        float(np.expm1(np.log1p(array / shift).mean()) * shift)
        if shift > 0.0
        else float(np.exp(np.log(array).mean()))
    )


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Add a column `label`: the method, and those options that are not as in its first row."""
    labels = pd.Series(table["method"], index=table.index, dtype=object)
    for method, rows in table.groupby("method", sort=False):
        options = [json.loads(text) for text in rows["options"]]
        for index, chosen in zip(rows.index, options, strict=True):
            words = [
                f"{name}={option_text(value)}"
                for name, value in chosen.items()
                if value != options[0].get(name)
            ]
            labels[index] = " ".join([str(method), *words])
    return table.assign(label=labels)


def option_text(value: object) -> str:
    """Return an option's value as a person writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def clock(table: pd.DataFrame) -> str:
    """Return `PROCESSOR` if every answer has it and all runs have one thread, else `WALL`.

    Other work on the machine disturbs processor time far less; of several threads it is the sum.
    """
    answered = table[table["objective"].notna()]
    known = not answered.empty and bool(answered[PROCESSOR].notna().all())
    return PROCESSOR if known and bool(table["threads"].eq(1).all()) else WALL


def processor_share(table: pd.DataFrame) -> float:
    """Return median share of a processor that runs of .1 s and more had; NaN if there were none."""
    long = table[table[WALL] >= SHIFT_SECONDS]
    return float((long[PROCESSOR] / long[WALL]).median())


def charged_seconds(table: pd.DataFrame) -> pd.Series:
    """Return seconds of each run by `clock`; the limit where nothing was proved, or nothing came."""
    heuristic = table["kind"].isin(HEURISTIC) & table["objective"].notna()
    counted = table["proved"] | heuristic
    return table[clock(table)].where(counted, table["time_limit"].astype(float))


def ranking(table: pd.DataFrame) -> dict[str, tuple[int, float]]:
    """Return what each label is ranked by: minus the runs proved, then the mean time; heuristics are last."""
    charged = table.assign(charged=charged_seconds(table)).groupby("label", sort=False)
    return {
        str(label): (1, 0.0)
        if rows["kind"].isin(HEURISTIC).all()
        else (
            -int(rows["proved"].sum()),
            shifted_geometric_mean(rows["charged"].dropna().to_numpy(float), SHIFT_SECONDS),
        )
        for label, rows in charged
    }


def performance_profile(table: pd.DataFrame) -> dict[str, FloatArray]:
    """Return the ratios of Dolan and More (2002): time over the best on the same block and seed.

    Time as `clock` says.

    Parameters
    ----------
    table : pandas.DataFrame
        Rows of one program, with labels; heuristics are left out.

    Returns
    -------
    dict of str to (cases,) float64 array
        Sorted ratios of each label, infinity where it proved nothing in its limit or failed. A case that
        no method proved is infinite for all, and counts.
    """
    exact = table[~table["kind"].isin((*HEURISTIC, "bound"))]
    if exact.empty:
        return {}
    times = exact.assign(cost=exact[clock(table)].where(exact["proved"], np.inf))
    wide = times.pivot_table(
        index=["instance", "seed"], columns="label", values="cost", aggfunc="min", sort=False, dropna=False
    )
    wide = wide.reindex(columns=list(dict.fromkeys(exact["label"]))).fillna(np.inf)
    costs = wide.to_numpy(np.float64)
    best = np.broadcast_to(costs.min(axis=1, keepdims=True), costs.shape)
    ratios = np.full(costs.shape, np.inf)
    np.divide(costs, best, out=ratios, where=np.isfinite(costs))
    return {str(label): np.sort(ratios[:, i]) for i, label in enumerate(wide.columns)}


def optima(table: pd.DataFrame) -> pd.DataFrame:
    """Return the proved optimum of each block, as far as the study has one.

    Returns
    -------
    pandas.DataFrame
        Index (instance, program); columns `optimum`, the smallest proved objective, and `tolerance`,
        the relative gap that it was proved to.
    """
    proved = table[table["proved"]]
    best = proved.sort_values("objective").groupby(["instance", "program"], sort=False).first()
    return best[["objective", "gap"]].rename(columns={"objective": "optimum", "gap": "tolerance"})


def with_excess(table: pd.DataFrame) -> pd.DataFrame:
    """Add `excess`: the objective over the proved optimum, relative; NaN without a proof.

    An objective within the tolerance of the proof, or below the optimum by less, has excess 0.
    """
    joined = table.join(optima(table), on=["instance", "program"])
    scale = joined["optimum"].abs().clip(lower=1e-12)
    excess = (joined["objective"] - joined["optimum"]) / scale
    tolerance = joined["tolerance"].fillna(0.0).clip(lower=1e-9)
    return joined.assign(excess=excess.where(excess > tolerance, 0.0).where(excess.notna()))
