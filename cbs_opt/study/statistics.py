"""What studies are summed up by: profiles, geometric means, excess over optima, effects of options."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from formulations.problem import FloatArray

SHIFT_SECONDS = 0.1
"""Added to times before the logarithm, so that milliseconds do not decide a mean."""
SHIFT_NODES = 10.0
PROCESSOR, WALL = "cpu_seconds", "seconds"
CLOCKS = {PROCESSOR: "Processor time", WALL: "Wall-clock time"}
"""Columns that a run's time may be taken from, and what they are called."""
RESAMPLES = 2000
CONFIDENCE = 0.95
"""Of the intervals of the bootstrap."""
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
    if shift > 0.0:
        return float(np.expm1(np.log1p(array / shift).mean()) * shift)
    return float(np.exp(np.log(array).mean()))


def with_labels(table: pd.DataFrame) -> pd.DataFrame:
    """Add a column `label`: the method, and those options that are not as in its first row."""
    labels = pd.Series(table["method"], index=table.index, dtype=object)
    for method, rows in table.groupby("method", sort=False):
        options = [json.loads(text) for text in rows["options"]]
        for index, chosen in zip(rows.index, options, strict=True):
            changed = {name: value for name, value in chosen.items() if value != options[0].get(name)}
            words = [f"{name}={option_text(value)}" for name, value in changed.items()]
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
    ranks: dict[str, tuple[int, float]] = {}
    for label, rows in table.assign(charged=charged_seconds(table)).groupby("label", sort=False):
        mean = shifted_geometric_mean(rows["charged"].dropna().to_numpy(float), SHIFT_SECONDS)
        heuristic = rows["kind"].isin(HEURISTIC).all()
        ranks[str(label)] = (1, 0.0) if heuristic else (-int(rows["proved"].sum()), mean)
    return ranks


def performance_profile(table: pd.DataFrame) -> dict[str, FloatArray]:
    """Return the ratios of Dolan and More (2002): time over the best on the same block and seed.

    Of rows of one program, with labels, heuristics left out; time as `clock` says. The ratios of each label
    are sorted, infinity where it proved nothing in its limit or failed. A case that no method proved is
    infinite for all, and counts.
    """
    exact = table[~table["kind"].isin((*HEURISTIC, "bound"))]
    if exact.empty:
        return {}
    times = exact.assign(cost=exact[clock(table)].where(exact["proved"], np.inf))
    fastest = times.groupby(["instance", "seed", "label"], sort=False)["cost"].min()
    wide = fastest.unstack("label").reindex(columns=exact["label"].unique()).fillna(np.inf)
    costs = wide.to_numpy(np.float64)
    ratios = np.full(costs.shape, np.inf)
    np.divide(costs, costs.min(axis=1, keepdims=True), out=ratios, where=np.isfinite(costs))
    return {str(label): np.sort(ratios[:, i]) for i, label in enumerate(wide.columns)}


def with_excess(table: pd.DataFrame) -> pd.DataFrame:
    """Add `excess`: the objective over the proved optimum, relative; NaN without a proof.

    An objective within the tolerance of the proof, or below the optimum by less, has excess 0.
    """
    block = ["instance", "program"]
    proved = table[table["proved"]].sort_values("objective").groupby(block, sort=False)[["objective", "gap"]]
    joined = table.join(proved.first().set_axis(["optimum", "tolerance"], axis=1), on=block)
    scale = joined["optimum"].abs().clip(lower=1e-12)
    excess = (joined["objective"] - joined["optimum"]) / scale
    tolerance = joined["tolerance"].fillna(0.0).clip(lower=1e-9)
    return joined.assign(excess=excess.where(excess > tolerance, 0.0).where(excess.notna()))


class Interval(NamedTuple):
    """An estimate with the limits of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: FloatArray, groups: Sequence[object], seed: int = 0) -> Interval:
    """Return the percentile interval of a mean at `CONFIDENCE`, drawing whole groups.

    Runs on a block are not independent, so `groups` has the block of each value; of a single one all
    three numbers are the same.
    """
    codes = pd.factorize(pd.Series(list(groups), dtype=object))[0]
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What changing one option does, all else equal: the geometric mean of after over before.

    The option's value goes from `base` to `value`. Times and nodes are shifted; `pairs` of runs on
    so many `blocks` were compared; `measure` is "time", "nodes" or "objective".
    """

    method: str
    option: str
    base: str
    value: str
    measure: str
    ratio: Interval
    pairs: int
    blocks: int

    @property
    def change(self) -> tuple[str, str, str, str]:
        """What was changed: `method`, `option`, `base`, `value`."""
        return self.method, self.option, self.base, self.value


def effects(table: pd.DataFrame) -> list[Effect]:
    """Return the effect of every option that was varied, from pairs of runs that differ in it alone.

    Times and nodes of exact methods, times and objectives of heuristics. A run without a proof counts
    with its whole time limit, so a ratio says at least so much.
    """
    charged = table.assign(charged=charged_seconds(table))
    measured: list[Effect] = []
    for method, rows in charged.groupby("method", sort=False):
        options = [json.loads(text) for text in rows["options"]]
        for name in dict.fromkeys(name for chosen in options for name in chosen):
            values = list(dict.fromkeys(json.dumps(c[name]) for c in options if name in c))
            for value in values[1:]:
                pairs = _pairs(rows, options, name, values[0], value)
                base, other = (option_text(json.loads(text)) for text in (values[0], value))
                what = {"method": str(method), "option": name, "base": base, "value": other}
                measured += _measured(what, pairs) if len(pairs) else []
    return measured


def _pairs(
    rows: pd.DataFrame, options: Sequence[dict[str, object]], name: str, base: str, value: str
) -> pd.DataFrame:
    """Return runs with `base` beside those with `value`, everything else equal."""
    keys = ["instance", "seed", "rest"]
    rest = [json.dumps({k: v for k, v in c.items() if k != name}, sort_keys=True) for c in options]
    mine = [json.dumps(chosen.get(name)) for chosen in options]
    keyed = rows.assign(rest=rest, mine=mine).set_index(keys)
    before, after = keyed[keyed["mine"] == base], keyed[keyed["mine"] == value]
    columns = ["charged", "nodes", "objective", "kind"]
    both = before[columns].merge(after[columns], left_index=True, right_index=True, suffixes=("_0", "_1"))
    return both.reset_index()


def _measured(what: Mapping[str, Any], pairs: pd.DataFrame) -> Iterator[Effect]:
    heuristic = pairs["kind_0"].isin(HEURISTIC).all()
    other = ("objective", "objective", 0.0) if heuristic else ("nodes", "nodes", SHIFT_NODES)
    for measure, column, shift in (("time", "charged", SHIFT_SECONDS), other):
        before = pairs[f"{column}_0"].to_numpy(float) + shift
        after = pairs[f"{column}_1"].to_numpy(float) + shift
        good = np.isfinite(before) & np.isfinite(after) & (before > 0.0) & (after > 0.0)
        if not good.any():
            continue
        blocks = list(pairs["instance"][good])
        ratio = Interval(*map(math.exp, bootstrap_mean(np.log(after[good] / before[good]), blocks)))
        yield Effect(**what, measure=measure, ratio=ratio, pairs=len(blocks), blocks=len(set(blocks)))
