"""Files: what is written is read back, what is damaged is refused, exports mean the same elsewhere."""

from __future__ import annotations

import json
import os
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from formulations import BlockProblem, BlockSolution, Limits, Termination, verify
from formulations import instances as inst
from formulations.enumeration import enumerate_optimum
from formulations.errors import ArgumentError, InstanceFormatError, UnsupportedProblemError
from formulations.files import CHECKSUM, checksum, read_container, write_container
from formulations.incumbents import greedy
from formulations.models import MODELS
from formulations.models.translation import standard_form
from formulations.outer_approximation import outer_approximation
from formulations.relaxations.bounds import lower_bound
from tests.formulations.blocks import KINDS, block, brute_force, slack
from tests.oracles import model_point, read_qplib

MILP = [name for name, spec in MODELS.items() if spec.kind == "MILP"]
EXPORTABLE = [name for name in MODELS if name != "joint_indicator"]


@pytest.mark.parametrize("kind", KINDS)
def test_block_round_trip_is_exact(kind, tmp_path):
    problem = block(kind, 7, 3, seed=1)
    inst.write_instance(tmp_path / "b.npz", problem, {"layer": "fc2", "seeds": [0, 1], "share": 0.1})
    again, metadata = inst.read_instance(tmp_path / "b.npz")
    assert metadata == {"layer": "fc2", "seeds": [0, 1], "share": 0.1}
    assert again.fingerprint() == problem.fingerprint()
    assert again.name == problem.name
    for tag in ("weights", "rows", "hessian", "gradient"):
        one, other = getattr(problem, tag), getattr(again, tag)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.floats(-1e300, 1e300, allow_subnormal=True), min_size=0, max_size=5),
    damping=st.floats(0, 1e300),
    name=st.text(max_size=10),
)
def test_extreme_numbers_and_names_survive(weights, damping, name, tmp_path):
    n = len(weights)
    data = {"weights": np.array(weights, dtype=float), "rows": np.zeros((0, n)), "damping": damping}
    try:
        problem = BlockProblem(**data, n_prune=n // 2, name=name)
    except ArgumentError:
        # Beyond the range in which float64 keeps the digits of a product: refused by name.
        with pytest.raises(ArgumentError, match="rescale"):
            BlockProblem(**data, n_prune=n // 2, name=name)
        return
    inst.write_instance(tmp_path / "b.npz", problem)
    again, _ = inst.read_instance(tmp_path / "b.npz")
    assert again.fingerprint() == problem.fingerprint()
    assert again.name == name
    assert again.damping == damping


def test_equal_blocks_give_equal_bytes_and_plain_numpy_opens_them(tmp_path):
    problem = block("random", 5, 2, seed=1)
    for name in ("a.npz", "b.npz"):
        inst.write_instance(tmp_path / name, problem)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["weights"], problem.weights)
        assert json.loads(archive["header"].tobytes())["n_prune"] == 2


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path):
    problem = block("gradient", 6, 3, seed=1)
    path = tmp_path / "b.npz"
    inst.write_instance(path, problem)
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            again, _ = inst.read_instance(path)
        except InstanceFormatError:
            refused += 1
        else:
            assert again.fingerprint() == problem.fingerprint()
    assert refused > 0.5 * len(range(0, len(whole), 7))
    for length in range(0, len(whole) - 1, 31):
        path.write_bytes(whole[:length])
        with pytest.raises(InstanceFormatError):
            inst.read_instance(path)


def foreign(tmp_path, kind):
    path = tmp_path / "foreign.npz"
    if kind == "absent":
        return path
    if kind == "text":
        path.write_text("n,1\n")
    elif kind == "folder":
        path.mkdir()
    elif kind == "other npz":
        np.savez(path, weights=np.ones(3))
    elif kind == "pickle":
        np.savez(path, header=np.array([{"format": inst.BLOCK_FORMAT}], dtype=object))
    elif kind == "solution":
        problem = block("random", 5, 2, seed=1)
        inst.write_solution(path, problem, greedy(problem, "joint"))
    return path


@pytest.mark.parametrize("kind", ["absent", "text", "folder", "other npz", "pickle", "solution"])
def test_foreign_files_are_refused(kind, tmp_path):
    with pytest.raises(InstanceFormatError, match="path"):
        inst.read_instance(foreign(tmp_path, kind))


def rewrite(path, change_header=None, change_arrays=None, *, seal=True):
    """Write the file again with a changed header or arrays, checksums correct; ours only with `seal`."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    header = json.loads(arrays.pop("header").tobytes())
    if change_header:
        header.update(change_header)
    if change_arrays:
        arrays.update(change_arrays)
    if seal:
        header.pop(CHECKSUM)
        header[CHECKSUM] = checksum(header, arrays)
    np.savez(path, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"version": 99}, {}),
        ({"version": "1"}, {}),
        ({"format": "something"}, {}),
        ({"n_prune": 50}, {}),
        ({"n_prune": None}, {}),
        ({"damping": -1.0}, {}),
        ({"damping": 0.5}, {}),
        ({"fingerprint": "0" * 64}, {}),
        ({"metadata": 3}, {}),
        ({"arrays": {}}, {}),
        ({"arrays": []}, {}),
        ({"arrays": {"weights": {"shape": [10**12], "dtype": "float64"}}}, {}),
        ({}, {"weights": np.ones(5, dtype=np.float32)}),
        ({}, {"weights": np.ones((5, 1))}),
        ({}, {"weights": np.full(5, np.nan)}),
        ({}, {"rows": np.ones((2, 4))}),
        ({}, {"extra": np.ones(2)}),
    ],
)
def test_changed_content_is_refused(header, arrays, tmp_path):
    path = tmp_path / "b.npz"
    inst.write_instance(path, block("random", 5, 2, seed=1))
    rewrite(path)
    inst.read_instance(path)
    rewrite(path, header, arrays)
    with pytest.raises(InstanceFormatError):
        inst.read_instance(path)


def test_nothing_that_is_changed_gets_past_the_checksum(tmp_path):
    path, problem = tmp_path / "s.npz", block("random", 8, 4, seed=1)
    inst.write_solution(path, problem, greedy(problem, "joint"))
    whole = path.read_bytes()
    solution = inst.read_solution(path)
    for header, arrays in (
        ({"objective": 0.0}, {}),
        ({"bound": 0.0}, {}),
        ({"version": 1}, {}),
        ({CHECKSUM: None}, {}),
        ({}, {"keep": ~solution.keep}),
        ({}, {"weights": solution.weights + 1e-12}),
    ):
        path.write_bytes(whole)
        rewrite(path, header, arrays, seal=False)
        with pytest.raises(InstanceFormatError, match="checksum"):
            inst.read_solution(path)


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_whose_checksum_is_deleted_is_refused(tmp_path, version):
    path, problem = tmp_path / "b.npz", block("random", 8, 4, seed=1)
    solution = tmp_path / "s.npz"
    inst.write_instance(path, problem)
    inst.write_solution(solution, problem, greedy(problem, "joint"))
    for file, read in ((path, inst.read_instance), (solution, inst.read_solution)):
        rewrite(file, {"version": version, CHECKSUM: None}, seal=False)
        with pytest.raises(InstanceFormatError, match="no checksum"):
            read(file)


def hostile(path, header_text, size=5):
    """A container whose array of weights has this numpy header."""
    inst.write_instance(path, block("random", size, 2, seed=1))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = header_text.encode()
    data = members["weights.npy"][-8 * size :]
    members["weights.npy"] = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    "text",
    [
        "{'descr': '<f8', 'fortran_order': False, 'shape': (999999999999,), }\n",
        "{'descr': '<f8', 'fortran_order': True, 'shape': (5,), }\n",
        "{'descr': '|O', 'fortran_order': False, 'shape': (5,), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (5,), }\n",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (5,), }" + "(" * 5000,
        "__import__('os').abort()\n",
        "",
    ],
)
def test_array_headers_are_matched_and_never_evaluated(text, tmp_path):
    hostile(tmp_path / "b.npz", text)
    with pytest.raises(InstanceFormatError, match="weights"):
        inst.read_instance(tmp_path / "b.npz")


def test_announced_size_is_checked_before_reading(tmp_path):
    path = tmp_path / "b.npz"
    inst.write_instance(path, block("random", 30, 2, seed=1))
    with pytest.raises(InstanceFormatError, match="more than 1000 bytes"):
        inst.read_instance(path, max_bytes=1000)
    # An array that unpacks to far more than its header says is not unpacked.
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["weights.npy"] += bytes(10**7)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InstanceFormatError, match="larger than announced"):
        inst.read_instance(path)


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(InstanceFormatError, match="metadata"):
        inst.write_instance(tmp_path / "b.npz", block("random", 5, 2, seed=1), {"when": object()})
    assert not list(tmp_path.iterdir())


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.npz"
    inst.write_instance(path, block("random", 5, 2, seed=1))
    before = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        inst.write_instance(path, block("random", 5, 2, seed=2))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["b.npz"]


@pytest.mark.parametrize("program", ["selection", "joint"])
def test_solution_round_trip_verifies(program, tmp_path):
    problem = block("random", 8, 4, seed=1)
    for solution in (
        lower_bound(problem, program),
        outer_approximation(problem, program, limits=Limits(time_limit=0.0)),
        greedy(problem, program),
    ):
        inst.write_solution(tmp_path / "s.npz", problem, solution)
        again = inst.read_solution(tmp_path / "s.npz", problem)
        np.testing.assert_array_equal(again.keep, solution.keep)
        np.testing.assert_array_equal(again.weights, solution.weights)
        for name in ("objective", "bound", "termination", "limit", "program", "method", "rel_gap"):
            assert getattr(again, name) == getattr(solution, name)
        assert again.stats.seconds == solution.stats.seconds
        one, other = verify(problem, solution), verify(problem, again)
        assert other.ok
        assert other.bound == one.bound


def test_solution_without_a_set_and_of_another_block(tmp_path):
    problem = block("random", 8, 4, seed=1)
    empty = BlockSolution(
        keep=None,
        weights=None,
        objective=None,
        termination=Termination.NO_SOLUTION,
        program="joint",
        method="x",
    )
    inst.write_solution(tmp_path / "s.npz", problem, empty)
    assert inst.read_solution(tmp_path / "s.npz").keep is None
    with pytest.raises(InstanceFormatError, match="another block"):
        inst.read_solution(tmp_path / "s.npz", block("random", 8, 4, seed=2))
    rewrite(tmp_path / "s.npz", {"termination": "perfect"})
    with pytest.raises(InstanceFormatError, match="no valid solution"):
        inst.read_solution(tmp_path / "s.npz")


def small(name):
    return block("gradient" if MODELS[name].program == "selection" else "random", 5, 2, seed=4)


@pytest.mark.parametrize("format", ["mps", "lp"])
@pytest.mark.parametrize("name", MILP)
def test_linear_exports_read_back_in_highs(name, format, tmp_path):
    import highspy

    problem = small(name)
    written = inst.export_model(problem, name, tmp_path / f"m.{format}", format)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    assert solver.readModel(str(written.path)) == highspy.HighsStatus.kOk
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.run()
    assert solver.modelStatusToString(solver.getModelStatus()) == "Optimal"
    optimum = solver.getInfo().objective_function_value * written.objective_scale
    assert optimum == pytest.approx(brute_force(problem, "selection"), abs=1e-6 * written.objective_scale)


@pytest.mark.parametrize("format", ["mps", "lp"])
@pytest.mark.parametrize("name", EXPORTABLE)
def test_exports_read_back_in_scip(name, format, tmp_path):
    pyscipopt = pytest.importorskip("pyscipopt", reason="extra scip not installed")
    problem = small(name)
    written = inst.export_model(problem, name, tmp_path / f"m.{format}", format)
    scip = pyscipopt.Model()
    scip.hideOutput()
    scip.readProblem(str(written.path))
    # SCIP adds a variable for a quadratic objective, the LP format one for the constant.
    assert 0 <= scip.getNVars() - written.columns <= 2
    scip.setParam("limits/time", 60)
    scip.optimize()
    assert scip.getStatus() == "optimal"
    optimum = scip.getObjVal() * written.objective_scale
    expected = brute_force(problem, MODELS[name].program)
    assert optimum == pytest.approx(expected, abs=2e-5 * written.objective_scale)


@pytest.mark.parametrize("name", EXPORTABLE)
def test_qplib_export_means_the_same(name, tmp_path):
    problem = small(name)
    written = inst.export_model(problem, name, tmp_path / "m.qplib", "qplib")
    parsed = read_qplib(written.path.read_text())
    form = standard_form(MODELS[name].build(problem))
    assert parsed.kind[0] == ("L" if MODELS[name].kind == "MILP" else "D" if "low_rank" in name else "C")
    assert parsed.kind[1] == ("B" if form.integer.all() else "M")
    assert parsed.kind[2] == ("Q" if MODELS[name].kind == "MISOCP" else "L")
    np.testing.assert_array_equal(parsed.integer == 1, form.integer)
    np.testing.assert_array_equal(parsed.lower, form.lower)
    np.testing.assert_array_equal(parsed.upper, form.upper)
    assert [parsed.names[j] for j in range(form.n_columns)] == list(form.column_names)
    generator = np.random.default_rng(0)
    keep = np.array([True, False, True, False, True])
    for x in (*generator.normal(size=(3, form.n_columns)), model_point(problem, form, keep)):
        assert parsed.objective(x) == pytest.approx(form.objective(x), rel=1e-12, abs=1e-12)
        linear = form.matrix @ x
        np.testing.assert_allclose(parsed.rows(x)[: linear.size], linear, atol=1e-12)
        for value, row in zip(parsed.rows(x)[linear.size :], form.quadratic_rows, strict=True):
            products = row.terms.value * x[row.terms.first] * x[row.terms.second]
            assert value == pytest.approx(row.value @ x[row.index] + products.sum(), abs=1e-12)
    np.testing.assert_array_equal(parsed.left[: form.row_lower.size], form.row_lower)
    np.testing.assert_array_equal(parsed.right[: form.row_upper.size], form.row_upper)


def test_export_refuses_what_no_format_states(tmp_path):
    problem = block("random", 5, 2, seed=1)
    with pytest.raises(UnsupportedProblemError, match="joint_big_m"):
        inst.export_model(problem, "joint_indicator", tmp_path / "m.mps")
    with pytest.raises(UnsupportedProblemError, match="mps, lp, qplib"):
        inst.export_model(problem, "joint_big_m", tmp_path / "m.gms", "gms")
    with pytest.raises(UnsupportedProblemError, match="use one of"):
        inst.export_model(problem, "nothing", tmp_path / "m.mps")
    assert not list(tmp_path.iterdir())


def test_library_blocks_load_and_their_records_hold():
    names = inst.library()
    if not names:
        pytest.skip("no block is shipped in this build")
    for name in names:
        problem, metadata = inst.load_library(name)
        assert 0 < problem.n_prune < problem.n
        for program in ("selection", "joint"):
            record = metadata[program]
            assert record["bound"] <= record["objective"] + slack(problem)
            if problem.n <= 16 and record["proved"]:
                optimum = enumerate_optimum(problem, program).objective
                assert optimum == pytest.approx(record["objective"], rel=2e-4)
    with pytest.raises(InstanceFormatError, match="use one of"):
        inst.load_library("nothing")


@pytest.mark.parametrize("reason", [KeyboardInterrupt, OSError])
def test_what_interrupts_the_writing_of_a_file_is_what_is_raised(reason, tmp_path, monkeypatch):
    def stop(self):
        raise reason

    monkeypatch.setattr(zipfile._ZipWriteFile, "close", stop)
    with pytest.raises(reason):
        write_container(tmp_path / "file", {"format": "any"}, {"values": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_arrays_that_could_not_be_read_again_are_not_written(tmp_path):
    path = tmp_path / "file"
    whole = {"places": np.arange(3), "kept": np.array([True, False])}
    write_container(path, {"format": "any", "version": 1}, whole)
    _, found = read_container(path, "any", 1, 10**6)
    assert all(np.array_equal(found[name], array) for name, array in whole.items())
    with pytest.raises(TypeError, match="places has int32"):
        write_container(path, {"format": "any"}, {"places": np.arange(3, dtype=np.int32)})
    assert read_container(path, "any", 1, 10**6)[1].keys() == whole.keys()
