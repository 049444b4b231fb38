"""The commands on one block: what they print and write, and how they end."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import highspy
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from cbs_opt import solving
from cbs_opt.cli import app
from cbs_opt.cli.tables import solver_messages_on_stderr
from cbs_opt.select import methods
from formulations import BlockProblem, verify
from formulations.enumeration import enumerate_optimum
from formulations.instances import library, read_solution, write_instance, write_solution
from formulations.solvers import available_solvers, models_for

PROGRAMS = ("selection", "joint")


def random_block(n: int, n_prune: int, damping: float, seed: int = 0) -> BlockProblem:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(2 * n, n)) / np.sqrt(2 * n)
    return BlockProblem(
        weights=generator.normal(size=n), n_prune=n_prune, rows=rows, damping=damping, name="random"
    )


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlockProblem:
    """A block in block.npz of the working directory."""
    monkeypatch.chdir(tmp_path)
    problem = random_block(8, 4, 0.1)
    write_instance("block.npz", problem)
    return problem


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def said(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("method", ["branch_and_bound", "scip", "mathopt", "enumeration"])
def test_solve_prints_and_writes_the_optimum(block: BlockProblem, program: str, method: str) -> None:
    if method == "scip":
        pytest.importorskip("pyscipopt")
    answer = said("solve", "block.npz", "--program", program, "--method", method, "--out", "best.npz")
    oracle = enumerate_optimum(block, program)
    assert answer["termination"] == "optimal"
    assert answer["objective"] == pytest.approx(oracle.objective, rel=2e-6)
    assert answer["bound"] <= oracle.objective * (1.0 + 1e-12)
    assert answer["verification"]["verdict"] != "wrong"
    written = read_solution("best.npz", block)
    assert written.pruned.tolist() == answer["pruned"]
    assert not verify(block, written).wrong


@pytest.mark.usefixtures("block")
def test_solve_takes_a_warm_start_limits_and_options() -> None:
    common = ("solve", "block.npz", "--program", "joint")
    best = said(*common, "--method", "enumeration", "--out", "best.npz")
    again = said(*common, "--method", "magnitude", "--incumbent", "best.npz")
    assert again["objective"] == pytest.approx(best["objective"], rel=1e-12)
    stopped = said(*common, "--method", "branch_and_bound", "--time-limit", "0")
    assert (stopped["termination"], stopped["limit"]) == ("feasible", "time")
    told = said(*common, "--method", "mathopt:joint_big_m", "--threads", "1", "--seed", "3")
    assert told["objective"] == pytest.approx(best["objective"], rel=1e-5)
    refused = invoke(*common, "--method", "swap_search", "--option", "color=3")
    assert refused.exit_code == 2
    assert "--option" in refused.stderr
    assert "color" in refused.stderr


def test_solve_prints_text_for_people(block: BlockProblem) -> None:
    result = invoke("solve", "block.npz", "--program", "joint", "--method", "branch_and_bound")
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["status"] == "optimal"
    assert lines["block"] == "random: 8 weights, 4 pruned"
    assert float(lines["objective"]) == pytest.approx(enumerate_optimum(block, "joint").objective)
    assert lines["verified"].startswith("unchecked")


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("solve", "block.npz"), 2, "--program"),
        (("solve", "absent.npz", "--program", "joint"), 2, "no file and no shipped block"),
        (("solve", "block.npz", "--program", "both"), 2, "both"),
        (("solve", "block.npz", "--program", "joint", "--method", "magic"), 2, "choose among"),
        (("solve", "block.npz", "--program", "joint", "--method", "highs"), 2, "no model of it"),
        (("solve", "block.npz", "--program", "joint", "--time-limit", "-1"), 2, "--time-limit"),
        (("solve", "block.npz", "--program", "joint", "--option", "seed=1"), 2, "--seed"),
        (("solve", "block.npz", "--program", "joint", "--option", "seed"), 2, "NAME=VALUE"),
        (("solve", "other.txt", "--program", "joint"), 1, "error:"),
        (("verify", "block.npz", "other.txt"), 1, "error:"),
        (("compare", "block.npz", "--program", "both"), 2, "both"),
        (("compare", "block.npz", "--program", "joint", "--methods", "obs,magic"), 2, "choose among"),
        (("compare", "block.npz", "--program", "joint", "--time-limit", "nan"), 2, "--time-limit"),
        (("export", "block.npz", "--model", "joint_magic", "--out", "a.mps"), 2, "--model"),
        (("export", "block.npz", "--model", "joint_indicator", "--out", "a.mps"), 2, "joint_big_m"),
        (
            ("export", "block.npz", "--model", "selection_qp", "--format", "xls", "--out", "a"),
            2,
            "--format",
        ),
        (("export", "block.npz", "--model", "selection_qp", "--out", "no/where.mps"), 1, "error:"),
    ],
)
def test_wrong_usage_and_bad_files_end_with_one_line(
    arguments: tuple[str, ...], code: int, words: str
) -> None:
    Path("other.txt").write_text("not a block")
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert words in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_singular_block_has_no_joint_program(tmp_path: Path) -> None:
    path = str(tmp_path / "singular.npz")
    rows = np.ones((1, 4))
    write_instance(path, BlockProblem(weights=np.ones(4), n_prune=2, rows=rows))
    assert invoke("solve", path, "--program", "joint").exit_code == 1
    assert said("solve", path, "--program", "selection")["objective"] == pytest.approx(2.0)


def test_bound_and_verify_agree(block: BlockProblem) -> None:
    for program in PROGRAMS:
        found = said("bound", "block.npz", "--program", program, "--out", "root.npz")
        assert 0.0 < found["bound"] <= enumerate_optimum(block, program).objective <= found["objective"]
        checked = said("verify", "block.npz", "root.npz")
        assert checked["verdict"] == "ok"
        assert checked["bound_checked"]
        assert checked["bound"] == pytest.approx(found["bound"])
        text = invoke("verify", "block.npz", "root.npz").stdout
        assert text.splitlines()[0].split() == ["verdict", "ok"]


def test_verify_fails_on_a_false_claim(block: BlockProblem) -> None:
    honest = enumerate_optimum(block, "joint")
    write_solution("false.npz", block, replace(honest, objective=0.5 * honest.objective, bound=None))
    result = invoke("verify", "block.npz", "false.npz")
    assert result.exit_code == 1
    assert "recomputed" in result.stdout
    write_instance("another.npz", random_block(8, 4, 0.1, seed=1))
    foreign = invoke("verify", "another.npz", "false.npz")
    assert foreign.exit_code == 1
    assert "another block" in foreign.stderr


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """Send this process SIGINT once, as Ctrl-C does, from outside: native code may hold the interpreter."""
    send = f"import os, signal, time; time.sleep({seconds}); os.kill({os.getpid()}, signal.SIGINT)"
    sender = subprocess.Popen([sys.executable, "-S", "-c", send])
    try:
        yield
    finally:
        sender.kill()
        sender.wait()


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize(("method", "n"), [("branch_and_bound", 200), ("mathopt", 66)])
def test_interrupted_solve_prints_and_writes_incumbent_and_bound(tmp_path: Path, method: str, n: int) -> None:
    hard = random_block(n, n // 2, 1e-6)
    path, out = str(tmp_path / "hard.npz"), str(tmp_path / "found.npz")
    write_instance(path, hard)
    arguments = ("--program", "joint", "--method", method, "--time-limit", "40")
    invoke("solve", "digits_12_s50", *arguments)  # compiles
    with interrupt_after(2.0):
        result = invoke("solve", path, *arguments, "--out", out, "--json")
    assert result.exit_code == 130, result.output
    answer = json.loads(result.stdout)
    assert (answer["termination"], answer["limit"]) == ("feasible", "interrupted")
    assert answer["bound"] < answer["objective"]
    assert answer["seconds"] < 35.0
    found = read_solution(out, hard)
    assert found.objective == answer["objective"]
    assert not verify(hard, found).wrong


def test_native_messages_leave_standard_output_to_the_data(capfd: pytest.CaptureFixture[str]) -> None:
    with solver_messages_on_stderr():
        os.write(1, b"written")
        ctypes.CDLL(None).printf(b"buffered")
    print("data")  # noqa: T201
    found = capfd.readouterr()
    assert found.out == "data\n"
    assert "written" in found.err
    assert "buffered" in found.err


@pytest.mark.parametrize("program", PROGRAMS)
def test_compare_judges_every_method_alike(block: BlockProblem, program: str) -> None:
    rows = said("compare", "block.npz", "--program", program, "--time-limit", "20")
    oracle = enumerate_optimum(block, program).objective
    table = {row["method"]: row for row in rows}
    assert set(table) == set(solving.default_methods(program))
    assert table["loss_preservation"]["status"] == "unavailable"
    assert "gradient" in table["loss_preservation"]["note"]
    judged = [row for row in rows if row["objective"] is not None]
    assert all(row["excess"] >= -1e-12 for row in judged)
    assert all(row["objective"] >= oracle * (1.0 - 1e-12) for row in judged)
    proved = [row for row in rows if row["status"] == "optimal"]
    assert len(proved) >= 4
    for row in proved:
        assert row["objective"] == pytest.approx(oracle, rel=2e-4)


@pytest.mark.usefixtures("block")
def test_compare_takes_names_and_prints_reasons() -> None:
    names = ("--methods", "magnitude,obs", "--method", "highs", "--method", "highs:joint_big_m")
    result = invoke("compare", "block.npz", "--program", "selection", *names)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["magnitude", "obs", "highs", "highs:joint_big_m"]
    assert lines[-1].startswith("highs:joint_big_m: program: 'selection'")


def test_all_models_names_each_model_of_each_solver() -> None:
    for program in PROGRAMS:
        names = solving.default_methods(program, all_models=True)
        assert len(set(names)) == len(names)
        for solver in ("mathopt", "scip", "gurobi"):
            assert {f"{solver}:{model}" for model in models_for(solver, program)} <= set(names)
        assert all(methods.find_method(name, program) for name in names)
        assert all(methods.find_method(name, program) for name in solving.default_methods(program))


@pytest.mark.usefixtures("block")
def test_compare_outlives_a_failing_method(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = solving.solve

    def failing(problem: BlockProblem, method: str, **limits: Any) -> Any:
        if method == "obd":
            raise ZeroDivisionError("by nothing")
        if method == "greedy_obs":
            raise KeyboardInterrupt
        return real(problem, method, **limits)

    monkeypatch.setattr(solving, "solve", failing)
    names = ("--methods", "obd,obs,greedy_obs,magnitude")
    result = invoke("compare", "block.npz", "--program", "joint", *names, "--json")
    assert result.exit_code == 130
    rows = json.loads(result.stdout)
    assert [(row["method"], row["status"]) for row in rows] == [
        ("obd", "error"),
        ("obs", "feasible"),
        ("greedy_obs", "interrupted"),
    ]
    assert "ZeroDivisionError" in rows[0]["note"]
    assert "obd failed" in caplog.text


@pytest.mark.parametrize("format", ["mps", "lp", "qplib"])
def test_export_writes_what_it_says(block: BlockProblem, format: str) -> None:
    arguments = ("--model", "selection_mccormick", "--format", format, "--out", f"model.{format}")
    told = said("export", "block.npz", *arguments)
    assert told["columns"] == block.n * (block.n + 1) // 2
    assert Path(f"model.{format}").stat().st_size > 0
    if format == "qplib":
        return
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    assert highs.readModel(f"model.{format}") == highspy.HighsStatus.kOk
    highs.run()
    value = highs.getInfo().objective_function_value * told["objective_scale"]
    assert value == pytest.approx(enumerate_optimum(block, "selection").objective, rel=1e-4)


def test_solvers_lists_and_checks_every_bridge() -> None:
    listed = {entry["name"]: entry for entry in said("solvers", "--check")}
    for name in ("highs", "mathopt", "cp_sat", "scipy_milp"):
        assert listed[name]["available"]
        assert listed[name]["version"]
        expected = {program: "ok" for program in PROGRAMS if models_for(name, program)}
        assert listed[name]["check"] == expected
    for entry in listed.values():
        assert entry["available"] or entry["reason"]
    text = invoke("solvers").stdout
    assert all(name in text for name in listed)


def test_a_solver_that_misses_the_optimum_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    real = solving.solve

    def halved(problem: BlockProblem, method: str, **limits: Any) -> Any:
        return real(problem, "magnitude" if method == "highs" else method, **limits)

    monkeypatch.setattr(solving, "solve", halved)
    only = [info for info in available_solvers() if info.name == "highs"]
    monkeypatch.setattr("formulations.solvers.available_solvers", lambda: only)
    result = invoke("solvers", "--check")
    assert result.exit_code == 1
    assert "feasible" in next(line for line in result.stdout.splitlines() if line.startswith("highs "))


def test_library_lists_proven_optima_that_solve_accepts() -> None:
    listed = said("library")
    assert [entry["name"] for entry in listed] == library()
    small = next(entry for entry in listed if entry["n"] <= 16)
    for program in PROGRAMS:
        found = said("solve", small["name"], "--program", program, "--method", "enumeration")
        assert small[program]["proved"]
        assert found["objective"] == pytest.approx(small[program]["objective"], rel=1e-6)
    text = invoke("library").stdout.splitlines()
    assert len(text) == len(listed) + 2
