"""Which mutants are drawn, and which of them no test can tell from the original."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.stress.mutate import EQUIVALENT, SURVIVED, constant_doubled, listed, mutants, sample

MODULE = "formulations/relaxations/reduction_rounding.py"


@pytest.fixture(scope="module")
def everything():
    return list(mutants(MODULE))


def test_what_is_drawn_does_not_hang_on_the_place_of_the_code(everything):
    drawn = sample(everything, 0, 20)
    assert len(drawn) == 20
    moved = [replace(mutant, line=mutant.line + 7) for mutant in everything]
    assert [mutant.text for mutant in sample(moved, 0, 20)] == [mutant.text for mutant in drawn]
    # Code that was added takes places of those drawn last, and no others.
    more = sample([*mutants("formulations/relaxations/only_set.py"), *everything], 0, 20)
    old = [mutant for mutant in more if mutant.module == MODULE]
    assert old == drawn[: len(old)]
    assert sample(everything, 1, 20) != drawn
    assert len(sample(everything, 0, 10**6)) == len(everything)


def test_mutants_are_found_again_by_what_a_run_prints(everything):
    drawn = sample(everything, 0, 5)
    lines = ["", *(f"{SURVIVED}{mutant.text}" for mutant in drawn[:3]), *(m.text for m in drawn[3:])]
    texts = [mutant.text for mutant in listed(everything, lines)]
    assert set(texts) == {mutant.text for mutant in drawn}
    with pytest.raises(ValueError, match="no mutant has the text 'nothing'"):
        listed(everything, ["nothing"])


def test_one_rounding_more_is_as_valid_and_one_less_is_not(everything):
    for mutant in everything:
        counted = mutant.before.isdigit() and mutant.text not in EQUIVALENT
        if mutant.equivalent and counted:
            assert mutant.operator is constant_doubled
            assert int(mutant.after) == int(mutant.before) + 1
    assert any(mutant.equivalent for mutant in everything)
    assert not all(m.equivalent for m in everything if m.operator is constant_doubled)
