"""Groups are chosen by the program of their readers: against direct solutions, enumeration, exact methods."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cbs_opt.structure import leaps
from cbs_opt.structure.leaps import applies, search
from cbs_opt.structure.selection import GroupProgram, Reader
from cbs_opt.structure.widths import Cost, choose_widths, enumerated_widths
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError


def program(seed: int = 0, n_groups: int = 6) -> GroupProgram:
    """Two readers of the same groups, of two inputs and of one; the first has inputs of no group."""
    rng = np.random.default_rng(seed)
    readers = []
    for outputs, k, others in ((3, 2, 2), (4, 1, 0)):
        p = n_groups * k + others
        x, g = rng.normal(size=(40, p)) @ rng.normal(size=(p, p)), rng.normal(size=(30, outputs))
        readers.append(
            Reader(
                weight=rng.normal(size=(outputs, p)),
                gram=x.T @ x / 40 + 0.1 * np.eye(p),
                outputs=g.T @ g / 30,
                columns=others // 2 + np.arange(n_groups * k).reshape(n_groups, k),
            )
        )
    return GroupProgram(readers)


def direct(made: GroupProgram, keep: np.ndarray) -> float:
    """The loss of the best weights, by least squares with the columns that stay."""
    total = 0.0
    for reader, weight in zip(made.readers, made.updated(keep), strict=True):
        step = weight - reader.weight
        total += 0.5 * float(np.trace(reader.outputs @ step @ reader.gram @ step.T))
        kept = reader.columns[keep].reshape(-1)
        # At the optimum nothing that stays can gain: the gradient vanishes there.
        assert np.abs((step @ reader.gram)[:, kept]).max(initial=0.0) < 1e-8
        assert not weight[:, reader.columns[~keep].reshape(-1)].any()
    return total


def masks(n: int, n_keep: int) -> list[np.ndarray]:
    return [np.isin(np.arange(n), kept) for kept in combinations(range(n), n_keep)]


def test_the_loss_is_that_of_the_updated_weights() -> None:
    made = program()
    for keep in masks(6, 3):
        assert made.loss(keep) == pytest.approx(direct(made, keep))


def test_greedy_adds_up_saliencies_and_swaps_never_lose() -> None:
    made = program(1)
    keep, losses = made.greedy(2)
    assert losses.size == 5
    assert losses[-1] == pytest.approx(made.loss(keep))
    assert (np.diff(losses) >= 0).all()
    first = [made.loss(np.arange(6) != group) for group in range(6)]
    assert losses[1] == pytest.approx(min(first))
    better, value = made.swaps(keep)
    assert value <= losses[-1] * (1 + 1e-12)
    assert int(better.sum()) == 2


@pytest.mark.parametrize("seed", range(3))
def test_the_block_of_a_program_has_the_same_optimum(seed: int) -> None:
    made = program(seed)
    best = min(made.loss(keep) for keep in masks(6, 3))
    found = enumerate_optimum(made.problem(3), "joint")
    assert found.objective == pytest.approx(best)
    assert made.enumerated(3)[1] == best
    assert made.swaps(made.greedy(3)[0])[1] >= best * (1 - 1e-12)


def tables(seed: int) -> tuple[dict[str, np.ndarray], list[Cost]]:
    rng = np.random.default_rng(seed)
    errors = {name: np.sort(rng.random(size))[::-1] for name, size in (("a", 4), ("b", 3), ("c", 5))}
    costs = [
        Cost(sets=("a",), table=np.sort(rng.random(4))),
        Cost(sets=("a", "b"), table=rng.random((4, 3))),
        Cost(sets=("c", "b"), table=rng.random((5, 3))),
    ]
    return errors, costs


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_agrees_with_enumeration_and_states_its_gap(seed: int) -> None:
    errors, costs = tables(seed)
    wanted = enumerated_widths(errors, costs, 1.6, fixed=0.1)
    assert wanted is not None
    found = choose_widths(errors, costs, 1.6, fixed=0.1)
    assert found.error == pytest.approx(wanted.error)
    assert found.cost <= 1.6 + 1e-9
    assert found.gap < 1e-6
    assert found.bound <= wanted.error


def test_a_budget_below_the_smallest_network_is_named_with_what_is_enough() -> None:
    errors, costs = tables(0)
    with pytest.raises(ArgumentError, match=r"budget: 0\.001, and the cheapest choice costs"):
        choose_widths(errors, costs, 0.001)
    assert enumerated_widths(errors, costs, 0.001) is None


def test_tables_that_do_not_fit_are_refused() -> None:
    errors, costs = tables(0)
    with pytest.raises(ArgumentError, match="costs: a table of"):
        choose_widths(errors, [*costs, Cost(sets=("d",), table=np.ones(3))], 1.0)
    with pytest.raises(ArgumentError, match=r"costs: a table of shape \(3,\)"):
        choose_widths(errors, [Cost(sets=("a",), table=np.ones(3))], 1.0)
    with pytest.raises(ArgumentError, match=r"errors\['a'\]: NaN"):
        choose_widths(errors | {"a": np.full(4, np.nan)}, costs, 1.0)


def neurons(seed: int, n: int = 9) -> GroupProgram:
    """Two readers of single inputs, with a bias that always stays."""
    rng = np.random.default_rng(seed)
    readers = []
    for outputs in (3, 4):
        x, g = rng.normal(size=(40, n + 1)) @ rng.normal(size=(n + 1, n + 1)), rng.normal(size=(30, outputs))
        gram, metric = x.T @ x / 40 + 0.1 * np.eye(n + 1), g.T @ g / 30
        weight, columns = rng.normal(size=(outputs, n + 1)), rng.permutation(n)[:, None]
        readers.append(Reader(weight=weight, gram=gram, outputs=metric, columns=columns))
    return GroupProgram(readers)


@pytest.mark.parametrize(("seed", "n_keep"), [(0, 1), (1, 3), (2, 4), (3, 6), (4, 8)])
def test_leaps_and_bounds_find_the_optimum_of_enumeration_from_any_start(seed: int, n_keep: int) -> None:
    made = neurons(seed)
    best = min(made.loss(keep) for keep in masks(9, n_keep))
    for start in (made.greedy(n_keep)[0], np.arange(9) < n_keep):
        found = search(made, start, seconds=60.0)
        assert found.loss == pytest.approx(best)
        assert int(found.keep.sum()) == n_keep
        assert best * (1 - 1e-6) <= found.bound <= best
    # A search calls what `cbs-opt prepare` compiled, and compiles nothing after its clock has started.
    assert len(getattr(leaps.explore, "signatures", [()])) == 1


def test_a_search_that_is_cut_short_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaps, "NODES", 2)
    made = neurons(5)
    best = min(made.loss(keep) for keep in masks(9, 4))
    found = search(made, np.arange(9) < 4, seconds=0.0)
    assert 0.0 < found.bound <= best <= found.loss <= made.loss(np.arange(9) < 4)


def test_only_small_sets_of_single_inputs_are_searched() -> None:
    assert applies(neurons(0))
    assert not applies(program())
    assert not applies(neurons(0, 65))
