"""What the README shows works as shown."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import cbs_opt
from cbs_opt.cli import errors
from cbs_opt.demo import digits_data

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippets_run(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits_data()
    model = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10)).eval()
    names = {"model": model, "X": x[:200], "y": y[:200], "X_test": x_test, "y_test": y_test}
    Path("snippet.py").write_text(snippet)
    names = runpy.run_path("snippet.py", init_globals=names)
    if "report" in names:
        assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == round(0.9 * 296)
        assert Path("run/report.html").exists()


def test_the_commands_by_hand_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for by_hand, in_make in (
        ("-c constraints.txt -e .\n", "$(INSTALL) -e .\n"),
        ('-c constraints.txt -e ".[dev]"', '$(INSTALL) -e ".[dev]"'),
        ("cbs-opt demo --out runs/demo", "cbs-opt demo --out $(OUT)"),
        ("python -m pytest -n logical", "python -m pytest $(PYTEST_ARGS)"),
        ("-n logical --maxprocesses 4\n", "PYTEST_ARGS ?= -n logical --maxprocesses 4\n"),
    ):
        assert by_hand in README
        assert in_make in makefile


def test_exit_codes_are_those_of_the_command_line() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert listed == {0, errors.ERROR, errors.USAGE, errors.INTERRUPTED}


def test_every_public_name_that_it_uses_exists() -> None:
    used = set(re.findall(r"\bcbs\.(\w+)", README))
    assert used
    assert used <= set(cbs_opt.__all__)
