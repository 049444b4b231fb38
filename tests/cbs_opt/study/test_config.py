"""Study files: what they mean, and what is said about those that mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbs_opt.study.config import RunLimits, parse_study, read_study
from cbs_opt.study.expansion import combinations, expand, select
from cbs_opt.study.runner import TimeLeft, longest
from formulations.errors import ArgumentError
from formulations.instances import load_library, write_instance
from formulations.problem import BlockProblem

BLOCKS = {"library": ["digits_12_s50"]}
METHOD = {"program": "joint", "methods": ["magnitude"]}


def document(**changes: Any) -> dict[str, Any]:
    """A study of one run."""
    return {"instances": [BLOCKS], "methods": [METHOD], **changes}


def made_block(n: int, scale: float) -> BlockProblem:
    """A block for the factory source."""
    return BlockProblem(weights=np.ones(n), hessian=scale * np.eye(n), n_prune=n // 2)


def test_limits_are_inherited_and_overridden() -> None:
    study = parse_study(
        document(
            limits={"time_limit": 5, "threads": 2},
            methods=[METHOD, {**METHOD, "methods": ["obs"], "limits": {"time_limit": 9}, "seeds": [3, 4]}],
        )
    )
    assert study.methods[0].limits == RunLimits(time_limit=5, threads=2)
    assert study.methods[1].limits == RunLimits(time_limit=9, threads=2)
    assert (study.methods[0].seeds, study.methods[1].seeds) == ((0,), (3, 4))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"instances": []}, "instances"),
        ({"methods": [{"program": "joint"}]}, r"methods\[0\]"),
        ({"methods": [{"program": "both", "methods": ["obs"]}]}, r"methods\[0\].program"),
        ({"methods": [{**METHOD, "formulations": ["*"]}]}, "formulations"),
        ({"methods": [{**METHOD, "vary": "some"}]}, "vary"),
        ({"methods": [{**METHOD, "option": {}}]}, "did you mean options"),
        ({"methods": [{**METHOD, "options": {"a": []}}]}, "options.a"),
        ({"methods": [{**METHOD, "seeds": [-1]}]}, "seeds"),
        ({"limits": {"time_limit": -1}}, "limits.time_limit"),
        ({"limits": {"threads": 1.5}}, "limits.threads"),
        ({"limits": {"threads": 2**31}}, "limits.threads"),
        ({"limits": {"time": 1}}, "limits.time: unknown"),
        ({"limits": 3}, "limits"),
        ({"instances": [{"library": "digits_12_s50", "files": "a"}]}, "exactly one"),
        ({"instances": [{**BLOCKS, "sparsity": [1.5]}]}, "sparsity"),
        ({"instances": [{**BLOCKS, "damping": ["a"]}]}, "damping"),
        ({"instances": [{**BLOCKS, "arguments": {"n": 1}}]}, "arguments"),
        ({"instances": [{"factory": "no_colon"}]}, "module:function"),
        ({"name": 3}, "name"),
    ],
)
def test_what_makes_no_sense_is_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ArgumentError, match=where):
        parse_study(document(**changes))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"instances": [{"library": "no_such_*"}]}, "matches none"),
        ({"instances": [{"files": "*.npz"}]}, "matches no file"),
        ({"instances": [{"factory": "tests.cbs_opt.study.test_config:nothing"}]}, "nothing"),
        ({"instances": [{"factory": "json:dumps", "arguments": {"obj": 1}}]}, "not declared"),
        ({"instances": [{"factory": "os:system", "arguments": {"command": "exit"}}]}, "not declared"),
        ({"methods": [{**METHOD, "methods": ["magnitud"]}]}, "magnitud"),
        ({"methods": [{**METHOD, "options": {"colour": 1}}]}, "colour"),
        ({"methods": [{"program": "joint", "solvers": ["hihgs"]}]}, "hihgs"),
        ({"methods": [{"program": "joint", "solvers": ["highs"]}]}, "nothing to run"),
        ({"methods": [METHOD, {**METHOD, "limits": {"rel_gap": 0.5}}]}, "there twice"),
    ],
)
def test_what_cannot_be_run_is_named_before_anything_runs(
    changes: dict[str, Any], where: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=where):
        expand(parse_study(document(**changes), folder=tmp_path))


@pytest.mark.parametrize(
    ("line", "instead", "message"),
    [
        (2, "limits = { tme_limit = 5 }", r"limits.tme_limit: unknown \(line 2 .*did you mean time_limit"),
        (6, "librry = 3", r"instances\[1\].librry: unknown \(line 6"),
        (8, "", r"methods\[0\].program: none \(line 7"),
        (11, "method = 'obs'", r"methods\[1\].method: unknown \(line 11"),
        (13, "depth = []", r"methods\[1\].options.depth: an empty list \(line 13"),
        (13, "depth = [[1]]", r"methods\[1\].options.depth: \[1\] \(line 13"),
    ],
)
def test_the_line_of_what_is_wrong_is_named(line: int, instead: str, message: str, tmp_path: Path) -> None:
    lines = [
        'name = "a"',
        "limits = { time_limit = 5 }  # of each run",
        "[[instances]]",
        "library = 'digits_12_s50'",
        "[[instances]]",
        "library = 'digits_12_s80'",
        "[[methods]]",
        "program = 'joint'",
        "methods = 'obs'",
        "[[methods]]",
        "methods = 'branch_and_bound'",
        "[methods.options]",
        "depth = 3",
    ]
    lines[line - 1] = instead
    (tmp_path / "study.toml").write_text("\n".join(lines))
    with pytest.raises(ArgumentError, match=message):
        read_study(tmp_path / "study.toml")


def test_files_are_read_from_the_folder_of_the_study(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="no such file"):
        read_study(tmp_path / "study.toml")
    (tmp_path / "study.toml").write_text("name = ")
    with pytest.raises(ArgumentError, match="not TOML"):
        read_study(tmp_path / "study.toml")
    problem = load_library("digits_12_s80")[0]
    write_instance(tmp_path / "mine.npz", problem)
    (tmp_path / "study.toml").write_text(
        '[[instances]]\nfiles = "*.npz"\ndamping = [1e-4, 1e-3]\nsparsity = 0.25\n'
        '[[methods]]\nprogram = "joint"\nmethods = "obs"\n'
    )
    study = read_study(tmp_path / "study.toml")
    assert study.name == "study"
    runs = expand(study).runs
    assert [(run.recipe.name, run.damping, run.n_prune) for run in runs] == [
        ("mine damping=0.0001 sparsity=0.25", 1e-4, 3),
        ("mine damping=0.001 sparsity=0.25", 1e-3, 3),
    ]


def test_a_factory_is_called_with_every_combination() -> None:
    group = {
        "factory": "tests.cbs_opt.study.test_config:made_block",
        "arguments": {"n": [4, 6], "scale": [1.0, 2.0]},
    }
    runs = expand(parse_study(document(instances=[group]))).runs
    assert [run.n for run in runs] == [4, 4, 6, 6]
    assert len({run.block for run in runs}) == 4


def test_grids_are_whole_or_one_at_a_time() -> None:
    grid = {"a": (1, 2, 3), "b": (True, False)}
    assert len(list(combinations(grid, "all"))) == 6
    one = list(combinations(grid, "one"))
    base = {"a": 1, "b": True}
    assert one[0] == base
    assert len(one) == 4
    assert all(sum(chosen[name] != base[name] for name in base) == 1 for chosen in one[1:])
    assert list(combinations({}, "all")) == [{}]


def test_every_solver_meets_every_formulation_that_it_takes() -> None:
    group = {"program": ["selection", "joint"], "solvers": ["highs", "pyomo:scip"], "formulations": ["*mcc*"]}
    plan = expand(parse_study(document(methods=[group])))
    assert {run.method for run in plan.runs} == {
        "highs:selection_mccormick",
        "pyomo:selection_mccormick:scip",
    }
    assert len(plan.left_out) == 2


def test_the_fingerprint_changes_with_everything_that_decides_a_result() -> None:
    variants = [
        {},
        {"limits": {"time_limit": 7}},
        {"limits": {"memory_gib": 7}},
        {"seeds": [1]},
        {"instances": [{"library": "digits_12_s80"}]},
        {"methods": [{"program": "selection", "methods": ["magnitude"]}]},
        {"methods": [{"program": "joint", "methods": ["obs"]}]},
    ]
    prints = [expand(parse_study(document(**changes))).runs[0].fingerprint for changes in variants]
    assert len(set(prints)) == len(prints)
    again = expand(parse_study(document(limits={"warm_up": 1}, name="other"))).runs[0].fingerprint
    assert again == prints[0]


def test_filters_choose_by_glob_and_option() -> None:
    plan = expand(
        parse_study(
            document(
                instances=[{"library": ["digits_12_s*"]}],
                methods=[
                    {
                        "program": ["joint", "selection"],
                        "methods": ["branch_and_bound", "obs"],
                        "options": {},
                    },
                    {"program": "joint", "methods": ["outer_approximation"], "seeds": [0, 1]},
                ],
            )
        )
    )
    assert len(select(plan.runs, [])) == 18
    assert len(select(plan.runs, ["program=joint", "instance=*_s50,*_s80"])) == 8
    assert {run.seed for run in select(plan.runs, ["seed=1"])} == {1}
    assert select(plan.runs, ["n=12", "method=nothing"]) == []
    for wrong in ("joint", "colour=red"):
        with pytest.raises(ArgumentError, match="NAME=GLOB"):
            select(plan.runs, [wrong])


def test_the_time_left_starts_at_the_longest_and_learns() -> None:
    runs = expand(parse_study(document(seeds=[0, 1, 2, 3], limits={"time_limit": 10, "grace": 2}))).runs
    left = TimeLeft(runs, jobs=2)
    assert left.seconds == 24.0
    left.finished(runs[0], 1.0)
    assert left.seconds == pytest.approx(1.5)
    for run in runs[1:]:
        left.finished(run, 3.0)
    assert left.seconds == 0.0


@pytest.mark.parametrize("jobs", [1, 2, 3, 8])
def test_no_schedule_takes_longer_than_the_longest(jobs: int) -> None:
    times = [9.0, 1.0, 7.0, 30.0, 2.0, 5.0]
    made = []
    for seed, seconds in enumerate(times):
        limits = {"time_limit": seconds, "grace": 0}
        made += expand(parse_study(document(limits=limits, seeds=[seed]))).runs
    free = [0.0] * jobs
    for seconds in times:
        first = free.index(min(free))
        free[first] += seconds
    assert max(free) <= longest(made, jobs) + 1e-9


def test_an_option_that_an_installed_solver_lacks_is_refused_before_anything_runs() -> None:
    pytest.importorskip("highspy")
    posed = {"program": "selection", "solvers": "highs", "formulations": "selection_glover"}
    expand(parse_study(document(methods=[{**posed, "options": {"presolve": ["choose", "off"]}}])))
    with pytest.raises(ArgumentError, match="unknown to highs"):
        expand(parse_study(document(methods=[{**posed, "options": {"mip_no_such": [1]}}])))
