"""Kills, corrupted files and simulated farms are run by hand: ``pytest tests/stress``."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless it is asked for by name."""
    return None if any("stress" in argument for argument in config.args) else True
