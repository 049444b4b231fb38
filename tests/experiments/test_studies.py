"""The shipped studies say what can be run, and the quick one is quick."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cbs_opt.study.config import read_study
from cbs_opt.study.expansion import expand

FOLDER = Path(__file__).parents[2] / "experiments" / "studies"
STUDIES = sorted(FOLDER.glob("*.toml"))
GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "studies.md").read_text()


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_a_shipped_study_can_be_planned(path: Path) -> None:
    study = read_study(path)
    plan = expand(study)
    assert study.description
    assert not plan.left_out
    assert len({run.fingerprint for run in plan.runs}) == len(plan.runs)
    assert f"{path.name}" in GUIDE


def test_no_two_studies_have_one_name() -> None:
    names = [read_study(path).name for path in STUDIES]
    assert len(set(names)) == len(names) >= 7


def test_the_guide_names_no_study_that_is_not_there() -> None:
    named = set(re.findall(r"(\w+\.toml)", GUIDE))
    assert named == {path.name for path in STUDIES}
