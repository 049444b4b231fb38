"""What relaxing pairs of weights together could close where the Hessian has full rank: a yardstick.

    pip install clarabel
    python -m experiments.benchmarks.pair_relaxation --out runs/pairs

A semidefinite program for each block: ``W`` in the place of ``u u^T``, and for chosen pairs of weights the
convex hull of what their four supports allow of ``(z_i, z_j, u_i, u_j, W_ii, W_ij, W_jj)``. Without any pair
it is the relaxation of the best diagonal split, which no other diagonal split can pass; pairs may overlap, as
clusters may not. Those are chosen that ``|H_ij (W - u u^T)_ij|`` of the program without pairs says most of:
one or four for every weight, and then all. Sources: Dong, Chen & Linderoth (2015), Regularization vs.
relaxation; Han, Gomez & Atamturk (2023), 2x2-convexifications for convex quadratic optimization with
indicator variables. Values are those of an interior-point solver, and no proved bounds: beside them what
`lower_bound` proves with a diagonal split and by default, all against the optimum, which `branch_and_bound`
proves.

Blocks are the first inputs of two rows of SmolLM2 from the instance library. Processor seconds of one thread.
Each cell is appended to ``OUT/results.jsonl`` as it is done: the same command goes on where it was stopped.
Prints a table as Markdown.

Exit codes: 0 done, 1 an error, 2 a usage error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import clarabel
import numpy as np
from scipy.sparse import csc_matrix, vstack

from cbs_opt.system.threads import thread_limit
from experiments.command_line import experiment_parser
from experiments.ledger import Ledger, commit, settings_key
from formulations import BlockProblem, Limits
from formulations.branch_and_bound import branch_and_bound
from formulations.dense_forms import DenseForm, joint_form
from formulations.errors import CbsError
from formulations.instances import load_library
from formulations.problem import FloatArray, IntArray
from formulations.relaxations import lower_bound

DEFAULT_OUT = Path("runs/pairs")
BLOCKS = ("gram_gate_64_s50", "gram_o_64_s50")
ORDERS, SHARES = (24, 32, 48), (0.5, 0.9)
PER_WEIGHT = (1, 4)
SECONDS = 60.0
ROOT2 = np.sqrt(2.0)
Term = tuple[IntArray, float]
"""Places of variables, one for each of some expressions, and their coefficient."""


@dataclass(frozen=True)
class Relaxed:
    """Value of a semidefinite program, its point and its matrix, in units of a `DenseForm`."""

    value: float
    point: FloatArray
    matrix: FloatArray


class PairProgram:
    """The semidefinite program of a joint form, with the hulls of some pairs.

    Parameters
    ----------
    form : DenseForm
    n_keep : int
    pairs : (k, 2) int64 array
        The smaller index first.
    """

    def __init__(self, form: DenseForm, n_keep: int, pairs: IntArray) -> None:
        n, k = form.linear.size, len(pairs)
        self._form, self._n = form, n
        self._rows, self._columns = np.triu_indices(n)
        sizes = (n, n, self._rows.size, k, k, k, k, k)
        starts = np.concatenate(([0], np.cumsum(sizes)))
        spans = [np.arange(begin, end) for begin, end in pairwise(starts)]
        self._many = int(starts[-1])
        self._u, z, entries, both, first, first_square, second, second_square = spans
        place = np.empty((n, n), dtype=np.int64)
        place[self._rows, self._columns] = place[self._columns, self._rows] = entries
        self._place = place
        self._parts: list[tuple[csc_matrix, FloatArray]] = []
        self._cones: list[Any] = []
        i, j = pairs[:, 0], pairs[:, 1]
        self._at_least_zero(
            [
                self._expressions(1, [(z, -1.0)], float(n_keep), summed=True),
                self._expressions(n, [(z, 1.0)]),
                self._expressions(n, [(z, -1.0)], 1.0),
                self._expressions(k, [(both, 1.0)]),
                self._expressions(k, [(z[i], -1.0), (z[j], -1.0), (both, 1.0)], 1.0),
            ]
        )
        self._semidefinite(
            1, [self._corner(row, column) for column in range(n + 1) for row in range(column + 1)]
        )
        own = np.diagonal(place)
        self._semidefinite(n, [self._expressions(n, [(part, 1.0)]) for part in (z, self._u, own)])
        # What is kept with the other weight pruned, for each of the two; and with both kept.
        for weight, part, square in ((i, first, first_square), (j, second, second_square)):
            alone = [[(z[weight], 1.0), (both, -1.0)], [(part, 1.0)], [(square, 1.0)]]
            self._semidefinite(k, [self._expressions(k, terms) for terms in alone])
        together: list[list[Term]] = [
            [(both, 1.0)],
            [(self._u[i], 1.0), (first, -1.0)],
            [(own[i], 1.0), (first_square, -1.0)],
            [(self._u[j], 1.0), (second, -1.0)],
            [(place[i, j], 1.0)],
            [(own[j], 1.0), (second_square, -1.0)],
        ]
        self._semidefinite(k, [self._expressions(k, terms) for terms in together])

    def solve(self) -> Relaxed:
        """Solve the program by Clarabel.

        Raises
        ------
        CbsError
            If it ends without a solution.
        """
        form, n = self._form, self._n
        cost = np.zeros(self._many)
        cost[self._u] = -form.linear
        halves = np.where(self._rows == self._columns, 0.5, 1.0)
        cost[self._place[self._rows, self._columns]] = halves * form.matrix[self._rows, self._columns]
        options = clarabel.DefaultSettings()
        options.verbose = False
        nothing = csc_matrix((self._many, self._many))
        system = csc_matrix(-vstack([matrix for matrix, _ in self._parts]))
        constants = np.concatenate([constant for _, constant in self._parts])
        found = clarabel.DefaultSolver(nothing, cost, system, constants, self._cones, options).solve()
        if str(found.status) not in {"Solved", "AlmostSolved"}:
            raise CbsError(f"clarabel: {found.status} after {found.iterations} steps")
        x = np.asarray(found.x)
        matrix = x[self._place.reshape(-1)].reshape(n, n)
        return Relaxed(min(found.obj_val, found.obj_val_dual) + form.constant, x[self._u], matrix)

    def _corner(self, row: int, column: int) -> tuple[csc_matrix, FloatArray]:
        """Return an entry of ``[[1, u^T], [u, W]]``."""
        if column == 0:
            return self._expressions(1, [], 1.0)
        where = self._u[column - 1] if row == 0 else self._place[row - 1, column - 1]
        return self._expressions(1, [(np.array([where]), 1.0)])

    def _expressions(
        self, count: int, terms: Sequence[Term], constant: float = 0.0, *, summed: bool = False
    ) -> tuple[csc_matrix, FloatArray]:
        """Return so many linear expressions; of all places of a term in one if they are `summed`."""
        rows = [np.zeros(at.size, int) if summed else np.arange(count) for at, _ in terms]
        columns = [at for at, _ in terms]
        values = [np.full(at.size, factor) for at, factor in terms]
        entries = [np.concatenate(parts) if parts else np.empty(0, int) for parts in (values, rows, columns)]
        matrix = csc_matrix((entries[0], (entries[1], entries[2])), shape=(count, self._many))
        return matrix, np.full(count, constant)

    def _at_least_zero(self, parts: Sequence[tuple[csc_matrix, FloatArray]]) -> None:
        self._parts += parts
        self._cones.append(clarabel.NonnegativeConeT(sum(constant.size for _, constant in parts)))

    def _semidefinite(self, count: int, entries: Sequence[tuple[csc_matrix, FloatArray]]) -> None:
        """Ask that matrices are semidefinite; `entries` are those of their upper triangles by columns."""
        if not count:
            return
        order = int((np.sqrt(8.0 * len(entries) + 1.0) - 1.0) / 2.0)
        factors = np.full(len(entries), ROOT2)
        factors[[column * (column + 3) // 2 for column in range(order)]] = 1.0
        scaled = [(f * matrix, f * constant) for f, (matrix, constant) in zip(factors, entries, strict=True)]
        by_matrix = np.arange(count * len(entries)).reshape(len(entries), count).T.reshape(-1)
        matrices = csc_matrix(vstack([matrix for matrix, _ in scaled]))[by_matrix]
        self._parts.append((matrices, np.concatenate([constant for _, constant in scaled])[by_matrix]))
        self._cones += [clarabel.PSDTriangleConeT(order)] * count


def chosen_pairs(form: DenseForm, relaxed: Relaxed, count: int) -> IntArray:
    """Return the pairs that account for most of what a program without pairs gains, (count, 2)."""
    gains = np.abs(form.matrix * (relaxed.matrix - np.outer(relaxed.point, relaxed.point)))
    rows, columns = np.triu_indices(form.linear.size, 1)
    best = np.sort(np.argsort(-gains[rows, columns], kind="stable")[:count])
    return np.stack((rows[best], columns[best]), axis=1)


def first_inputs(name: str, n: int, share: float) -> BlockProblem:
    """Return the first inputs of a row of the library, a share of them to be pruned."""
    block, _ = load_library(name)
    assert block.hessian is not None
    hessian = np.ascontiguousarray(block.hessian[:n, :n])
    return BlockProblem(
        weights=block.weights[:n], hessian=hessian, damping=block.damping, n_prune=round(share * n)
    )


def measure(name: str, n: int, share: float) -> dict[str, Any]:
    """Return gaps to the optimum, and seconds, of the relaxations of a block."""
    problem = first_inputs(name, n, share)
    exact = branch_and_bound(problem, "joint", limits=Limits(time_limit=SECONDS))
    assert exact.objective is not None
    form = joint_form(problem)
    optimum = exact.objective / form.scale
    found: dict[str, Any] = {"proved": exact.termination.value == "optimal"}
    options: dict[str, dict[str, Any]] = {"diagonal": {"relaxation": "perspective"}, "default": {}}
    for label, option in options.items():
        began = time.process_time()
        bound = lower_bound(problem, "joint", incumbent=exact, diagonal_split=True, **option)
        assert bound.bound is not None
        found[label] = 1.0 - bound.bound / exact.objective
        found[f"{label} s"] = time.process_time() - began
    every = np.stack(np.triu_indices(n, 1), axis=1)
    relaxed: Relaxed | None = None
    for label in ("none", *map(str, PER_WEIGHT), "all"):
        pairs = every[:0]
        if relaxed is not None:
            pairs = every if label == "all" else chosen_pairs(form, relaxed, int(label) * n)
        began = time.process_time()
        solved = PairProgram(form, problem.n_keep, pairs).solve()
        relaxed = relaxed or solved
        found[label] = 1.0 - solved.value / optimum
        found[f"{label} s"] = time.process_time() - began
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return gaps in per cent and seconds as Markdown."""
    columns = {
        "diagonal": "diagonal split",
        "none": "best possible",
        "default": "clusters",
        "1": "n pairs",
        "4": "4 n pairs",
        "all": "all pairs",
    }
    head = ["block", "n", "k/n", *(f"{title}, % (s)" for title in columns.values())]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for cell in results:
        name = cell["block"] if cell["proved"] else f"{cell['block']}, not proved"
        gaps = [f"{round(100.0 * cell[label], 2) + 0.0:.2f} ({cell[f'{label} s']:.1f})" for label in columns]
        lines.append("| " + " | ".join([name, str(cell["n"]), f"{cell['share']:g}", *gaps]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Measure what the ledger does not have and print the table."""
    root = experiment_parser("benchmarks.pair_relaxation", __doc__)
    root.add_argument("--orders", nargs="+", type=int, default=list(ORDERS), help="inputs (default 24 32 48)")
    root.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"default {DEFAULT_OUT}")
    given = root.parse_args(arguments)
    ledger = Ledger(given.out / "results.jsonl")
    results = []
    try:
        with thread_limit(1):
            for name in BLOCKS:
                for n in given.orders:
                    for share in SHARES:
                        what = {"block": name.removesuffix("_s50"), "n": n, "share": share}
                        key = settings_key(what)
                        if key not in ledger:
                            ledger.add(key, {**what, **measure(name, n, share), "commit": commit()})
                        results.append(ledger[key])
    except CbsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
