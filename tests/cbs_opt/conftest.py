"""Reports without pictures, for tests that are about something else."""

from __future__ import annotations

import pytest


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing on the pages of reports; it takes most of the time of a small run."""
    monkeypatch.setattr("cbs_opt.report.html._embedded", lambda *drawings: [])
