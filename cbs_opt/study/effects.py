"""What changing one option does, all else equal, with bootstrap confidence intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cbs_opt.study.statistics import HEURISTIC, SHIFT_NODES, SHIFT_SECONDS, charged_seconds, option_text
from formulations.problem import FloatArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with the limits of its confidence interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: FloatArray, groups: Sequence[object], seed: int = 0) -> Interval:
    """Return the percentile interval of a mean, drawing whole groups: runs on a block are not independent.

    Parameters
    ----------
    values : (runs,) float64 array
    groups : sequence
        The block of each value.
    seed : int, default 0

    Returns
    -------
    Interval
        At `CONFIDENCE`; of a single group all three are the same.
    """
    codes = pd.factorize(pd.Series(list(groups), dtype=object))[0]
    sums, counts = np.bincount(codes, weights=values), np.bincount(codes)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What changing one option does, all else equal.

    Attributes
    ----------
    method, option, base, value : str
        The option's value goes from `base` to `value`.
    measure : str
        "time", "nodes" or "objective".
    ratio : Interval
        Geometric mean of after over before, times and nodes shifted.
    pairs, blocks : int
        How many pairs of runs, on how many blocks.
    """

    method: str
    option: str
    base: str
    value: str
    measure: str
    ratio: Interval
    pairs: int
    blocks: int


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
    measures = {"time": ("charged", SHIFT_SECONDS)}
    measures |= {"objective": ("objective", 0.0)} if heuristic else {"nodes": ("nodes", SHIFT_NODES)}
    for measure, (column, shift) in measures.items():
        before = pairs[f"{column}_0"].to_numpy(float) + shift
        after = pairs[f"{column}_1"].to_numpy(float) + shift
        good = np.isfinite(before) & np.isfinite(after) & (before > 0.0) & (after > 0.0)
        if not good.any():
            continue
        blocks = pairs["instance"].to_numpy()[good]
        logs = bootstrap_mean(np.log(after[good] / before[good]), list(blocks))
        ratio = Interval(value=math.exp(logs.value), low=math.exp(logs.low), high=math.exp(logs.high))
        counts: dict[str, Any] = {"pairs": int(good.sum()), "blocks": len(set(blocks))}
        yield Effect(**what, measure=measure, ratio=ratio, **counts)
