"""What the pages of the documentation show works as shown."""

from __future__ import annotations

import importlib
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

import cbs_opt
from cbs_opt.cli import app, errors
from cbs_opt.recipe.files import load_request
from cbs_opt.select.methods import available_methods
from experiments.accuracy_page import table as accuracy_table
from formulations.models import MODELS
from formulations.solvers import solver_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
INCLUDE = re.compile(r'^--8<-- "(.*)"$', flags=re.MULTILINE)
FENCE = re.compile(r"^```(?: \{\.)?(python|sh)\}?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def with_includes(text: str) -> str:
    return INCLUDE.sub(lambda found: (ROOT / found[1]).read_text(), text)


def snippets(page: Path) -> list[tuple[str, str]]:
    return [(found[1], found[2]) for found in FENCE.finditer(with_includes(page.read_text()))]


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """Give the loggers their levels back, which a page sets."""
    loggers = [logging.getLogger(name) for name in ("cbs_opt", "cbs_opt.curvature", "formulations")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("logging_as_it_was")
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p)], ids=lambda p: p.stem)
def test_the_snippets_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, (language, text) in enumerate(snippets(page)):
        if language == "python":
            Path("snippet.py").write_text(text)
            # Each starts from the names of those above, as a reader's session would.
            names |= runpy.run_path("snippet.py", init_globals=names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "cbs-opt"
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, (number, line, result.output)


def test_every_public_name_that_the_pages_use_exists() -> None:
    used = {name for page in PAGES for name in re.findall(r"\bcbs\.([a-zA-Z]\w*)\(", page.read_text())}
    assert used
    assert used <= set(cbs_opt.__all__)


def test_the_api_page_has_the_public_names_in_seven_groups() -> None:
    page = (DOCS / "reference/api.md").read_text()
    named = re.findall(r"^::: cbs_opt\.(\w+)$", page, flags=re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) | {"BlockProblem", "BlockSolution", "Termination"} == set(cbs_opt.__all__) - {
        "__version__"
    }
    assert len(re.findall(r"^## ", page, flags=re.MULTILINE)) == 7


def test_the_reference_names_objects_that_exist() -> None:
    named = [
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    assert named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_the_catalogue_has_every_method_formulation_and_solver() -> None:
    hook = runpy.run_path(str(DOCS / "catalogue_hook.py"))
    page = hook["on_page_markdown"]((DOCS / "reference/catalogue.md").read_text())
    rows = set(re.findall(r"^\| `([\w:]+)` \|", page, flags=re.MULTILINE))
    assert rows == {method.name for method in available_methods()} | set(MODELS) | set(solver_names())
    assert "<!--" not in page


def test_the_page_of_the_command_line_has_every_command_with_its_options() -> None:
    hook = runpy.run_path(str(DOCS / "command_line_hook.py"))
    page = hook["on_page_markdown"]((DOCS / "reference/cli.md").read_text())
    assert "<!--" not in page
    listed = CliRunner().invoke(app, ["--help"]).output.partition("Commands:")[2]
    commands = re.findall(r"^  ([a-z]+) ", listed, flags=re.MULTILINE)
    assert re.findall(r"^## (\S+)$", page, flags=re.MULTILINE) == commands
    for command in commands:
        section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
        options = re.findall(r"(?<![\w-])--[a-z][\w-]*", CliRunner().invoke(app, [command, "--help"]).output)
        assert set(options) <= set(re.findall(r"--[a-z][\w-]*", section)), command


def test_exit_codes_are_those_of_the_command_line() -> None:
    page = (DOCS / "reference/cli.md").read_text()
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)}
    assert listed == {0, errors.ERROR, errors.USAGE, errors.UNCHECKED, errors.INTERRUPTED}


def test_recipes_that_the_pages_show_can_be_read(tmp_path: Path) -> None:
    shown = [
        text
        for page in PAGES
        for text in re.findall(r"^```toml\n(format = .*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    ]
    assert shown
    for text in shown:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        assert load_request(path).recipes


def test_the_page_of_accuracies_has_the_tables_of_its_file() -> None:
    page = (DOCS / "results/accuracy.md").read_text()
    figures = pd.read_csv(DOCS / "results/accuracy.csv")
    for network in figures["network"].unique():
        assert accuracy_table(figures, network) in page


def exercises() -> dict[str, str]:
    """The diffs of the page on extending, by the test file that comes with each."""
    page = (DOCS / "develop/extend.md").read_text()
    diffs = re.findall(r"^```diff\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return {re.findall(r"^\+\+\+ b/(tests/.*)$", diff, flags=re.MULTILINE)[0]: diff for diff in diffs}


def applied(diff: str, folder: Path, *options: str) -> None:
    command = ["git", "apply", *options, "-"]
    done = subprocess.run(command, input=diff, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("test", exercises())
def test_exercises_are_one_module_one_test_and_one_entry(test: str) -> None:
    diff = exercises()[test]
    applied(diff, ROOT, "--check")
    assert diff.count("--- /dev/null") == 2
    assert len(re.findall("^@@", diff, flags=re.MULTILINE)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("test", exercises())
def test_exercises_pass_their_tests(test: str, tmp_path: Path) -> None:
    def left_out(folder: str, names: list[str]) -> set[str]:
        built = {"runs", "site"} if Path(folder) == ROOT else {"figures"}
        return {name for name in names if name.startswith(".") or name in built}

    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    applied(exercises()[test], copy)
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", "-q", test]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_commands_by_hand_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    setup = (DOCS / "develop/setup.md").read_text()
    options = "-n auto --dist worksteal"
    for by_hand, in_make in (
        ("-c constraints.txt -e .\n", "$(INSTALL) -e .\n"),
        ('-c constraints.txt -e ".[dev]"', '$(INSTALL) -e ".[dev]"'),
        ("cbs-opt demo --out runs/demo", "cbs-opt demo --out $(OUT)"),
        (f"python -m pytest {options}\n", f"PYTEST_ARGS ?= {options}\n"),
    ):
        assert by_hand in setup
        assert in_make in makefile
