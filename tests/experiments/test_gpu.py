"""The GPU benchmark runs on a CPU, and says so where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.benchmarks.gpu import SMALL, compiled, equally_good, main, plain_loop, shared, swap_instance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_engines_make_the_same_swaps(dtype: torch.dtype) -> None:
    instance = swap_instance(SMALL, torch.device("cpu"), dtype).part(6, torch.device("cpu"))
    found = [engine(instance, SMALL.swaps) for engine in (shared, compiled, plain_loop)]
    assert len({count for _, count in found}) == 1
    assert found[0][1] > 6
    assert all(equally_good(sets, found[1][0], instance) for sets, _ in found)
    assert not equally_good(instance.start, found[1][0], instance)


def test_a_small_run_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--small", "--out", str(tmp_path / "gpu.json")]) == 0
    lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    engines = {line["engine"] for line in lines}
    assert engines >= {"shared", "compiled, CPU", "plain loop", "CBS-U", "torch.func"}
    assert all(line["same"] and line["rate"] > 0.0 for line in lines)
    assert "a second" in capsys.readouterr().out


def test_no_gpu_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
