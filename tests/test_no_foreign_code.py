"""No input runs code: ruff refuses what could do that, and what it cannot see is looked for here."""

from __future__ import annotations

import ast
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cbs_opt", "formulations", "experiments")
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
SWITCHES = ("shell", "allow_pickle")
MUTATIONS = "experiments/benchmarks/file_mutations.py"
"""Makes the pickles that readers must refuse."""


def offences(source: str) -> list[str]:
    """Return the built-in names that run text, even where they are not called, and switches that are on."""
    offences = []
    # A name outside ASCII may be another spelling of one of these.
    if source.isascii() and not any(word in source for word in (*FORBIDDEN, *SWITCHES)):
        return offences
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in FORBIDDEN:
            offences.append(f"{node.lineno}: {node.id}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in SWITCHES and not off:
                    offences.append(f"{node.lineno}: {keyword.arg}={ast.unparse(keyword.value)}")
    return offences


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("import pickle", "TID251"),
        ("import cloudpickle.cloudpickle as c", "TID251"),
        ("from pickle import loads", "TID251"),
        ("eval('1')", "S307"),
        ("exec('1')", "S102"),
        ("import torch\ntorch.load(f, weights_only=True)", "TID251"),
        ("import torch as t\nt.load(f)", "TID251"),
        ("from torch import load as fetch\nfetch(f)", "TID251"),
        ("import torch.distributed as dist\ndist.all_gather_object(a, b)", "TID251"),
        ("import yaml\nyaml.load(s)", "TID251"),
        ("import os\nos.system('ls')", "TID251"),
        ("from os import execv\nexecv(a, b)", "S606"),
        ("import subprocess\nsubprocess.run(c, shell=True)", "S602"),
        ("import pandas as pd\npd.read_pickle(p)", "TID251"),
        ("print('x')", "T201"),
        ("breakpoint()", "T100"),
        ("try:\n    pass\nexcept:\n    pass", "E722"),
    ],
)
def test_the_linter_refuses_what_a_library_must_not_do(source: str, rule: str) -> None:
    ruff = Path(sysconfig.get_path("scripts")) / "ruff"
    command = [str(ruff), "check", "--no-cache", "--output-format", "concise", "--stdin-filename"]
    done = subprocess.run(
        [*command, "cbs_opt/example.py", "-"],
        input=source,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert f" {rule} " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "source",
    ["map(eval, x)", "__import__('os')", "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)"],
)
def test_offences_are_seen(source: str) -> None:
    assert offences(source)


@pytest.mark.parametrize("source", ["model.eval()", "re.compile('a')", "np.load(f, allow_pickle=False)"])
def test_what_is_harmless_is_not_taken_for_an_offence(source: str) -> None:
    assert not offences(source)


def test_nothing_in_the_packages_runs_text_or_reads_pickles() -> None:
    seen = {path.relative_to(ROOT).as_posix(): offences(path.read_text()) for path in modules()}
    seen.pop(MUTATIONS, None)
    assert not {name: lines for name, lines in seen.items() if lines}


def test_no_module_switches_the_rules_off() -> None:
    """A ``noqa`` of these rules would hide what they refuse; `torch.load` of tensors alone is allowed."""
    for path in modules():
        # Experiments may print.
        printing = () if path.is_relative_to(ROOT / "experiments") else ("T20",)
        for line in path.read_text().splitlines():
            code, _, excused = line.partition("# noqa")
            if path == ROOT / "cbs_opt/cli/loading.py" and "torch.load(" in code:
                assert "weights_only=True" in code
                continue
            assert not any(rule in excused for rule in ("TID251", "S1", "S3", "S5", "S6", *printing)), path


def test_only_the_command_line_runs_files_and_only_those_that_it_is_given() -> None:
    """A network or a data set is a Python file that the user names; nothing else runs files."""
    words = ("exec_module", "spec_from_file", "SourceFileLoader")
    loaders = {p.relative_to(ROOT).as_posix() for p in modules() if any(w in p.read_text() for w in words)}
    assert loaders <= {"cbs_opt/cli/loading.py"}
