"""What is told of a run, and where it can be stopped: anywhere, without a trace in the network."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cbs_opt.curvature.kinds import EmpiricalFisher, SketchedFisher
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Certify, Recipe, Stages, Update, Weights
from cbs_opt.recipe.select import OBS, Exact, GreedyOBS, HardThreshold, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.runs import folder as run_store
from cbs_opt.system.progress import SILENT, Advance, Progress, reporting
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError
from tests.cbs_opt.small_network import assert_untouched, snapshot

FEW = EmpiricalFisher(samples=24)
WHOLE = Weights(blocks="global")


class Told(Progress):
    """Notes what it is told, one entry a phase and one a step, and interrupts at entry `stop_at`."""

    def __init__(self, stop_at: int = -1) -> None:
        self.stop_at = stop_at
        self.entries: list[str] = []
        self.resumed: dict[str, int] = {}
        self.open = 0

    def note(self, name: str) -> None:
        if len(self.entries) == self.stop_at:
            raise KeyboardInterrupt
        self.entries.append(name)

    @contextmanager
    def phase(self, name: str, total: int | None = None, *, unit: str, done: int = 0) -> Iterator[Advance]:
        self.note(name)
        self.resumed.setdefault(name, done)
        counted = done

        def advance(count: int) -> None:
            nonlocal counted
            counted += count
            assert count > 0
            assert total is None or counted <= total
            self.note(name)

        self.open += 1
        try:
            yield advance
        finally:
            self.open -= 1


def network() -> nn.Module:
    """1 328 weights, more than a search forms the Hessian of, in float64."""
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)
    return model.eval()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (40,), generator=generator)


def recipe(**fields: Any) -> Recipe:
    return Recipe(**{"curvature": FEW, "weights": WHOLE, "damping": 0.1} | fields)


CASES: dict[str, dict[str, Any]] = {
    "default": {"recipe": Recipe(curvature=FEW)},
    "rows": {"recipe": recipe(layer_inputs=0, select=SwapSearch(start="magnitude", restarts=2))},
    "greedy": {"recipe": recipe(layer_inputs=0, select=GreedyOBS(drops=6))},
    "starts": {
        "recipe": recipe(layer_inputs=0, select=SwapSearch(start=("greedy_obs", "iterative_hard_threshold")))
    },
    "threshold": {"recipe": recipe(layer_inputs=0, select=HardThreshold())},
    "selection": {"recipe": recipe(select=SwapSearch(program="selection", repeats=2))},
    "certified": {
        "recipe": recipe(curvature=SketchedFisher(samples=24, per_row=2), layer_inputs=0, select=OBS()),
        "certify": Certify(time_limit=0.0),
    },
    "exact": {
        "recipe": recipe(layer_inputs=0, weights=Weights(blocks=8, target="2.*"), select=Exact(), update=None)
    },
    "workers": {
        "recipe": recipe(layer_inputs=0, weights=Weights(blocks=8, target="2.*"), select=Exact()),
        "resources": Resources(workers=1),
    },
    "several": {
        "recipe": Recipe.grid(recipe(select=GreedyOBS(drops=3)), update=[Update(), Update(scale=0.5)])
    },
    "stages": {"recipe": recipe(select=GreedyOBS(drops=2), gradient=True), "stages": Stages(count=2)},
}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state is written as soon as it is there."""
    monkeypatch.setattr(run_store, "SAVE_EVERY", 0.0)


def run(model: nn.Module, case: str, progress: Progress = SILENT, **options: Any) -> PruneReport:
    given = {"resources": Resources(chunk_memory=300_000)} | CASES[case] | options
    return prune(model, data(), sparsity=0.7, progress=progress, **given)


def ends(model: nn.Module, report: PruneReport) -> tuple[Any, ...]:
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return state, report.predicted_loss_increase, [(b.iterations, b.status) for b in report.blocks]


STOPS = {
    "default": ("gradients", "layer inputs", "drops", "exchanges", "update", "evaluation"),
    "rows": ("exchanges", "blocks"),
    "greedy": ("drops",),
    "starts": ("thresholds", "exchanges"),
    "threshold": ("thresholds",),
    "selection": ("networks",),
    "certified": ("certificates",),
    "exact": ("scores", "blocks"),
    "workers": ("blocks",),
    "several": ("networks",),
    "stages": ("stages", "gradient", "drops"),
}
"""Phases in the midst of which a run is interrupted."""


def check_interrupted(case: str, stop: int, folder: Path, expected: tuple[Any, ...]) -> Told:
    """Interrupt a run, look at the network, go on, compare; give what was told of the second run."""
    model, told = network(), Told()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, case, Told(stop), run_dir=folder)
    assert_untouched(model, before)
    assert ends(model, run(model, case, told, run_dir=folder)) == expected
    return told


@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_in_any_phase_leaves_the_network_and_goes_on(case: str, tmp_path: Path) -> None:
    straight, told = network(), Told()
    expected = ends(straight, run(straight, case, told))
    assert told.open == 0
    for name in STOPS[case]:
        places = [index for index, entry in enumerate(told.entries) if entry == name]
        again = check_interrupted(case, places[(len(places) + 1) // 2], tmp_path / name, expected)
        if name in ("drops", "thresholds", "exchanges"):
            assert again.resumed[name] > 0


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_interrupted_at_any_step_leaves_the_network_and_goes_on(case: str, tmp_path: Path) -> None:
    straight, told = network(), Told()
    expected = ends(straight, run(straight, case, told))
    for stop in range(len(told.entries)):
        check_interrupted(case, stop, tmp_path / str(stop), expected)


def test_bars_are_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for screen, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", screen)
        prune(network(), data(), sparsity=0.7, recipe=CASES["greedy"]["recipe"])
        assert ("gradients" in screen.getvalue()) == ("drops" in screen.getvalue()) == shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    prune(network(), data(), sparsity=0.7, recipe=CASES["greedy"]["recipe"], progress=False)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_what_is_told_is_checked_before_anything_is_done() -> None:
    assert isinstance(reporting(False), Progress)
    for wrong in (1, None, print):
        with pytest.raises(ArgumentError, match="progress"):
            prune(network(), data(), sparsity=0.7, progress=wrong)  # type: ignore[arg-type]
