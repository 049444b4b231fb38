"""The registry: every method is found, lists its options and refuses others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cbs_opt.select.methods import available_methods, find_method
from cbs_opt.solving import solve
from formulations import BlockProblem, Count, Groups, NofM, verify
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, UnknownMethodError, UnknownOptionError, UnsupportedProblemError
from formulations.problem import PROGRAMS


def test_every_name_has_one_entry_a_program() -> None:
    methods = available_methods()
    entries = [(method.name, program) for method in methods for program in method.programs]
    assert len(set(entries)) == len(entries)
    for method in methods:
        assert method.summary
        assert method.kind in ("saliency", "search", "exact", "bound", "solver")
        for program in method.programs:
            assert find_method(method.name, program) is method
            assert callable(method.engine)


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UnknownMethodError, match="swap_search") as caught:
        find_method("swap_serch", "selection")
    assert caught.value.argument == "method"
    with pytest.raises(ArgumentError) as caught:
        find_method("magnitude", "both")
    assert caught.value.argument == "program"


def test_options_are_those_of_the_engine() -> None:
    for method in available_methods():
        for program in method.programs:
            known = method.options
            assert not {"limits", "incumbent", "warm", "blocks", "counts", "problem"} & set(known)
            method.check_options(dict(known), program)
            with pytest.raises(UnknownOptionError) as caught:
                method.check_options({"no_such_option": 1}, program)
            assert all(name in caught.value.remedy for name in known)


def test_a_solver_is_a_method_and_a_model_fixes_its_program() -> None:
    method = find_method("highs:selection_glover", "selection")
    assert method.programs == ("selection",)
    assert method.kind == "solver"
    with pytest.raises(UnsupportedProblemError) as caught:
        find_method("highs:selection_glover", "joint")
    assert caught.value.argument == "program"


def test_both_programs_have_a_search_and_an_exact_method() -> None:
    for program in PROGRAMS:
        kinds = {method.kind for method in available_methods() if program in method.programs}
        assert {"saliency", "search", "exact"} <= kinds


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("support", [Count(4), NofM(2, 4), Groups([0, 1, 1, 2, 0, 3, 3, 2], 2)], ids=str)
def test_every_method_keeps_to_the_support_or_names_those_that_do(support, program) -> None:
    rng = np.random.default_rng(0)
    problem = BlockProblem(
        weights=rng.normal(size=8),
        rows=rng.normal(size=(6, 8)),
        gradient=0.1 * rng.normal(size=8),
        damping=0.2,
        support=support,
    )
    least = enumerate_optimum(problem, program).objective
    methods = [method for method in available_methods() if program in method.programs]
    able = {method.name for method in methods if support.kind in method.supports}
    assert {"magnitude", "obs", "swap_search", "greedy_obs", "branch_and_bound", "lower_bound"} <= able
    for method in methods:
        if method.name in able:
            found = solve(problem, method.name, program=program)
            assert problem.allows(found.keep)
            assert found.objective >= least - 1e-10
            assert not verify(problem, found).wrong
        else:
            with pytest.raises(UnsupportedProblemError, match="branch_and_bound") as caught:
                solve(problem, method.name, program=program)
            assert caught.value.argument == "support"


def test_a_saliency_is_rounded_to_the_best_set_of_the_support() -> None:
    weights = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 40.0, 20.0, 30.0])
    problem = BlockProblem(weights=weights, hessian=np.eye(8), support=NofM(1, 4))
    assert np.flatnonzero(solve(problem, "obd", program="selection").keep).tolist() == [3, 5]


def test_to_list_the_methods_loads_no_engine() -> None:
    code = (
        "import sys, types\n"
        "package = types.ModuleType('cbs_opt')\n"
        "package.__path__ = ['cbs_opt']\n"
        "sys.modules['cbs_opt'] = package\n"
        "from cbs_opt.select.methods import available_methods, find_method\n"
        "assert available_methods() and find_method('swap_search', 'joint')\n"
        "sys.exit(' '.join({'torch', 'numba', 'pyomo', 'highspy', 'ortools'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
