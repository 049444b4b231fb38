"""The fuzzer: readers get through it, and it sees the readers that would not."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from formulations.errors import InstanceFormatError
from tests.stress.file_mutations import BLIND, Payload
from tests.stress.fuzz_files import Target, fuzz, judge, targets


def bad(outcomes) -> list[str]:
    return [f"{o.target} {o.number}: {o.note}" for o in outcomes if o.result in ("crash", "wrong")]


def test_corrupted_files_are_refused_or_read_as_they_were_written() -> None:
    outcomes = list(fuzz(180, seed=1, progress=False))
    assert not bad(outcomes)
    assert len(outcomes) > 170, "hardly a mutation leaves a file as it is"
    assert {outcome.target for outcome in outcomes} == {target.name for target in targets()}
    assert {outcome.mutation for outcome in outcomes} > {mutation.__name__ for mutation in BLIND}
    assert Counter(outcome.result for outcome in outcomes)["refused"] > 110


@pytest.mark.slow
def test_ten_thousand_corrupted_files() -> None:
    assert not bad(fuzz(10_000, seed=2, progress=False))


def test_a_case_is_the_same_when_repeated() -> None:
    (alone,) = fuzz(1, seed=1, only=17, progress=False)
    assert alone.result == "refused"
    (again,) = (outcome for outcome in fuzz(20, seed=1, progress=False) if outcome.number == 17)
    assert (alone.target, alone.mutation, alone.result) == (again.target, again.mutation, again.result)
    assert again.note


def reader(result: list[str] | Exception) -> Target:
    def read(folder: Path) -> list[str]:
        if isinstance(result, Exception):
            raise result
        return result

    return Target(name="x", file="x", write=lambda folder: None, read=read, clever=BLIND[0], partial=True)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (["a", "b"], "same"),
        (["b"], "part"),
        (["a", "a"], "wrong"),
        (["a", "c"], "wrong"),
        (InstanceFormatError("path", "x", "y"), "refused"),
        (ValueError("x"), "crash"),
        (MemoryError(), "crash"),
    ],
)
def test_what_a_reader_does_is_judged(found, expected, tmp_path) -> None:
    assert judge(reader(found), tmp_path, ["a", "b"])[0] == expected


def test_a_reader_that_runs_a_pickle_is_seen(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Payload, "trace", tmp_path / "ran")

    def read(folder: Path) -> list[str]:
        pickle.loads(pickle.dumps(Payload()))  # noqa: S301
        return []

    target = Target(name="x", file="x", write=lambda folder: None, read=read, clever=BLIND[0])
    assert judge(target, tmp_path, [])[0] == "crash"


def test_blind_mutations_change_the_bytes() -> None:
    content = bytes(range(256)) * 4
    for mutation in BLIND:
        changed = [mutation(content, np.random.default_rng(seed)) != content for seed in range(20)]
        assert sum(changed) >= 18, mutation.__name__
