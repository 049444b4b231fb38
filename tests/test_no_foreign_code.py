"""No input runs code: what could do that, or start a shell, does not occur in the packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("cbs_opt", "formulations", "experiments")
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.distributed.all_gather_object",
    "torch.distributed.broadcast_object_list",
    "torch.distributed.gather_object",
    "torch.distributed.recv_object_list",
    "pandas.read_pickle",
    "joblib.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "runpy.run_path",
    "runpy.run_module",
}
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "pty",
    "commands",
}
FORBIDDEN_PREFIXES = ("os.exec", "os.spawn", "os.posix_spawn", "asyncio.create_subprocess_shell")
MUTATIONS = Path("tests/stress/file_mutations.py")
"""Makes the pickles that readers must refuse."""


def offences(source: str) -> list[str]:
    """What a module does that it must not, with line numbers; names are followed through imports."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found += forbidden_module(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found += forbidden_module(node.module, node.lineno)
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            # Not only calls: a name may be passed on and called elsewhere.
            name = resolved(node, names)
            if name in FORBIDDEN or name.startswith(FORBIDDEN_PREFIXES):
                found.append(f"{node.lineno}: {name}")
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                value = keyword.value
                no = isinstance(value, ast.Constant) and value.value is False
                if keyword.arg in ("shell", "allow_pickle") and not no:
                    found.append(f"{node.lineno}: {keyword.arg}={ast.unparse(value)}")
    return found


def resolved(node: ast.Name | ast.Attribute, names: dict[str, str]) -> str:
    """The dotted name, with the first part as it was imported; "" for what has no such name."""
    parts: list[str] = []
    current: ast.expr = node
    while isinstance(current, ast.Attribute):
        parts.append(current.attr)
        current = current.value
    if not isinstance(current, ast.Name):
        return ""
    return ".".join([names.get(current.id, current.id), *reversed(parts)])


def forbidden_module(module: str, line: int) -> list[str]:
    return [f"{line}: import {module}"] if module.split(".")[0] in FORBIDDEN_MODULES else []


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import cloudpickle.cloudpickle as c",
        "from pickle import loads",
        "eval('1')",
        "map(eval, x)",
        "import torch\ntorch.load(f, weights_only=True)",
        "import torch as t\nt.load(f)",
        "from torch import load as fetch\nfetch(f)",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "import numpy as np\nnp.load(f, allow_pickle=flag)",
        "import yaml\nyaml.load(s)",
        "import os\nos.system('ls')",
        "from os import execv\nexecv(a, b)",
        "import subprocess\nsubprocess.run(c, shell=True)",
        "import pandas as pd\npd.read_pickle(p)",
    ],
)
def test_offences_are_seen(source):
    assert offences(source)


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import re\nre.compile('a')",
        "from safetensors.torch import load\nload(b)",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "import json\njson.loads(s)",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_what_is_harmless_is_not_taken_for_an_offence(source):
    assert not offences(source)


def test_nothing_in_the_packages_runs_foreign_code_or_a_shell():
    found = {str(path.relative_to(ROOT)): offences(path.read_text()) for path in modules()}
    made = found.pop(str(MUTATIONS))
    assert [line.split(": ")[1] for line in made] == ["import pickle", "allow_pickle=True"]
    assert not {name: lines for name, lines in found.items() if lines}


def test_only_the_command_line_runs_files_and_only_those_that_it_is_given():
    """A network or a data set is a Python file that the user names; nothing else runs files."""
    words = ("exec_module", "spec_from_file", "SourceFileLoader")
    loaders = {p.relative_to(ROOT).as_posix() for p in modules() if any(w in p.read_text() for w in words)}
    assert loaders <= {"cbs_opt/cli/loading.py"}
