"""The command line: what it writes where, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from cbs_opt import available_methods, load_masks
from cbs_opt.cli import app
from cbs_opt.cli.prune import requested, resources_of
from cbs_opt.recipe.named import Named
from cbs_opt.recipe.records import Recipe
from cbs_opt.recipe.select import SwapSearch
from cbs_opt.report.files import load_report
from cbs_opt.runs.folder import RunStore
from cbs_opt.system.resources import Resources

pytestmark = pytest.mark.usefixtures("without_pictures")

MODEL = """
import torch
from sibling import WIDTH

def make():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 3))

def loader():
    torch.manual_seed(4)
    data = torch.utils.data.TensorDataset(torch.randn(40, 6), torch.randint(3, (40,)))
    return torch.utils.data.DataLoader(data, batch_size=16)

def broken():
    raise RuntimeError("no such checkpoint")

def number():
    return 7

def squared(output, y):
    return (output - torch.nn.functional.one_hot(y, 3)).square().mean()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network, weights and data."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(MODEL)
    Path("sibling.py").write_text("WIDTH = 8\n")
    generator = np.random.default_rng(0)
    np.savez("train.npz", x=generator.normal(size=(60, 6)), y=generator.integers(3, size=60))
    np.savez("test.npz", x=generator.normal(size=(30, 6)), y=generator.integers(3, size=30))
    torch.manual_seed(9)
    layers = torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)
    safetensors.torch.save_model(torch.nn.Sequential(*layers), "net.safetensors")
    return tmp_path


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


COMMON = ("--model", "net.py:make", "--data", "train.npz", "--sparsity", "0.5", "--samples", "40")


def fields_set(*assignments: str) -> tuple[str, ...]:
    """Options that set fields, from assignments with spaces between."""
    return tuple(part for line in assignments for entry in line.split() for part in ("--set", entry))


def unboxed(text: str) -> str:
    """A message as one line, without the box that it is drawn in."""
    return " ".join(text.replace("│", " ").split())


def prune(*more: str, model: str = "net.py:make", data: str = "train.npz", sparsity: str = "0.5") -> Result:
    common = ("--model", model, "--data", data, "--sparsity", sparsity, "--samples", "40", "--out", "run")
    return invoke("prune", *common, *more)


@pytest.mark.usefixtures("work")
def test_prune_writes_weights_masks_and_report_that_agree() -> None:
    result = prune("--weights", "net.safetensors", "--evaluate", "test.npz", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    report = load_report("run")
    assert said == report.to_dict()
    assert (report.n, report.n_prune) == (72, 36)
    assert report.before is not None
    assert report.before.samples == 30
    weights = safetensors.torch.load_file("run/weights.safetensors")
    masks = load_masks("run/masks.safetensors")
    assert set(masks) == {"0.weight", "2.weight"}
    for name, keep in masks.items():
        assert torch.equal(weights[name] != 0, keep)
    dense = safetensors.torch.load_file("net.safetensors")
    assert torch.equal(weights["0.bias"], dense["0.bias"])


@pytest.mark.usefixtures("work")
def test_a_pattern_is_a_sparsity_and_its_recipe_runs_again() -> None:
    method = "--method", "magnitude"
    result = prune(*method, sparsity="2:4")
    assert result.exit_code == 0, result.output
    assert "pattern 2:4" in result.output
    assert "6 = 1 x 4 + 2" in result.output
    masks = load_masks("run/masks.safetensors")
    assert set(masks["2.weight"].view(-1, 4).sum(1).tolist()) == {2}
    recipe = "--recipe", "run/recipe.toml"
    again = invoke("prune", *COMMON[:4], *recipe, "--out", "again")
    assert again.exit_code == 0, again.output
    assert load_report("again").pattern == "2:4"
    assert load_masks("again/masks.safetensors")["2.weight"].equal(masks["2.weight"])


@pytest.mark.usefixtures("work")
def test_prune_takes_a_loader_a_loss_and_the_options_of_prune() -> None:
    fields = fields_set(
        'update=none weights.blocks=layer weights.ignore="2.*" weights.budget=uniform',
        "curvature.per_row=2 damping.absolute=0.01",
    )
    options = ("--method", "obd", "--seed", "5", "--loss", "net.py:squared")
    result = prune(*options, *fields, data="net.py:loader")
    assert result.exit_code == 0, result.output
    assert "obd (layer inputs): 24 of 48 weights pruned" in result.stdout
    report = load_report("run")
    assert (report.method, report.update, report.partition, report.budget) == (
        "obd",
        False,
        "layer",
        "uniform",
    )
    assert (report.damping, report.seed, report.samples, report.rows) == (0.01, 5, 40, 20)


@pytest.mark.usefixtures("work")
def test_prune_in_stages_goes_on_where_it_stopped() -> None:
    plan = fields_set("stages.start=0.2 stages.updates=1 stages.final_updates=1")
    options = ("--stages", "3", *plan)
    method = ("--method", "obs", *fields_set("curvature.kind=sketched_fisher"), "--damping", "0.1")
    first = prune(*options, *method, "--run-dir", "stages")
    assert first.exit_code == 0, first.output
    assert len(list(Path("stages").glob("stage_*.npz"))) == 4
    report = load_report("run")
    assert [record.n_prune for record in report.stages][-1] == report.n_prune == 36
    again = prune(*options, *method, "--run-dir", "stages", "--force")
    assert again.exit_code == 0, again.output
    assert load_report("run").stages == report.stages


@pytest.mark.usefixtures("work")
def test_the_same_command_goes_on_after_ctrl_c() -> None:
    options = ("--certify", "--save-blocks", "--set", "weights.blocks=layer", "--damping", "0.1")
    whole = invoke("prune", *COMMON, "--out", "whole", *options)
    assert whole.exit_code == 0, whole.output
    keep, count = RunStore.keep, 0

    def interrupted(self: RunStore, *arguments: Any, **more: Any) -> None:
        nonlocal count
        keep(self, *arguments, **more)
        count += 1
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunStore, "keep", interrupted)
        while (stopped := prune(*options, "--resume")).exit_code == 130:
            assert "the same command goes on" in stopped.stderr
            assert not Path("run/report.json").exists()
    assert stopped.exit_code == 0, stopped.output
    assert count >= 3
    again = prune(*options, "--resume")
    assert again.exit_code == 0, again.output
    for name in ("weights.safetensors", "layers.csv"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes(), name
    masks = [load_masks(Path(folder, "masks.safetensors")) for folder in ("run", "whole")]
    assert all(keep.equal(masks[1][name]) for name, keep in masks[0].items())
    assert invoke("verify", "run").exit_code == 0
    other = prune(*options, "--resume", "--seed", "1")
    assert other.exit_code == 2
    assert "request.seed (0 -> 1)" in " ".join(other.stderr.split())


@pytest.mark.usefixtures("work")
def test_resume_takes_no_directory_of_somebody_else() -> None:
    Path("run").mkdir()
    Path("run/mine.txt").write_text("mine")
    refused = prune("--method", "magnitude", "--set", "update=none", "--resume")
    assert refused.exit_code == 2
    assert [path.name for path in Path("run").iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("work")
def test_a_schedule_by_number_and_workers() -> None:
    plan = fields_set("stages.schedule=[0.2,0.5] stages.final_updates=0")
    options = ("--stages", "2", "--method", "obs", *plan)
    result = prune(*options, "--damping", "0.1")
    assert result.exit_code == 0, result.output
    assert [record.n_prune for record in load_report("run").stages if record.update == 0] == [14, 36]
    refused = prune(*options, "--force", "--set", "resources.workers=2")
    assert refused.exit_code == 2
    assert "--set resources.workers" in unboxed(refused.stderr)


@pytest.mark.usefixtures("work")
def test_a_full_directory_is_refused_unless_forced() -> None:
    Path("run").mkdir()
    Path("run/mine.txt").write_text("mine")
    refused = prune("--method", "magnitude", "--set", "update=none")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert [path.name for path in Path("run").iterdir()] == ["mine.txt"]
    forced = prune("--method", "magnitude", "--set", "update=none", "--force")
    assert forced.exit_code == 0, forced.output
    assert Path("run/mine.txt").read_text() == "mine"


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "1.5"}, "--sparsity"),
        ({"sparsity": "much"}, "--sparsity"),
        ({"method": "magic"}, "--method"),
        ({"set": "weights.blocks=column"}, "--set weights.blocks"),
        ({"samples": "0"}, "--samples"),
        ({"damping": "-1"}, "--damping"),
        ({"seed": "-1"}, "--seed"),
        ({"stages": "0"}, "--stages"),
        ({"program": "both"}, "--program"),
        ({"recipe": "quick"}, "--recipe"),
        ({"recipe": "absent.toml"}, "--recipe"),
        ({"set": "curvature.kind=guess"}, "--set curvature.kind"),
        ({"set": "weights.target=nothing.*"}, "--set weights.target"),
        ({"set": "select.loud=1"}, "--set select.loud"),
        ({"set": "loudness=1"}, "--set recipe.loudness"),
        ({"set": "damping"}, "--set"),
        ({"set": "stages.final=1"}, "--set stages.final"),
        ({"set": "resources.worker=1"}, "--set resources"),
        ({"set": "resources.row_memory=lots"}, "--set resources.row_memory"),
        ({"set": "certify.time_limit=-1"}, "--set certify.time_limit"),
        ({"method": "branch_and_bound", "set": "select.options={loud=1}"}, "--set select.options.loud"),
        ({"model": "absent.py:make"}, "absent.py"),
        ({"model": "net.py"}, "FILE.py:function"),
        ({"model": "networks:make"}, "no module networks"),
        ({"model": "net:nothing"}, "no function nothing"),
        ({"model": "net/work:make"}, "names no module"),
        ({"model": "net.py:nothing"}, "no function nothing"),
        ({"data": "absent.npz"}, "absent.npz"),
        ({"evaluate": "odd.npz"}, "name the arrays x and y"),
        ({"loss": "kindness"}, "--loss"),
    ],
)
def test_wrong_usage_ends_with_2_and_writes_nothing(arguments: dict[str, str], message: str) -> None:
    np.savez("odd.npz", images=np.zeros(3))
    named = {name: arguments.pop(name) for name in ("model", "data", "sparsity") if name in arguments}
    result = prune(*(part for name, value in arguments.items() for part in (f"--{name}", value)), **named)
    assert result.exit_code == 2, result.output
    assert message in unboxed(result.stderr)
    assert result.stdout == ""
    assert not Path("run").exists()


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "net.py:broken"}, "no such checkpoint"),
        ({"model": "net.py:number"}, "torch.nn.Module"),
        ({"model": "syntax.py:make"}, "SyntaxError"),
        ({"data": "text.npz"}, "unreadable"),
        ({"weights": "text.npz"}, "does not fit"),
        ({"weights": "other.safetensors"}, "does not fit"),
        ({"weights": "other.pt"}, "does not fit"),
        ({"weights": "whole.pt"}, "torch.nn.modules.linear.Linear"),
        ({"weights": "text.pt"}, "save model.state_dict() alone"),
        ({"weights": "numbers.pt"}, "no state dict"),
        ({"model": "raising:make"}, "raised KeyError"),
        ({"model": "needing:make"}, "needs absent_package"),
        ({"data": "labels.npz"}, "labels"),
    ],
)
def test_errors_end_with_1_in_one_line(arguments: dict[str, str], message: str) -> None:
    Path("syntax.py").write_text("def make(:\n")
    Path("text.npz").write_text("no archive")
    Path("text.pt").write_text("no archive")
    Path("raising.py").write_text("{}['x']")
    Path("needing.py").write_text("import absent_package")
    safetensors.torch.save_file({"else": torch.zeros(2)}, "other.safetensors")
    torch.save({"else": torch.zeros(2)}, "other.pt")
    torch.save(torch.nn.Linear(2, 2), "whole.pt")
    torch.save([1, 2], "numbers.pt")
    np.savez("labels.npz", x=np.zeros((20, 6)), y=np.full(20, 9))
    named = {name: arguments.pop(name) for name in ("model", "data") if name in arguments}
    result = prune(*(part for name, value in arguments.items() for part in (f"--{name}", value)), **named)
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("WARNING")]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in result.output
    assert not Path("run").exists()


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", [None, "state_dict"])
def test_weights_of_torch_and_a_network_of_a_module_prune_as_their_files_do(name: str | None) -> None:
    state = safetensors.torch.load_file("net.safetensors")
    torch.save(state if name is None else {name: state, "epoch": 3}, "net.pt")
    for model, weights, out in (("net.py:make", "net.safetensors", "a"), ("net:make", "net.pt", "b")):
        result = prune("--weights", weights, "--out", out, model=model)
        assert result.exit_code == 0, result.output
    first, second = (safetensors.torch.load_file(f"{out}/weights.safetensors") for out in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.usefixtures("work")
def test_debug_lets_the_exception_through() -> None:
    result = prune("--debug", model="net.py:broken")
    assert result.exit_code == 1
    assert isinstance(result.exception.__cause__ if result.exception else None, RuntimeError)


@pytest.mark.usefixtures("work")
def test_an_interruption_ends_with_130_and_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cbs_opt.pruning.prune", interrupt)
    result = prune()
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not Path("run").exists()


def test_methods_lists_every_method() -> None:
    listed = json.loads(invoke("methods", "--json").stdout)
    assert [entry["name"] for entry in listed] == [method.name for method in available_methods()]
    table = invoke("methods").stdout
    assert all(entry["name"] in table for entry in listed)


def test_fields_and_resources_are_parsed() -> None:
    given = ["weights.budget={'a.*' = 0.5, b = 0.9}", "select.start=obs", "resources.row_memory=2MB"]
    asked = requested(None, 0.5, 3, given)
    (recipe,) = asked.recipe
    assert recipe.weights.budget == {"a.*": 0.5, "b": 0.9}
    assert recipe.select == SwapSearch(start="obs")
    assert (asked.sparsity, asked.seed) == (0.5, 3)
    assert asked.resources == resources_of(["resources.row_memory=2MB"]) == Resources(row_memory=2_000_000)


def test_a_name_stays_a_name_unless_options_say_how() -> None:
    assert requested("fast", 0.5, None, []).recipe == Named(name="fast")
    what = ["weights.ignore=head.*", "recalibrate=false"]
    assert requested(None, 0.5, None, what).recipe == Named(changes=tuple(what))
    assert requested("best", 0.5, None, ["damping=0.3"]).recipe == Named(
        name="best", changes=("damping=0.3",)
    )
    assert requested(None, 0.5, None, ["damping=0.3"]).recipe == (Recipe(damping=0.3),)
    staged = requested(None, 0.5, None, ["stages.count=3"])
    assert (staged.recipe, staged.stages) == (Named(), 3)


@pytest.mark.usefixtures("work")
def test_a_recipe_file_is_run_with_what_is_set_over_it() -> None:
    Path("mine.toml").write_text(
        "format = 1\nsparsity = 0.25\nseed = 4\n[recipe]\ndamping = 0.5\n[recipe.select]\nmethod = 'obs'\n"
    )
    common = ("--model", "net.py:make", "--data", "train.npz", "--recipe", "mine.toml")
    result = invoke("prune", *common, "--out", "run", "--set", "curvature.samples=30")
    assert result.exit_code == 0, result.output
    report = load_report("run")
    assert (report.n_prune, report.seed, report.method, report.rows) == (18, 4, "obs", 30)
    other = invoke("prune", *common, "--out", "other", "--sparsity", "0.5", "--seed", "1")
    assert other.exit_code == 0, other.output
    assert (load_report("other").n_prune, load_report("other").seed) == (36, 1)


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format = 1\nsparsity = 0.5\n[recipe]\nlayers = 1\n", "line 4 of"),
        ("format = 1\nsparsity = 0.5\n[recipe]\ndamping = -1\n", "line 4 of"),
        ("format = 1\nsparsity = 0.5\n[recipe\n", "line 3"),
        ("format = 9\n", "line 1 of"),
        ("format = 1\n", "add a line such as sparsity"),
    ],
)
def test_what_is_wrong_in_a_recipe_file_is_named_with_its_line(text: str, message: str) -> None:
    Path("mine.toml").write_text(text)
    common = ("--model", "net.py:make", "--data", "train.npz", "--recipe", "mine.toml", "--out", "run")
    result = invoke("prune", *common)
    assert result.exit_code == 2, result.output
    assert message in unboxed(result.stderr)
    assert not Path("run").exists()


@pytest.mark.parametrize("arguments", [["--version"], ["prune", "--help"], ["no-such-command"]])
def test_python_m_and_exit_codes_of_the_process(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cbs_opt", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == (2 if arguments == ["no-such-command"] else 0), done.stderr
    assert "Traceback" not in done.stderr
