"""Blocks and solutions on disk, models for other solvers, and the shipped library of real blocks.

A block is one ``.npz`` file with a JSON header (`formulations.files`); it is the truth, and reading it
checks the fingerprint of the data. MPS, LP and QPLIB files are exports of one model of the block.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from formulations.channels import ChannelTerm
from formulations.errors import CbsError, InstanceFormatError, UnsupportedProblemError
from formulations.files import read_container, write_atomically, write_container
from formulations.models import model_spec
from formulations.problem import BlockProblem
from formulations.relaxations.storage import certificate_entries, restored_certificate
from formulations.solution import BlockSolution, Limit, SolveStats, Termination
from formulations.support import Support, support_from_json

BLOCK_FORMAT = "cbs-opt block"
SOLUTION_FORMAT = "cbs-opt solution"
VERSION = 2
MAX_BYTES = 2**34
"""Largest file content read by default, 16 GiB of arrays."""
LABELS = "groups"
"""Array of a block's file that holds the group of each weight."""
CHANNELS = "channels_"
"""Beginning of the names of the arrays that make up the term over channels."""
LIBRARY = resources.files("formulations") / "library"


def write_instance(
    path: str | os.PathLike[str], problem: BlockProblem, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a block, atomically.

    Parameters
    ----------
    path : path
        Ends in ``.npz`` by custom.
    problem : BlockProblem
    metadata : mapping, optional
        Anything JSON can hold, such as where the block comes from.

    Raises
    ------
    InstanceFormatError
        If `metadata` is not JSON.
    """
    header = {
        "format": BLOCK_FORMAT,
        "version": VERSION,
        "name": problem.name,
        "n_prune": problem.n_prune,
        "support": _support_entry(problem),
        "damping": problem.damping,
        "fingerprint": problem.fingerprint(),
        "metadata": _plain_json(metadata or {}),
    }
    arrays = {
        tag: np.asarray(array, dtype="<f8")
        for tag in ("weights", "rows", "hessian", "gradient")
        if (array := getattr(problem, tag)) is not None
    }
    if problem.channels is not None:
        arrays |= {CHANNELS + tag: array.astype("<f8") for tag, array in problem.channels.arrays().items()}
    if problem.support is not None and problem.support.unit is not None:
        # A header has a largest size; whole numbers of this size are exact in float64.
        arrays[LABELS] = problem.support.unit.astype("<f8")
    write_container(path, header, arrays)


def _support_entry(problem: BlockProblem) -> dict[str, Any] | None:
    """Return what the header says of the support: None for a count, of groups all but the labels."""
    if problem.support is None:
        return None
    return {name: value for name, value in problem.support.as_json().items() if name != LABELS}


def _support_of(header: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Support | None:
    """Return the support of a header, its labels taken out of `arrays`; None for a count, as in old files."""
    entry, labels = header.get("support"), arrays.pop(LABELS, None)
    if entry is None and labels is None:
        return None
    whole = {**(entry or {}), **({} if labels is None else {LABELS: labels.astype(np.int64)})}
    return support_from_json(whole)


def _plain_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InstanceFormatError(
            "metadata", f"not JSON: {error}", "use plain numbers, text, lists"
        ) from error
    assert isinstance(plain, dict)
    return plain


def read_instance(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES
) -> tuple[BlockProblem, dict[str, Any]]:
    """Read a block and its metadata.

    Raises
    ------
    InstanceFormatError
        If the file is absent, damaged, foreign, too large, or its data do not make a valid block
        with the fingerprint that was written.
    """
    header, arrays = read_container(path, BLOCK_FORMAT, VERSION, max_bytes)
    parts = {tag[len(CHANNELS) :]: arrays.pop(tag) for tag in list(arrays) if tag.startswith(CHANNELS)}
    unknown = set(arrays) - {"weights", "rows", "hessian", "gradient", LABELS}
    if unknown or "weights" not in arrays:
        raise InstanceFormatError("path", f"{path}: arrays {sorted(arrays)}", "write the file again")
    for array in (*arrays.values(), *parts.values()):
        array.flags.writeable = False
    try:
        problem = BlockProblem(
            n_prune=header["n_prune"],
            support=_support_of(header, arrays),
            damping=header["damping"],
            name=str(header["name"]),
            channels=ChannelTerm.of_arrays(parts) if parts else None,
            **arrays,
        )
        expected, metadata = header["fingerprint"], dict(header["metadata"])
    except (KeyError, TypeError, ValueError, CbsError) as error:
        raise InstanceFormatError(
            "path", f"{path}: no valid block ({error})", "write the file again"
        ) from error
    if problem.fingerprint() != expected:
        raise InstanceFormatError("path", f"{path}: data do not match their fingerprint", "write it again")
    return problem, metadata


def write_solution(
    path: str | os.PathLike[str], problem: BlockProblem | str, solution: BlockSolution
) -> None:
    """Write a solution with the fingerprint of its block, atomically.

    Certificates of relaxations are stored whole, with their fixings and the certificates that these
    rest on; the trace and `SolveStats.extra` are not.

    Parameters
    ----------
    path : path
    problem : BlockProblem or str
        The block, or its fingerprint alone where the data are no longer at hand.
    solution : BlockSolution
    """
    arrays: dict[str, np.ndarray] = {}
    if solution.keep is not None and solution.weights is not None:
        arrays = {"keep": solution.keep, "weights": solution.weights}
    chain, evidence = certificate_entries(solution.certificate)
    arrays |= evidence
    stats = asdict(replace(solution.stats, extra={}))
    stats.pop("extra")
    header = {
        "format": SOLUTION_FORMAT,
        "version": VERSION,
        "fingerprint": problem if isinstance(problem, str) else problem.fingerprint(),
        "objective": solution.objective,
        "bound": solution.bound,
        "termination": solution.termination.value,
        "limit": None if solution.limit is None else solution.limit.value,
        "program": solution.program,
        "method": solution.method,
        "support": solution.support,
        "rel_gap": solution.rel_gap,
        "stats": stats,
        "certificate": chain[0]["kind"] if chain else None,
        "certificate_chain": chain,
    }
    write_container(path, header, arrays)


def read_solution(
    path: str | os.PathLike[str], problem: BlockProblem | None = None, *, max_bytes: int = MAX_BYTES
) -> BlockSolution:
    """Read a solution.

    Parameters
    ----------
    path : path
    problem : BlockProblem, optional
        The block it must belong to. Nothing in the file is trusted beyond its form: use
        `formulations.verify` on the result.
    max_bytes : int

    Raises
    ------
    InstanceFormatError
        If the file is absent, damaged, foreign, too large, or belongs to another block.
    """
    header, arrays = read_container(path, SOLUTION_FORMAT, VERSION, max_bytes)
    if problem is not None and header.get("fingerprint") != problem.fingerprint():
        raise InstanceFormatError(
            "path", f"{path}: solves another block", "pass the block it was written for"
        )
    try:
        stats = dict(header["stats"])
        return BlockSolution(
            keep=arrays.get("keep"),
            weights=arrays.get("weights"),
            objective=_optional_number(header["objective"]),
            bound=_optional_number(header["bound"]),
            termination=Termination(header["termination"]),
            limit=None if header["limit"] is None else Limit(header["limit"]),
            program=str(header["program"]),
            method=str(header["method"]),
            support=None if header.get("support") is None else str(header["support"]),
            rel_gap=_optional_number(header["rel_gap"]),
            certificate=restored_certificate(_chain(header), arrays),
            stats=SolveStats(**stats),
        )
    except (KeyError, TypeError, ValueError, CbsError) as error:
        raise InstanceFormatError("path", f"{path}: no valid solution ({error})", "write it again") from error


def _optional_number(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _chain(header: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return header entries of the certificate and its bases; old files name the kind alone."""
    kind = header["certificate"]
    return list(header.get("certificate_chain") or ([] if kind is None else [{"kind": kind}]))


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """What was written: loss increase = `objective_scale` times the file's objective."""

    path: Path
    model: str
    format: str
    objective_scale: float
    columns: int
    linear_rows: int
    quadratic_rows: int


def export_model(
    problem: BlockProblem,
    model_name: str,
    path: str | os.PathLike[str],
    format: str = "mps",
    *,
    incumbent: BlockSolution | None = None,
) -> ExportedModel:
    """Write one model of a block for another solver, atomically.

    Parameters
    ----------
    problem : BlockProblem
    model_name : str
        A formulation of `formulations.models`.
    path : path
    format : {"mps", "lp", "qplib"}
    incumbent : BlockSolution, optional
        Tightens the constants of joint models.

    Raises
    ------
    UnsupportedProblemError
        If the model or the format is unknown, or the model has indicator constraints, which none of
        the formats states portably (`joint_big_m` is the same model with constants).
    NotPositiveDefiniteError
        If the model is joint and ``H`` is singular.
    """
    from formulations.model_files import lp_text, mps_text, qplib_text
    from formulations.models.translation import standard_form

    writers = {"mps": mps_text, "lp": lp_text, "qplib": qplib_text}
    if format not in writers:
        raise UnsupportedProblemError("format", f"{format!r}", f"use one of: {', '.join(writers)}")
    form = standard_form(model_spec(model_name).build(problem, incumbent=incumbent))
    if form.indicators:
        found = f"{model_name!r} has indicator constraints"
        raise UnsupportedProblemError("model_name", found, "export joint_big_m instead")
    write_atomically(path, writers[format](form).encode())
    return ExportedModel(
        path=Path(path),
        model=model_name,
        format=format,
        objective_scale=form.objective_scale,
        columns=form.n_columns,
        linear_rows=int(form.matrix.shape[0]),
        quadratic_rows=len(form.quadratic_rows),
    )


def library() -> list[str]:
    """Return the names of the shipped blocks, in the order of the index; empty if none is shipped."""
    return list(_library_index())


def load_library(name: str) -> tuple[BlockProblem, dict[str, Any]]:
    """Return a shipped block and its metadata: origin, and for each program its optimum or best bound.

    Blocks that differ in what they keep alone share a file; the index has the count or the support of each.

    Raises
    ------
    InstanceFormatError
        If no block of that name is shipped.
    """
    index = _library_index()
    if name not in index:
        raise InstanceFormatError("name", f"{name!r}", f"use one of: {', '.join(index) or 'none shipped'}")
    entry = index[name]
    with resources.as_file(LIBRARY / str(entry["file"])) as path:
        data, metadata = read_instance(path)
    support = entry.get("support")
    posed = {"n_prune": entry["n_prune"]} if support is None else {"n_prune": None}
    problem = replace(
        data, **posed, support=None if support is None else support_from_json(support), name=name
    )
    return problem, {**metadata, **{key: value for key, value in entry.items() if key != "file"}}


def _library_index() -> dict[str, dict[str, Any]]:
    try:
        text = (LIBRARY / "index.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    index: dict[str, dict[str, Any]] = json.loads(text)
    return index
