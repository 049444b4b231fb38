"""What the pages of the documentation show works as shown."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import cbs_opt
from cbs_opt.cli import app
from cbs_opt.select.methods import available_methods
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


def test_pages_and_navigation_agree() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = set(re.findall(r": (\S+\.md)$", navigation, flags=re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_the_api_pages_name_objects_that_exist() -> None:
    named = [
        name
        for page in DOCS.glob("api/*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)
    ]
    assert named
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name


def test_the_catalogue_has_every_method_formulation_and_solver() -> None:
    hook = runpy.run_path(str(DOCS / "catalogue_hook.py"))
    page = hook["on_page_markdown"]((DOCS / "catalogue.md").read_text())
    rows = set(re.findall(r"^\| `([\w:]+)` \|", page, flags=re.MULTILINE))
    assert rows == {method.name for method in available_methods()} | set(MODELS) | set(solver_names())
    assert "<!--" not in page
