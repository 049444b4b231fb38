"""Certified gaps as a Markdown page: one section a case, with its command, its rows and its sums."""

from __future__ import annotations

import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cbs_opt.report.numbers import bound_text, gap_text

Row = Mapping[str, Any]
PACKAGES = ("cbs-opt", "numpy", "scipy", "numba", "torch")
TITLES = {
    "mlpnet": "MLPNet, one block of 32 360 weights",
    "digits": "A 128-128 layer of a digits network, 16 384 weights",
    "resnet20_layers": "ResNet20, one block a layer",
    "resnet20_global": "ResNet20, one block of 267 264 weights",
    "synthetic": "Synthetic blocks up to 10^6 weights",
    "grid": "Gap against damping and rank",
}
PICTURES = {
    "synthetic": "Processor seconds a step against the number of weights, beside a line proportional to it",
    "grid": "Certified gap against rho, one line for each ratio of n to the effective rank",
}
HEADINGS = (
    "block",
    "n x m",
    "damping",
    "sparsity",
    "objective",
    "bound",
    "gap",
    "mark",
    "rho",
    "n / eff. rank",
    "fixed",
    "bound s",
    "all s",
    "mark s",
    "peak GiB",
)
INTRODUCTION = """# Certified gaps of the joint program

How far above the optimum of the quadratic model a set can be at most: `gap = (objective - bound) /
objective`. The bound is that of the perspective relaxation, recomputed in float64 from its certificate and
rounded down; the objective is that of a 1-swap search from the rounded relaxation. The bound is then
tightened: weights whose fate the first bound and the incumbent settle are fixed (column "fixed") and the
rest relaxed again. "bound s" is the time of the first relaxation, "all s" that of everything, on the
threads stated; reading data, taking gradient rows and checking the certificates are not timed. Memory is
the peak of the whole process while solving, the rows included. rho is the damping over the mean Fisher
diagonal, the effective rank `tr(F)^2 / tr(F^2)`. A gap is about the quadratic model of the loss, not about
accuracy. `python -m experiments.benchmarks.certified_gaps --help` describes the cases."""


def machine_facts() -> dict[str, Any]:
    """Processor, memory, threads and versions: what a time depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(_memory() / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in PACKAGES},
    }


def gaps_page(cases: Mapping[str, tuple[Sequence[str], Sequence[Row]]]) -> str:
    """Return the page of several cases: for each its command-line arguments and results."""
    sections = [INTRODUCTION]
    for case, (arguments, rows) in cases.items():
        command = f"    python -m experiments.benchmarks.certified_gaps {_shown(arguments)}"
        sections += [f"## {TITLES[case]}", command, _machine(rows)]
        if case in PICTURES:
            sections.append(f"![{PICTURES[case]}](../figures/certified_{case}.svg)")
        sections.append(_table(rows))
        if case == "resnet20_layers":
            sections.append(_sums(rows))
        if case == "synthetic":
            sections.append(_steps(rows))
    return "\n\n".join(section for section in sections if section) + "\n"


def _shown(arguments: Sequence[str]) -> str:
    """Return the arguments without where this machine keeps its data and results."""
    shown, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--data":
            skip = True
        elif shown and shown[-1] == "--out":
            shown.append("runs/gaps")
        else:
            shown.append(argument)
    return shlex.join(shown)


def _machine(rows: Sequence[Row]) -> str:
    found = [row["machine"] for row in rows if "machine" in row]
    if not found:
        return ""
    first = found[0]
    threads = sorted({facts["threads"] for facts in found})
    loads = [facts["load"] for facts in found]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{first['processor']}, {first['cores']} cores, {first['memory_gib']} GiB, "
        f"{'/'.join(map(str, threads))} thread(s), load of the machine {min(loads)} to {max(loads)}. "
        f"{versions}."
    )


def _table(rows: Sequence[Row]) -> str:
    lines = ["| " + " | ".join(HEADINGS) + " |", "| --- |" + " ---: |" * (len(HEADINGS) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(_cells(row)) + " |" for row in rows)])


def _cells(row: Row) -> list[str]:
    rank = row["effective_rank"]
    return [
        row["block"] + ("" if row["verified"] else " (not verified)"),
        f"{row['n']} x {row['m']}",
        f"{row['damping']:g}",
        f"{row['sparsity']:g}",
        f"{row['objective']:.6g}",
        "-" if row["bound"] is None else bound_text(row["bound"]),
        "-" if row["gap"] is None else gap_text(row["gap"]),
        "" if row["mark_gap"] is None else f"{100.0 * row['mark_gap']:g} %",
        "-" if row["rho"] is None else f"{row['rho']:.2g}",
        "-" if rank is None else _ratio(row["n"] / rank),
        "-" if row["n_fixed"] is None else str(row["n_fixed"]),
        f"{row['bound_seconds']:.1f}",
        f"{row['seconds']:.1f}",
        "" if row["mark_seconds"] is None else f"{row['mark_seconds']:g}",
        f"{row['peak_bytes'] / 2**30:.2f}",
    ]


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10.0 else f"{value:.1f}"


def _sums(rows: Sequence[Row]) -> str:
    """Return the layers added up, a line for each damping and sparsity."""
    groups: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["damping"], row["sparsity"]), []).append(row)
    lines = ["Sums over layers, a bound for the block-diagonal quadratic model:", ""]
    lines += ["| damping | sparsity | layers | objective | bound | gap | s |", "|" + " ---: |" * 7]
    for (damping, sparsity), group in groups.items():
        objective = math.fsum(row["objective"] for row in group)
        bounds = [row["bound"] for row in group]
        known = all(bound is not None for bound in bounds)
        total = math.nextafter(math.fsum(bounds), -math.inf) if known else None
        cells = [f"{damping:g}", f"{sparsity:g}", str(len(group)), f"{objective:.6g}"]
        cells += (
            ["-", "-"] if total is None else [bound_text(total), gap_text((objective - total) / objective)]
        )
        cells.append(f"{sum(row['seconds'] for row in group):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _steps(rows: Sequence[Row]) -> str:
    """Cost of a step by size."""
    lines = ["| n | processor ms a step | ns a step and weight |", "| ---: | ---: | ---: |"]
    for row in rows:
        if row.get("seconds_per_step"):
            step = row["seconds_per_step"]
            lines.append(f"| {row['n']} | {1e3 * step:.1f} | {1e9 * step / row['n']:.1f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for entry in path.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
