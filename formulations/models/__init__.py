"""Both programs as algebraic models, one module a formulation, and the registry that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from formulations.errors import UnsupportedProblemError
from formulations.problem import BlockProblem
from formulations.solution import BlockSolution, never

INTEGER = "integer"
QUADRATIC_OBJECTIVE = "quadratic objective"
QUADRATIC_CONSTRAINT = "quadratic constraint"
INDICATOR = "indicator constraint"
REPEATABLE = "repeatable"
"""No formulation needs it: the same seed gives the same nodes and the same bound to the last digit."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How large a model will be, known before it is built, or what a licence allows.

    Attributes
    ----------
    variables : int
    linear_rows : int
        Indicator rows included.
    quadratic_rows : int
    quadratic_variables : int
        The variables again if the model has products anywhere, 0 if it is linear.
    """

    variables: int
    linear_rows: int
    quadratic_rows: int
    quadratic_variables: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One formulation.

    Attributes
    ----------
    name : str
        Name in method names and of its module in `formulations.models`.
    program : str
        "selection" or "joint".
    kind : str
        "MILP", "MIQP" or "MISOCP".
    needs : frozenset of str
        What a solver must be able to take.
    """

    name: str
    program: str
    kind: str
    needs: frozenset[str]
    _size: Callable[[int], tuple[int, int, int]]

    def build(
        self,
        problem: BlockProblem,
        *,
        incumbent: BlockSolution | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Any:
        """Return the Pyomo model; `incumbent` tightens the constants of joint models.

        Raises `building.BuildingStopped` once `stopped`, asked between terms, says so.
        """
        if not 0 < problem.n_prune < problem.n:
            found = f"{problem.n_prune} of {problem.n}: only one set has that size"
            raise UnsupportedProblemError("n_prune", found, "evaluate it with formulations.loss.objective")
        build = import_module(f"formulations.models.{self.name}").build
        known = {} if self.program == "selection" else {"incumbent": incumbent}
        return build(problem, stopped=stopped, **known)

    def size(self, problem: BlockProblem) -> ModelSize:
        """Upper bound on the size of the model, without building it; O(n)."""
        variables, linear_rows, quadratic_rows = self._size(problem.n)
        rows = len(problem.sets.equations(problem.n, kept=True))
        linear_rows += (rows - 1) * (1 + (problem.n if self.name == "selection_rlt" else 0))
        return ModelSize(
            variables=variables,
            linear_rows=linear_rows,
            quadratic_rows=quadratic_rows,
            quadratic_variables=0 if self.kind == "MILP" else variables,
        )


def _pairs(n: int) -> int:
    return n * (n - 1) // 2


_QUADRATIC = frozenset({INTEGER, QUADRATIC_OBJECTIVE})
_CONIC = frozenset({INTEGER, QUADRATIC_OBJECTIVE, QUADRATIC_CONSTRAINT})

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec(
            name="selection_qp",
            program="selection",
            kind="MIQP",
            needs=_QUADRATIC,
            _size=lambda n: (n, 1, 0),
        ),
        ModelSpec(
            name="selection_shifted_qp",
            program="selection",
            kind="MIQP",
            needs=_QUADRATIC,
            _size=lambda n: (n, 1, 0),
        ),
        ModelSpec(
            name="selection_low_rank",
            program="selection",
            kind="MIQP",
            needs=_QUADRATIC,
            _size=lambda n: (2 * n, 1 + n, 0),
        ),
        ModelSpec(
            name="selection_mccormick",
            program="selection",
            kind="MILP",
            needs=frozenset({INTEGER}),
            _size=lambda n: (n + _pairs(n), 1 + 2 * _pairs(n), 0),
        ),
        ModelSpec(
            name="selection_rlt",
            program="selection",
            kind="MILP",
            needs=frozenset({INTEGER}),
            _size=lambda n: (n + _pairs(n), 1 + n + 3 * _pairs(n), 0),
        ),
        ModelSpec(
            name="selection_glover",
            program="selection",
            kind="MILP",
            needs=frozenset({INTEGER}),
            _size=lambda n: (2 * n, 1 + 2 * n, 0),
        ),
        ModelSpec(
            name="joint_big_m",
            program="joint",
            kind="MIQP",
            needs=_QUADRATIC,
            _size=lambda n: (2 * n, 1 + 2 * n, 0),
        ),
        ModelSpec(
            name="joint_indicator",
            program="joint",
            kind="MIQP",
            needs=_QUADRATIC | {INDICATOR},
            _size=lambda n: (4 * n, 1 + 3 * n, 0),
        ),
        ModelSpec(
            name="joint_perspective",
            program="joint",
            kind="MISOCP",
            needs=_CONIC,
            _size=lambda n: (3 * n, 1 + 2 * n, n),
        ),
        ModelSpec(
            name="joint_low_rank_perspective",
            program="joint",
            kind="MISOCP",
            needs=_CONIC,
            _size=lambda n: (4 * n, 1 + 3 * n, n),
        ),
    )
}
"""Every formulation by name."""


def model_spec(name: str, program: str | None = None) -> ModelSpec:
    """Return the formulation called `name`.

    Raises
    ------
    UnsupportedProblemError
        If there is none, or it poses the other program.
    """
    spec = MODELS.get(name)
    if spec is None or program not in (None, spec.program):
        fitting = ", ".join(s.name for s in MODELS.values() if program in (None, s.program))
        found = f"{name!r} is not a model" if spec is None else f"{name!r} poses the {spec.program} program"
        raise UnsupportedProblemError("model", found, f"use one of: {fitting}")
    return spec
