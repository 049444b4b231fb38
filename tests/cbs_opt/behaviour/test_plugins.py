"""Methods and solvers of other packages: they take part, are checked, and broken ones are named."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import cbs_opt as cbs
from cbs_opt.select.methods import available_methods, find_method
from cbs_opt.study.config import parse_study
from cbs_opt.study.expansion import expand
from formulations import plugins
from formulations.errors import UnknownMethodError, UnknownOptionError
from formulations.instances import load_library
from formulations.plugins import PluginError
from formulations.solvers import available_solvers, models_for
from tests.cbs_opt.study.foreign import WELL_BEHAVED, installed, write_misbehaved, write_package

ROOT = Path(__file__).parents[3]
TEMPLATE = ROOT / "docs" / "plugin_template"

SOLVER = """
from formulations.models import INTEGER, QUADRATIC_OBJECTIVE
from formulations.solvers.base import Probe, RawResult, Solver

def run(task):
    "Hand the start back: a solver that finds nothing better."
    point = task.form.lower.copy()
    point[: task.start_values.size] = task.start_values
    return RawResult(message="the start")

SOLVER = Solver(
    name="lazy",
    capabilities=frozenset({INTEGER, QUADRATIC_OBJECTIVE}),
    probe=lambda: Probe(version="1.0"),
    run=run,
    option_names=lambda: ("effort",),
    reserved={},
)
"""


@pytest.fixture
def block() -> cbs.BlockProblem:
    return load_library("digits_12_s50")[0]


@pytest.fixture
def with_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_misbehaved(tmp_path)
    with installed(tmp_path, monkeypatch):
        yield tmp_path


@pytest.mark.usefixtures("with_foreign")
def test_a_foreign_method_takes_part(block: cbs.BlockProblem) -> None:
    method = find_method("consecutive", "joint")
    assert method.summary == "Prune consecutive weights, from a given one on."
    assert dict(method.options) == {"shift": 0}
    solution = cbs.solve(block, "consecutive", program="selection", shift=2)
    assert list(solution.pruned) == [2, 3, 4, 5, 6, 7]
    table = cbs.compare(block, program="joint", methods=["consecutive", "enumeration"])
    assert list(table["status"]) == ["feasible", "optimal"]
    with pytest.raises(UnknownOptionError, match="shift"):
        cbs.solve(block, "consecutive", program="joint", shft=2)


@pytest.mark.usefixtures("with_foreign")
def test_a_foreign_method_takes_part_in_studies_and_not_in_others_names() -> None:
    study = parse_study(
        {
            "instances": [{"library": "digits_12_s50"}],
            "methods": [{"program": "joint", "methods": "consecutive", "options": {"shift": [0, 1]}}],
        }
    )
    assert [dict(run.options) for run in expand(study).runs] == [{"shift": 0}, {"shift": 1}]


@pytest.mark.usefixtures("with_foreign")
@pytest.mark.parametrize(("name", "what"), [("liar", "recomputed"), ("mute", "NoneType")])
def test_an_answer_that_is_none_is_not_compared(name: str, what: str, block: cbs.BlockProblem) -> None:
    with pytest.raises(PluginError, match=what):
        cbs.solve(block, name, program="joint")
    table = cbs.compare(block, program="joint", methods=[name, "magnitude"])
    assert list(table["status"]) == ["error", "feasible"]
    assert table["excess"].iloc[1] == 0.0


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("import no_such_module_at_all", "broken:METHOD", "no_such_module_at_all"),
        ("def broken(:", "broken:METHOD", "SyntaxError"),
        ("raise SystemExit(4)", "broken:METHOD", "SystemExit: 4"),
        ("METHOD = 7", "broken:METHOD", "it is a int"),
        ("METHOD = 7", "broken:OTHER", "OTHER"),
    ],
)
def test_a_broken_package_is_named_and_nothing_else_suffers(
    source: str,
    target: str,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_package(tmp_path, "broken", source, {"crack": target}, plugins.METHODS)
    with installed(tmp_path, monkeypatch), caplog.at_level(logging.WARNING):
        names = {method.name for method in available_methods()}
        available_methods()
        with pytest.raises(UnknownMethodError, match="magnitude"):
            find_method("crack", "joint")
        sys.modules.pop("broken", None)
    assert "magnitude" in names
    assert "crack" not in names
    (warning,) = caplog.messages
    assert all(word in warning for word in ("'crack'", "broken 1.0", reason))


def test_our_names_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_package(tmp_path, "consecutive", WELL_BEHAVED, {"magnitude": "consecutive:solve"}, plugins.METHODS)
    ours = find_method("magnitude", "joint").summary
    with installed(tmp_path, monkeypatch), caplog.at_level(logging.WARNING):
        assert find_method("magnitude", "joint").summary == ours
    assert "the name is taken" in caplog.text


def test_a_foreign_solver_takes_every_formulation_that_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: cbs.BlockProblem
) -> None:
    write_package(tmp_path, "lazy_package", SOLVER, {"lazy": "lazy_package:SOLVER"}, plugins.SOLVERS)
    with installed(tmp_path, monkeypatch):
        assert "lazy" in {info.name for info in available_solvers()}
        assert "selection_qp" in models_for("lazy", "selection")
        assert "joint_perspective" not in models_for("lazy", "joint")
        greedy = cbs.solve(block, "greedy_obs", program="selection")
        for name in ("lazy", "lazy:selection_mccormick"):
            solution = cbs.solve(block, name, program="selection", incumbent=greedy, effort=1)
            assert solution.objective is not None
            assert greedy.objective is not None
            assert solution.objective <= greedy.objective
            assert not solution.proved
        with pytest.raises(UnknownOptionError, match="effort"):
            cbs.solve(block, "lazy", program="selection", efort=1)


def test_the_template_is_short_and_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: cbs.BlockProblem
) -> None:
    source = (TEMPLATE / "random_sets.py").read_text()
    code = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith('"""')]
    assert len(code) <= 40
    assert 'random_sets = "random_sets:METHOD"' in (TEMPLATE / "pyproject.toml").read_text()
    write_package(tmp_path, "random_sets", source, {"random_sets": "random_sets:METHOD"}, plugins.METHODS)
    with installed(tmp_path, monkeypatch):
        few = cbs.solve(block, "random_sets", program="joint", draws=3, seed=1)
        many = cbs.solve(block, "random_sets", program="joint", draws=300, seed=1)
        stopped = cbs.solve(block, "random_sets", program="joint", time_limit=0.0)
        sys.modules.pop("random_sets", None)
    assert many.objective is not None
    assert few.objective is not None
    assert many.objective <= few.objective
    assert many.stats.iterations == 300
    assert stopped.stats.iterations == 0
    assert np.isfinite(many.objective)


@pytest.mark.slow
def test_the_template_installs_into_a_clean_environment(tmp_path: Path) -> None:
    """Both packages from wheels; the libraries they need are those of this environment."""
    wheels = tmp_path / "wheels"
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    template = shutil.copytree(TEMPLATE, tmp_path / "template")
    for source in (ROOT, template):
        build = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(wheels), str(source)]
        subprocess.run(build, check=True, capture_output=True)
    venv.create(tmp_path / "clean", with_pip=False, symlinks=True)
    base = str(tmp_path / "clean")
    paths = sysconfig.get_paths(
        sysconfig.get_preferred_scheme("prefix"), vars={"base": base, "platbase": base}
    )
    python = f"{paths['scripts']}/python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*pip, *map(str, wheels.glob("*.whl"))], check=True, capture_output=True)
    (Path(paths["purelib"]) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    study = tmp_path / "study.toml"
    study.write_text(
        'limits = { time_limit = 20 }\n[[instances]]\nlibrary = "digits_12_s50"\n'
        '[[methods]]\nprogram = "joint"\nmethods = ["random_sets", "enumeration"]\n'
        "[methods.options]\n"
    )

    def command(*arguments: str) -> str:
        ran = subprocess.run(
            [python, "-m", "cbs_opt", *arguments], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        return ran.stdout

    assert "random_sets" in command("methods")
    assert "random_sets" in command(
        "compare", "digits_12_s50", "--program", "joint", "--method", "random_sets,magnitude"
    )
    assert "2 of 2 runs done" in command("study", "study.toml", "--out", "out")
    assert "| random_sets |" in command("report", "out")
