"""Small blocks of every regime: scale, rank, cancellation, damping, gradient, count, and bad numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from formulations.channels import ChannelTerm
from formulations.support import Groups, NofM, Support

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
SIZE_SHARES = (0.02, 0.06, 0.12, 0.2, 0.2, 0.14, 0.1, 0.07, 0.04, 0.02, 0.015, 0.015)
SMALLEST_NUMBER = 5e-324
DECADES = 12.0


def draw(seed: int) -> dict[str, Any]:
    """Arguments of `BlockProblem` for one block."""
    rng = np.random.default_rng([seed, 15])
    n = int(rng.choice(SIZES, p=SIZE_SHARES))
    rows = _rows(rng, n)
    weights = _weights(rng, n)
    if rng.random() < 0.3:
        # Badly scaled parameters: a weight and its column against each other, or freely.
        columns = 10.0 ** rng.uniform(-DECADES, DECADES, n)
        rows = rows * columns
        weights = weights / columns if rng.random() < 0.7 else weights
    unit = _unit(rng)
    rows = rows * unit
    mean = float((rows**2).sum()) / n or 1.0
    damping = 0.0 if rng.random() < 0.15 else mean * 10.0 ** rng.uniform(-18.0, 3.0)
    if rng.random() < 0.1:
        damping = float(10.0 ** rng.uniform(-16.0, 0.0))
    gradient = _gradient(rng, rows, weights, damping)
    arguments: dict[str, Any] = {
        "weights": weights,
        "damping": damping,
        "gradient": gradient,
        "n_prune": int(rng.choice([0, n])) if rng.random() < 0.15 else int(rng.integers(0, n + 1)),
    }
    if rng.random() < 0.25:
        arguments |= {"hessian": _hessian(rng, rows)}
    else:
        arguments |= {"rows": rows}
    if rng.random() < 0.05:
        arguments |= _special(rng, arguments)
    return arguments


def draw_with_support(seed: int) -> dict[str, Any]:
    """Arguments of `BlockProblem` for the block of `draw` with n of every m, or with groups."""
    arguments = draw(seed)
    rng = np.random.default_rng([seed, 18])
    size = arguments["weights"].size
    support: Support
    if rng.random() < 0.5:
        m = int(rng.choice([divisor for divisor in range(1, size + 1) if size % divisor == 0]))
        support = NofM(int(rng.integers(0, m + 1)), m)
    else:
        labels = rng.integers(0, int(rng.integers(1, size + 1)), size)
        support = Groups(labels.tolist(), int(rng.integers(0, np.unique(labels).size + 1)))
    del arguments["n_prune"]
    return arguments | {"support": support}


def draw_with_channels(seed: int) -> dict[str, Any]:
    """Arguments of `BlockProblem` for a block of `draw` or `draw_with_support` with a term over channels.

    The channels are of one or two moments, in the unit of the rows or far from it; some have lost inputs, and
    some have no curvature at all. A Hessian matrix becomes the moment of a single channel.
    """
    arguments = (draw, draw_with_support)[seed % 2](seed)
    rng = np.random.default_rng([seed, 19])
    n = arguments["weights"].size
    hessian = arguments.pop("hessian", None)
    if hessian is not None:
        one = ChannelTerm(moments=(hessian,), start=[0, n], moment=[0], scale=[1.0], inputs=np.arange(n))
        return arguments | {"rows": np.zeros((0, n)), "channels": one}
    start = np.array([0, *sorted(rng.choice(np.arange(1, n), int(rng.integers(0, n)), replace=False)), n])
    widths = np.diff(start)
    rows = arguments["rows"]
    unit = float((rows**2).sum()) / max(rows.size, 1) or 1.0
    if rng.random() < 0.2:
        unit *= 10.0 ** rng.uniform(-DECADES, DECADES)
    moments = []
    for _ in range(int(rng.integers(1, 3))):
        inputs = _rows(rng, int(widths.max()) + int(rng.integers(0, 3)))
        moments.append(unit * _hessian(rng, inputs))
    moment = rng.integers(0, len(moments), widths.size)
    lines = [
        np.sort(rng.choice(len(moments[which]), width, replace=False))
        for which, width in zip(moment, widths, strict=True)
    ]
    scale = rng.uniform(0.1, 2.0, widths.size) * (rng.random(widths.size) < 0.95)
    term = ChannelTerm(
        moments=tuple(moments), start=start, moment=moment, scale=scale, inputs=np.concatenate(lines)
    )
    return arguments | {"channels": term}


def _special(rng: np.random.Generator, arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace what a block is made of by nothing, by zeros, by denormal numbers or by copies."""
    n = arguments["weights"].size
    kind = int(rng.integers(0, 7))
    if kind == 0:
        return {"weights": np.zeros(n)}
    if kind == 1 and "rows" in arguments:
        return {"rows": np.zeros((0, n)), "damping": float(10.0 ** rng.uniform(-DECADES, DECADES))}
    if kind == 2:
        return {"gradient": rng.normal(size=n) * SMALLEST_NUMBER * 10.0 ** rng.uniform(0.0, 16.0)}
    if kind == 3:
        model = "rows" if "rows" in arguments else "hessian"
        array = arguments[model].copy()
        if array.size:
            array[-1, -1] = SMALLEST_NUMBER * float(10.0 ** rng.uniform(0.0, 16.0))
        return {model: array}
    if kind == 4:
        return {"damping": float(rng.choice([SMALLEST_NUMBER, 1e-139]))}
    if kind == 5:
        return {"weights": np.full(n, arguments["weights"][0])}
    return {"weights": np.where(rng.random(n) < 0.5, SMALLEST_NUMBER, arguments["weights"])}


def _rows(rng: np.random.Generator, n: int) -> np.ndarray:
    m = int(rng.integers(0, 2 * n + 2)) if rng.random() < 0.7 else int(rng.integers(1, 4))
    kind = rng.integers(0, 6)
    if kind == 0:
        rows = rng.integers(-2, 3, size=(m, n)).astype(np.float64)
    elif kind == 1:
        rank = int(rng.integers(1, n + 1))
        rows = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
    elif kind == 2:
        rows = np.eye(n) + 0.3
    else:
        rows = rng.normal(size=(m, n)) / np.sqrt(max(m, 1))
    if rng.random() < 0.15 and n > 1:
        half = n // 2
        rows[:, half : 2 * half] = rows[:, :half] * rng.choice([1.0, -1.0, 1.0 + 1e-9])
    if rng.random() < 0.1:
        rows[:, rng.random(n) < 0.4] = 0.0
    return rows


def _weights(rng: np.random.Generator, n: int) -> np.ndarray:
    kind = rng.integers(0, 8)
    weights = rng.normal(size=n)
    if kind == 0:
        weights = np.ones(n)
    elif kind == 1:
        weights = rng.integers(-3, 4, size=n).astype(np.float64)
    elif kind == 2:
        weights = weights * 10.0 ** rng.uniform(-DECADES, DECADES, n)
    elif kind == 3:
        weights = np.ones(n)
        weights[0] = 1e10
    elif kind == 4:
        weights[rng.random(n) < 0.4] = 0.0
    if rng.random() < 0.02:
        weights[int(rng.integers(n))] = SMALLEST_NUMBER
    return weights


def _unit(rng: np.random.Generator) -> float:
    chance = rng.random()
    if chance < 0.5:
        return 1.0
    if chance < 0.9:
        return float(10.0 ** rng.uniform(-DECADES, DECADES))
    return float(10.0 ** rng.uniform(-90.0, 80.0))


def _gradient(
    rng: np.random.Generator, rows: np.ndarray, weights: np.ndarray, damping: float
) -> np.ndarray | None:
    kind = rng.integers(0, 6)
    if kind < 2:
        return None
    if kind == 2:
        return rows.T @ (rows @ weights)
    if kind == 3:
        return rows.T @ rng.normal(size=rows.shape[0])
    if kind == 4:
        return np.zeros(weights.size)
    size = np.sqrt((rows**2).sum(axis=0) + damping)
    return (
        rng.normal(size=weights.size) * size * np.abs(weights * size).max() * 10.0 ** rng.uniform(-3.0, 6.0)
    )


def _hessian(rng: np.random.Generator, rows: np.ndarray) -> np.ndarray:
    hessian = rows.T @ rows
    hessian = 0.5 * (hessian + hessian.T)
    chance = rng.random()
    if chance < 0.1:
        hessian = np.diag(np.diagonal(hessian).copy())
        hessian[-1, -1] = -1e-11 * float(np.abs(hessian).mean())
    elif chance < 0.2:
        # As a float32 accumulation would leave it.
        hessian = hessian.astype(np.float32).astype(np.float64)
    return hessian
