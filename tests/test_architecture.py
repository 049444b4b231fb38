"""The contracts of the linter are those that the documentation shows; packages load as they promise."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cbs_opt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]


def rooms(floor: str) -> list[str]:
    return re.findall(r"\w+", floor)


def test_every_module_of_the_package_has_a_floor() -> None:
    (layers,) = [contract["layers"] for contract in CONTRACTS if contract.get("exhaustive")]
    listed = [room for floor in layers for room in rooms(floor)]
    entries = [path for path in (ROOT / "cbs_opt").iterdir() if path.suffix == ".py" or path.is_dir()]
    present = {path.stem for path in entries} - {"__init__", "__pycache__"}
    assert sorted(listed) == sorted(present)
    assert len(present - {"__main__"}) <= 25


def test_the_page_on_the_architecture_shows_the_floors_of_the_contract() -> None:
    page = (ROOT / "docs/develop/architecture.md").read_text()
    (layers,) = [contract["layers"] for contract in CONTRACTS if contract.get("exhaustive")]
    table = page.partition("<!-- floors -->")[2].partition("<!-- end of floors -->")[0]
    shown = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines() if "`" in line]
    assert [sorted(floor) for floor in shown] == [
        sorted(rooms(floor)) for floor in layers if floor != "__main__"
    ]


def test_formulations_loads_without_torch() -> None:
    code = (
        "import pkgutil, sys, formulations\n"
        "modules = list(pkgutil.walk_packages(formulations.__path__, 'formulations.'))\n"
        "for module in modules: __import__(module.name)\n"
        "assert len(modules) > 5\n"
        "sys.exit(' '.join({'torch', 'cbs_opt', 'experiments'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_public_functions_take_at_most_twelve_arguments() -> None:
    for name in cbs_opt.__all__:
        function = getattr(cbs_opt, name)
        if inspect.isfunction(function):
            parameters = inspect.signature(function).parameters.values()
            assert sum(entry.kind is not entry.VAR_KEYWORD for entry in parameters) <= 12, name


def test_every_logger_is_named_by_its_module() -> None:
    """So that a room is turned up or down by its name; nothing goes to the root."""
    said = re.compile(r"getLogger\((.*?)\)|logging\.(?:debug|info|warning|error|exception|critical|log)\(")
    found = [
        (path, match[1])
        for package in ("cbs_opt", "formulations")
        for path in (ROOT / package).rglob("*.py")
        for match in said.finditer(path.read_text())
    ]
    assert len(found) > 10
    assert {name for _, name in found} == {"__name__"}, found
