"""Numbers as printed: a bound is still a bound, a gap no smaller than it is."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbs_opt.report.numbers import bound_text, gap_text


@settings(deadline=None)
@given(st.floats(-1e9, 1e9), st.integers(2, 12))
def test_what_is_printed_of_a_bound_is_a_bound(bound: float, digits: int) -> None:
    printed = bound_text(bound, digits)
    assert Fraction(printed) <= Fraction(bound)
    assert float(printed) == pytest.approx(bound, rel=10.0 ** (1 - digits), abs=1e-300)


@settings(deadline=None)
@given(st.floats(0.0, 10.0))
def test_what_is_printed_of_a_gap_is_no_smaller(gap: float) -> None:
    number = gap_text(gap).removeprefix("< ").removesuffix(" %")
    assert Fraction(number) >= Fraction(gap) * 100 * (1 - Fraction(1, 10**12))
