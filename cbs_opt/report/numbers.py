"""Numbers as people read them: a bound is rounded down, a gap up, so that what is printed holds too."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

MISSING = "-"
"""An empty cell."""
OPTIMAL_GAP = 1e-6
"""Relative gap up to which a set counts as optimal, the default of `formulations.Limits`."""
PLAIN_DIGITS = 7
"""Digits before the decimal point up to which a number is written without an exponent."""


def number_text(value: float) -> str:
    """Return four digits of a number."""
    return f"{value:.4g}"


def percent_text(share: float, decimals: int = 2) -> str:
    """Return a share in per cent."""
    return f"{100.0 * share:.{decimals}f} %"


def bound_text(bound: float, digits: int = 6) -> str:
    """Return a lower bound rounded down."""
    return _rounded(bound, digits, ROUND_FLOOR)


def gap_text(gap: float) -> str:
    """Return a relative gap in per cent, rounded up to two digits; what counts as optimal as such."""
    return "< 0.0001 %" if gap <= OPTIMAL_GAP else f"{_rounded(100.0 * gap, 2, ROUND_CEILING)} %"


def seconds_text(value: float) -> str:
    """Return a time in seconds."""
    return f"{value:.2f} s" if value < 100.0 else f"{value:.0f} s"


def bytes_text(value: float) -> str:
    """Return a size of memory."""
    return f"{value / 2**20:,.0f} MiB" if value < 2**30 else f"{value / 2**30:.2f} GiB"


def _rounded(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return f"{value}"
    exact = Context(prec=digits, rounding=rounding).create_decimal(Decimal(value)).normalize()
    return f"{exact:f}" if -5 < exact.adjusted() < PLAIN_DIGITS else f"{exact:e}"
