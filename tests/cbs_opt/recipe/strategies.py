"""Records of every kind, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from cbs_opt.budget.schedule import SCHEDULES
from cbs_opt.curvature.kinds import FISHERS
from cbs_opt.recipe.records import Absolute, Certify, Recipe, Request, Stages, Update, Weights
from cbs_opt.recipe.select import SELECTS, Exact, SwapSearch

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
counts = st.integers(1, 10**6) | st.integers(1, 10**6).map(np.int64)
positive = st.floats(1e-12, 1e12) | st.floats(0.5, 1024.0, width=32).map(np.float32)
numbers = st.just(0) | positive
shares = st.floats(0.0, 1.0, exclude_max=True)
programs = st.sampled_from(("selection", "joint"))
limits = st.none() | numbers
plain = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
fishers = st.sampled_from(sorted(FISHERS)).flatmap(
    lambda kind: counts.flatmap(
        lambda samples: st.builds(
            FISHERS[kind],
            samples=st.just(samples),
            **({} if kind == "exact_fisher" else {"per_row": st.integers(1, int(samples))}),
        )
    )
)
dampings = numbers | st.builds(Absolute, numbers)
globs = text | st.lists(text, max_size=3).map(tuple)
chosen: dict[str, Any] = {"target": st.none() | globs, "ignore": globs}
cut = st.none() | st.sampled_from(("layer", "row")) | counts
weights = (
    st.builds(Weights, blocks=st.just("global"), **chosen)
    | st.builds(Weights, blocks=cut, budget=st.just("uniform"), **chosen)
    | st.builds(
        Weights,
        blocks=cut,
        budget=st.just("global") | st.dictionaries(text, shares, max_size=3),
        budget_score=st.none() | text,
        **chosen,
    )
)
updates = st.builds(Update, kind=st.sampled_from(("cbs", "independent")), scale=positive)
SWAP: dict[str, Any] = {
    "max_swaps": st.none() | st.just(0) | counts,
    "tolerance": limits,
    "repeats": counts,
    "time_limit": limits,
}
starts = st.lists(text, max_size=3)
free = st.none() | text | starts.filter(bool).map(tuple)
varied = st.none() | starts.map(lambda names: (*names, "randomized_magnitude", "greedy_obs"))
restarts = st.none() | st.just(0) | counts
swaps = (
    st.builds(SwapSearch, program=programs, start=free, **SWAP)
    | st.builds(SwapSearch, program=programs, start=varied, spread=limits, **SWAP)
    | st.builds(SwapSearch, start=free, restarts=restarts, **SWAP)
    | st.builds(SwapSearch, start=varied, drops=st.none() | counts, **SWAP)
)
simple = st.sampled_from([record for name, record in SELECTS.items() if name != "swap_search"]).flatmap(
    lambda record: st.builds(record, program=programs, time_limit=limits)
)
exact = st.builds(
    Exact,
    method=text.filter(lambda name: name not in SELECTS),
    options=st.dictionaries(text, plain, max_size=3),
    program=programs,
    time_limit=limits,
    repeats=counts,
)
selects = swaps | simple | exact
recipes = st.builds(
    Recipe,
    curvature=fishers,
    layer_inputs=st.none() | numbers,
    damping=dampings,
    selection_damping=st.none() | dampings,
    gradient=st.booleans(),
    weights=weights,
    select=st.none() | selects,
    update=st.none() | updates,
    choice_samples=st.none() | counts,
)


@st.composite
def stages(draw: st.DrawFn, target: float) -> Stages:
    """Stages that end at `target`."""
    steps = {"updates": draw(counts), "final_updates": draw(st.just(0) | counts)}
    steps["gradient_samples"] = draw(st.none() | counts)
    if draw(st.booleans()):
        schedule = (*sorted(draw(st.lists(st.floats(0.0, target), max_size=3))), target)
        return Stages(count=len(schedule), schedule=schedule, **steps)
    start = draw(st.none() | st.floats(0.0, target))
    rule = draw(st.sampled_from(SCHEDULES))
    return Stages(count=draw(st.integers(1, 9)), schedule=rule, start=start, **steps)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Requests of one recipe or of several that differ in what they may."""
    first = draw(recipes)
    varied = Recipe.grid(first, damping=draw(st.lists(numbers, min_size=1, max_size=3)))
    sparsity = draw(shares)
    certify = draw(st.none() | st.builds(Certify, time_limit=limits))
    plan = None
    if certify is None and draw(st.booleans()):
        plan = draw(stages(sparsity))
        steps = [draw(updates.filter(lambda update: update.kind == "cbs"))]
        varied = Recipe.grid(varied[0], update=steps, damping=[recipe.damping for recipe in varied])
    return Request(
        sparsity=sparsity, recipes=tuple(varied), stages=plan, certify=certify, seed=draw(st.just(0) | counts)
    )
