"""The wheel carries both packages and their data, and works away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(command: Sequence[str | Path], **kwargs: object) -> str:
    """Standard output of a command that must succeed, away from any PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
        **kwargs,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ROOT])
    (built,) = folder.glob("cbs_opt-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the libraries it needs are those of this environment.

    They are put on its path after its own packages, so both packages can only come from the wheel:
    editable installations are hooked in by .pth files, which are not read from a path added so.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = sysconfig.get_preferred_scheme("prefix")
    paths = sysconfig.get_paths(scheme, vars={"base": str(folder), "platbase": str(folder)})
    pip = [sys.executable, "-m", "pip", "--python", paths["scripts"] + "/python"]
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", *options, wheel])
    (Path(paths["purelib"]) / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Path(paths["scripts"])


def test_it_carries_code_types_and_data_only(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"cbs_opt/py.typed", "formulations/py.typed", "cbs_opt/report/templates/report.html.j2"} <= names
    assert "cbs_opt/study/templates/study.html.j2" in names
    assert {"cbs_opt/__init__.py", "formulations/__init__.py", "formulations/problem.py"} <= names
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"cbs_opt", "formulations"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = (
        "import json, pathlib, cbs_opt, formulations, formulations.problem as p, numpy as np\n"
        "b = formulations.BlockProblem(weights=np.ones(3), hessian=np.eye(3), n_prune=1)\n"
        "found = {m.__name__: m.__file__ for m in (cbs_opt, formulations, p)}\n"
        "homes = [pathlib.Path(m.__file__).parent for m in (cbs_opt, formulations)]\n"
        "typed = [(home / 'py.typed').exists() for home in homes]\n"
        "print(json.dumps(found | {'n': b.n, 'typed': typed}))"
    )
    found = json.loads(run([installed / "python", "-c", code], cwd=tmp_path))
    home = installed.parent.resolve()
    for module in ("cbs_opt", "formulations", "formulations.problem"):
        path = Path(found[module]).resolve()
        assert path.is_relative_to(home), path
        assert not path.is_relative_to(ROOT)
    assert found["n"] == 3
    assert found["typed"] == [True, True]


def test_its_command_says_its_version(installed: Path, tmp_path: Path) -> None:
    said = run([installed / "cbs-opt", "--version"], cwd=tmp_path)
    assert said.strip() == f"cbs-opt {metadata.version('cbs-opt')}"
