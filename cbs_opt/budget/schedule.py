"""Sparsity stage by stage: how a run of several stages gets to its target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from cbs_opt.budget.counts import checked_sparsity
from cbs_opt.system.checks import whole_number
from formulations.errors import ArgumentError
from formulations.support import NofM

Schedule = str | Sequence[float]
"""A rule of `SCHEDULES`, or the sparsities themselves."""
SCHEDULES = ("geometric", "polynomial", "linear")


def sparsity_schedule(
    target: float, *, stages: int, schedule: Schedule = "geometric", start: float | None = None
) -> tuple[float, ...]:
    """Return the sparsity of every stage, never falling, the last one exactly `target`.

    Geometric: the kept share shrinks by the same factor every time, so that the last stages take the fewest
    weights. Polynomial: the cubic of Zhu and Gupta, "To prune, or not to prune" (2017), which also slows down
    towards the end. Linear: the same number of weights a stage. A sequence gives the sparsities, one a stage.
    The target is in [0, 1); `start` is the sparsity of the first stage, by default the dense network counts
    as stage 0 of the rule. Raises `ArgumentError` if the rule is unknown, `start` exceeds `target`, or a
    sequence falls, has another length than `stages` or another end than `target`.
    """
    last = checked_sparsity("sparsity", target)
    whole_number("stages", stages)
    if not isinstance(schedule, str):
        return _checked(tuple(schedule), last, stages)
    if schedule not in SCHEDULES:
        remedy = f"use one of {', '.join(SCHEDULES)} or the sparsities"
        raise ArgumentError("schedule", f"{schedule!r}", remedy)
    if start is None:
        return (*(_between(schedule, 0.0, last, t / stages) for t in range(1, stages)), last)
    first = checked_sparsity("start", start)
    if first > last:
        raise ArgumentError("start", f"{first:g} for a target of {last:g}", "start at or below the target")
    return (*(_between(schedule, first, last, t / (stages - 1)) for t in range(stages - 1)), last)


def pattern_schedule(pattern: NofM, sparsities: Sequence[float], *, exact: bool) -> tuple[float, ...]:
    """Return the sparsity of every stage of a pattern n:m, each that of a looser pattern of the same m.

    Every stage takes at least one weight more of each m than the one before, else as close to `sparsities` as
    there are patterns; `exact` ones are those of patterns already. Raises `ArgumentError` if there are more
    stages than that, or exact ones are none of patterns.
    """
    kept = [(1.0 - share) * pattern.m for share in sparsities]
    if exact:
        if any(abs(count - round(count)) > 1e-6 for count in kept):
            found = f"{list(sparsities)} for {pattern}"
            remedy = f"give shares k / {pattern.m}, whose patterns lead to {pattern}"
            raise ArgumentError("schedule", found, remedy)
        return tuple((pattern.m - round(count)) / pattern.m for count in kept)
    stages, most = len(sparsities), max(1, pattern.m - pattern.n)
    if stages > most:
        found = f"{stages} for {pattern}, where each takes at least one more of every {pattern.m} weights"
        raise ArgumentError("stages", found, f"use at most {most}")
    counts = [pattern.m]
    for number, count in enumerate(kept, 1):
        counts.append(min(counts[-1] - 1, max(pattern.n + stages - number, round(count))))
    counts[-1] = pattern.n
    return tuple((pattern.m - count) / pattern.m for count in counts[1:])


def _between(schedule: str, first: float, last: float, time: float) -> float:
    """Return the sparsity of a rule at `time` in [0, 1]."""
    if schedule == "geometric":
        return float(1.0 - (1.0 - first) * ((1.0 - last) / (1.0 - first)) ** time)
    if schedule == "polynomial":
        return float(last + (first - last) * (1.0 - time) ** 3)
    return first + (last - first) * time


def _checked(sparsities: tuple[float, ...], target: float, stages: int) -> tuple[float, ...]:
    shares = tuple(checked_sparsity("schedule", value) for value in sparsities)
    if len(shares) != stages or not shares:
        raise ArgumentError("schedule", f"{len(shares)} sparsities for {stages} stages", "give one a stage")
    if any(later < earlier for earlier, later in pairwise(shares)):
        raise ArgumentError("schedule", f"{list(shares)}, which falls", "give sparsities that never fall")
    if shares[-1] != target:
        found = f"an end of {shares[-1]:g} for a sparsity of {target:g}"
        raise ArgumentError("schedule", found, "let the last sparsity be the target")
    return shares
