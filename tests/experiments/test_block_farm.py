"""The timing commands run."""

from __future__ import annotations

import pytest

from experiments.benchmarks.block_farm import main


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scaling", "engines"])
def test_the_timing_commands_run(what, capsys):
    for name in ("distributed", "ray") if what == "engines" else ():
        pytest.importorskip(name)
    assert main([what, "--blocks", "4", "--n", "24", "--seconds", "0.05"]) == 0
    written = capsys.readouterr().out
    assert ("results equal" in written) if what == "scaling" else (written.count("of loky") == 3)
