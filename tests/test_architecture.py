"""Arrows between the packages, and calls that do not belong in a library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("cbs_opt", "formulations") for path in (ROOT / package).rglob("*.py"))
FORBIDDEN_IMPORTS = {
    "formulations": {"cbs_opt", "experiments", "tests", "torch"},
    "cbs_opt": {"experiments", "tests"},
    "experiments": {"tests"},
}
FORBIDDEN_CALLS = {
    "print",
    "breakpoint",
    "eval",
    "exec",
    "yaml.load",
    "pickle.load",
    "pickle.loads",
    "torch.load",
}
LONGEST_MODULE = 400


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of everything that a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def called(tree: ast.AST) -> set[str]:
    """Dotted names of what a module calls."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything without naming it."""
    return [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


def test_the_helpers_see_what_they_should() -> None:
    tree = ast.parse(
        "def f():\n    import torch.nn\n    from cbs_opt.report.record import x\n"
        "    try: eval('1'); yaml.load(s)\n    except: pass"
    )
    assert imported(tree) == {"torch", "cbs_opt"}
    assert called(tree) == {"eval", "yaml.load"}
    assert broad_handlers(tree) == [5]


@pytest.mark.parametrize("package", FORBIDDEN_IMPORTS)
def test_imports_follow_the_arrows(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules
    for path in modules:
        against = imported(ast.parse(path.read_text())) & FORBIDDEN_IMPORTS[package]
        assert not against, f"{path.relative_to(ROOT)} imports {against}"


def test_no_module_calls_what_a_library_must_not() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        assert not called(tree) & FORBIDDEN_CALLS, path.relative_to(ROOT)
        assert not broad_handlers(tree), path.relative_to(ROOT)


def test_modules_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_MODULE}


def test_formulations_loads_without_torch() -> None:
    code = (
        "import pkgutil, sys, formulations\n"
        "found = list(pkgutil.walk_packages(formulations.__path__, 'formulations.'))\n"
        "for module in found: __import__(module.name)\n"
        "assert len(found) > 5\n"
        "sys.exit(' '.join({'torch', 'cbs_opt', 'experiments'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
