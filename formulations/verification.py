"""`verify`: what a solution claims of its block, recomputed from the data, trusting no label."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import numpy as np

from formulations.loss import step_loss, trivial_bound
from formulations.problem import PROGRAMS, BlockProblem
from formulations.relaxations.certified import bounded_value
from formulations.solution import (
    BlockSolution,
    Certificate,
    Subject,
    Termination,
    relative_gap,
    stated_support,
)

OBJECTIVE_TOLERANCE = 1e-7
"""Relative difference at which a stated objective counts as the recomputed one."""


class Verdict(enum.Enum):
    """What became of the claims of a solution."""

    OK = "ok"
    """Everything that it claims was checked and holds."""
    UNCHECKED = "unchecked"
    """Nothing is wrong, but a claim rests on the method that made it."""
    WRONG = "wrong"
    """A claim contradicts the data or another claim."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    verdict : Verdict
        Of set, weights, objective, bound, gap and status together.
    feasible : bool
        The set is one of the support and pruned weights are exactly 0.
    objective : float or None
        The objective recomputed in float64.
    bound : float or None
        The bound recomputed from the certificate, None without one.
    bound_checked : bool
        Whether the stated bound is proved by the certificate, or by the loss model never being
        negative. False for a tree's bound that rests on the search.
    notes : tuple of str
        What is wrong, and what could not be checked.
    """

    verdict: Verdict
    feasible: bool
    objective: float | None
    bound: float | None
    bound_checked: bool
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that the solution claims was checked and holds."""
        return self.verdict is Verdict.OK

    @property
    def wrong(self) -> bool:
        """Whether a claim is contradicted."""
        return self.verdict is Verdict.WRONG


@dataclass
class _Findings:
    """Notes made on the way."""

    wrong: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        if self.wrong:
            return Verdict.WRONG
        return Verdict.UNCHECKED if self.unchecked else Verdict.OK


def verify(problem: BlockProblem, solution: BlockSolution) -> Verification:
    """Recompute feasibility, objective, bound, gap and status of a solution, trusting nobody.

    Parameters
    ----------
    problem : BlockProblem
    solution : BlockSolution

    Returns
    -------
    Verification
        Wrong when the program or the support is another, the set is not one of the support, weights
        disagree with the set, the
        objective differs from the recomputed one by more than rounding and 1e-7 relative, a bound is no
        number or exceeds the objective, the certificate is for another program, count or block or lists
        a weight as fixed that it does not prove fixed, or the status is not what set, bound and gap
        say. Unchecked when a bound has no proof here, such as that of a search tree.

    Notes
    -----
    One product with ``H`` for the objective and one or two for each certificate of the chain.
    """
    findings = _Findings()
    if solution.program not in PROGRAMS:
        findings.wrong.append(f"no program is called {solution.program!r}")
    if solution.support != stated_support(problem):
        words = [said or "a count" for said in (solution.support, stated_support(problem))]
        findings.wrong.append(f"the solution is for {words[0]}, the problem asks for {words[1]}")
    feasible, value, ceiling = _check_set(problem, solution, findings)
    bound, checked = _check_bound(problem, solution, ceiling, findings)
    _check_status(solution, findings)
    return Verification(
        verdict=findings.verdict,
        feasible=feasible,
        objective=value,
        bound=bound,
        bound_checked=checked and not findings.wrong,
        notes=(*findings.wrong, *findings.unchecked),
    )


def _check_set(
    problem: BlockProblem, solution: BlockSolution, findings: _Findings
) -> tuple[bool, float | None, float]:
    """Feasibility, the recomputed objective, and what its exact value is proved not to exceed."""
    wrong = findings.wrong
    if solution.keep is None or solution.weights is None:
        if solution.objective is not None:
            wrong.append(f"objective {solution.objective!r} without a set")
        return False, None, math.inf
    if solution.keep.shape != (problem.n,) or solution.weights.shape != (problem.n,):
        wrong.append(f"solution of {solution.keep.size} weights for a block of {problem.n}")
        return False, None, math.inf
    if not np.isfinite(solution.weights).all():
        wrong.append("weights that are not finite")
        return False, None, math.inf
    infeasible = []
    if not problem.allows(solution.keep):
        asked = problem.n_keep if problem.support is None else problem.support
        infeasible.append(f"keeps {int(solution.keep.sum())} weights, the problem asks for {asked}")
    if np.any(solution.weights[~solution.keep] != 0.0):
        infeasible.append("a pruned weight is not exactly 0")
    kept = solution.weights[solution.keep]
    if solution.program == "selection" and np.any(kept != problem.weights[solution.keep]):
        infeasible.append("a kept weight moved although the program is selection")
    wrong += infeasible
    value = step_loss(problem, solution.weights - problem.weights)
    exact, error = bounded_value(problem, solution.weights)
    stated = solution.objective
    if stated is None or not abs(stated - value) <= OBJECTIVE_TOLERANCE * abs(value) + error:
        wrong.append(f"stated objective {stated}, recomputed {value!r}")
    return not infeasible, value, exact + error if not infeasible else math.inf


def _check_bound(
    problem: BlockProblem, solution: BlockSolution, ceiling: float, findings: _Findings
) -> tuple[float | None, bool]:
    """Return the bound of the certificate, and whether the stated one is proved."""
    stated, certificate = solution.bound, solution.certificate
    if stated is not None and not math.isfinite(stated):
        findings.wrong.append(f"bound {stated} is no number")
        stated = None
    if stated is not None and stated > ceiling:
        findings.wrong.append(f"bound {stated!r} exceeds the objective, which is at most {ceiling!r}")
    bound = None
    proved = False
    if certificate is not None:
        bound = _check_certificate(problem, solution, certificate, ceiling, findings)
        proved = stated is not None and bound is not None and certificate.proves_bound(problem, stated)
    if stated is None:
        return bound, False
    trivial = trivial_bound(problem)
    proved = proved or (trivial is not None and stated <= trivial)
    if not proved:
        rest = "it has no certificate" if bound is None else f"its certificate proves {bound!r}"
        findings.unchecked.append(f"bound {stated!r} rests on the method that stated it: {rest}")
    return bound, proved


def _check_certificate(
    problem: BlockProblem,
    solution: BlockSolution,
    certificate: Certificate,
    ceiling: float,
    findings: _Findings,
) -> float | None:
    """Return the bound that a certificate proves; None if it is not about this program."""
    if certificate.program != solution.program:
        found = f"the certificate is for the {certificate.program} program, the solution for"
        findings.wrong.append(f"{found} {solution.program!r}")
        return None
    subject = Subject.of(problem, solution.program)
    if certificate.subject is None:
        findings.unchecked.append("the certificate does not say what it was made for")
    elif certificate.subject != subject:
        findings.wrong.append(f"the certificate was made for {certificate.subject}, this is {subject}")
    if not certificate.proves_fixing(problem):
        findings.wrong.append(f"{certificate.n_fixed} weights listed as fixed are not all proved so")
    bound = certificate.lower_bound(problem)
    if bound > ceiling:
        findings.wrong.append(f"certified bound {bound!r} exceeds the objective, at most {ceiling!r}")
    return bound


def _check_status(solution: BlockSolution, findings: _Findings) -> None:
    """Whether termination and gap are what set and bound say."""
    status = solution.termination
    empty = solution.keep is None
    if status is Termination.INFEASIBLE:
        every = "count from 0 to n" if solution.support is None else "support"
        findings.wrong.append(f"infeasible, although every {every} has a set")
    if status in (Termination.OPTIMAL, Termination.FEASIBLE) and empty:
        findings.wrong.append(f"termination is {status.value} but there is no set")
    if status is Termination.NO_SOLUTION and not empty:
        findings.wrong.append("termination is no_solution but there is a set")
    asked = solution.rel_gap
    if asked is not None and not 0.0 <= asked < math.inf:
        findings.wrong.append(f"a gap of {asked} cannot have been asked for")
    if status is Termination.OPTIMAL and not (
        asked is not None and relative_gap(solution.objective, solution.bound) <= asked
    ):
        gap = relative_gap(solution.objective, solution.bound)
        findings.wrong.append(f"called optimal to a gap of {asked}, but the gap is {gap:.3g}")
