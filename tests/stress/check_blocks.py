"""Every method on random blocks of every regime, against exact rational arithmetic.

``python -m tests.stress.check_blocks 1000 --seed 0`` prints each fault found and the counts.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from formulations import BlockProblem, BlockSolution, CbsError, Limits, Termination, verify
from formulations.branch_and_bound import branch_and_bound
from formulations.enumeration import enumerate_optimum
from formulations.errors import NotPositiveDefiniteError
from formulations.incumbents import IncumbentPool, greedy, swap_search
from formulations.outer_approximation import outer_approximation
from formulations.relaxations import lower_bound
from formulations.relaxations.channel_relaxation import relax_by_channels
from formulations.relaxations.first_order import StopRule
from formulations.relaxations.only_set import has_one_set
from formulations.solvers import solve_with
from tests.stress.exact import ExactBlock
from tests.stress.regimes import draw, draw_with_channels, draw_with_support

REL_GAP = 1e-6
LIMITS = Limits(rel_gap=REL_GAP, node_limit=300)
REPORTED_EVERY = 5_000
"""Blocks between two lines that say how far the run is."""
Method = Callable[[BlockProblem, str], BlockSolution]

METHODS: dict[str, Method] = {
    "enumeration": lambda p, program: enumerate_optimum(p, program, limits=LIMITS),
    "branch_and_bound": lambda p, program: branch_and_bound(p, program, limits=LIMITS),
    "lower_bound": lambda p, program: lower_bound(p, program),
    "lower_bound_fixing": lambda p, program: lower_bound(p, program, fix=True),
    "lower_bound_damping": lambda p, program: lower_bound(p, program, diagonal_split=False),
    "greedy": lambda p, program: greedy(p, program),
    "swap_search": lambda p, program: swap_search(p, program, restarts=1),
}
SLOW_METHODS: dict[str, Method] = {
    "outer_approximation": lambda p, program: outer_approximation(
        p, program, limits=Limits(rel_gap=REL_GAP, iteration_limit=20)
    ),
    "highs": lambda p, program: solve_with("highs", p, program, limits=LIMITS),
    "cp_sat": lambda p, program: solve_with("cp_sat", p, program, limits=Limits(time_limit=2.0)),
    "scip": lambda p, program: solve_with("scip", p, program, limits=LIMITS),
}


def by_channels(problem: BlockProblem, program: str) -> BlockSolution:
    """Bound a block of any size as large ones with channels are: without its Hessian."""
    pool = IncumbentPool(problem, program)
    if has_one_set(problem):
        return lower_bound(problem, program)
    pool.offer_magnitude_if_empty()
    stop = StopRule(Limits(), time.perf_counter(), math.inf)
    certificate, keep = relax_by_channels(problem, pool, stop)
    pool.offer(keep)
    bound = certificate.lower_bound(problem)
    return pool.solution(method="by_channels", rel_gap=REL_GAP, bound=bound, certificate=certificate)


KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "counts": draw,
    "supports": draw_with_support,
    "channels": draw_with_channels,
}
"""How blocks are drawn, by what is special about them."""


def faults(seed: int, *, slow: bool = False, kind: str = "counts") -> tuple[list[str], Counter[str]]:
    """Return what is wrong with any method on the block of `seed`, and counts of what happened."""
    counts: Counter[str] = Counter()
    try:
        problem = BlockProblem(**KINDS[kind](seed))
    except CbsError as error:
        counts[f"refused block: {error.args[0].split(':')[0]}"] += 1
        return [], counts
    exact = ExactBlock(problem)
    wrong = []
    for program in ("selection", "joint"):
        optimum = exact.optimum(program)
        refused = []
        methods = METHODS | (SLOW_METHODS if slow else {})
        methods = methods if problem.channels is None else {**methods, "by_channels": by_channels}
        for name, method in methods.items():
            try:
                solution = method(problem, program)
            except NotPositiveDefiniteError:
                refused.append(name)
                continue
            except CbsError as error:
                if name in METHODS:
                    wrong.append(f"{name} {program}: {error}")
                continue
            except Exception as error:
                wrong.append(f"{name} {program}: {type(error).__name__}: {error}")
                continue
            counts[f"{name} {solution.termination.value}"] += 1
            wrong += [f"{name} {program}: {fault}" for fault in _wrong(problem, exact, optimum, solution)]
        if refused:
            counts[f"singular {program}"] += 1
            # Beside singular channels rows may make a definite block, whose bound is made of both together.
            if set(METHODS) - set(refused) and refused != ["by_channels"]:
                wrong.append(f"{program}: refused as singular by {refused} only")
    return wrong, counts


def _wrong(
    problem: BlockProblem, exact: ExactBlock, optimum: Fraction | None, solution: BlockSolution
) -> list[str]:
    """Return what a solution claims that is not so."""
    if solution.keep is None or solution.weights is None or solution.objective is None:
        return ["no set"]
    found = []
    if not problem.allows(solution.keep):
        found.append(f"keeps {int(solution.keep.sum())}, which is no set of {problem.sets}")
    if np.any(solution.weights[~solution.keep] != 0.0) or not np.isfinite(solution.weights).all():
        found.append("weights that do not fit the set")
        return found
    loss = exact.loss(solution.weights.tolist())
    bound = solution.bound
    if bound is not None and not math.isfinite(bound):
        found.append(f"bound {bound}")
    elif bound is not None and (optimum is None or Fraction(bound) > optimum):
        above = None if optimum is None else float(optimum)
        found.append(f"bound {bound!r} above the optimum {above!r} ({solution.termination.value})")
    if solution.termination is Termination.OPTIMAL:
        room = Fraction(REL_GAP * max(abs(solution.objective), 1e-12))
        # The set may be worse by the gap asked for and by what float64 makes of its value.
        room += abs(loss - Fraction(solution.objective))
        if not solution.gap <= REL_GAP:
            found.append(f"optimal at a gap of {solution.gap:.3g}")
        elif optimum is None or loss - optimum > room:
            found.append(f"optimal at {float(loss)!r} although the optimum is {optimum and float(optimum)!r}")
    checked = verify(problem, solution)
    if checked.wrong:
        found.append(f"verify: {checked.notes}")
    return found


def say(line: str) -> None:
    """Write one line to the terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Run the number of blocks asked for and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("blocks", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slow", action="store_true", help="also outer approximation and solvers")
    parser.add_argument(
        "--kind", choices=list(KINDS), default="counts", help="supports: n of every m, and groups"
    )
    parser.add_argument("--show", type=int, default=40, help="faults printed at most")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    began = time.perf_counter()
    shown = 0
    for seed in range(arguments.seed, arguments.seed + arguments.blocks):
        done = seed - arguments.seed
        if done and done % REPORTED_EVERY == 0:
            say(f"{done} blocks in {time.process_time():.0f} s of the processor, {kinds.total()} faults")
        wrong, counted = faults(seed, slow=arguments.slow, kind=arguments.kind)
        counts += counted
        for fault in wrong:
            kinds[re.sub(r"[-+]?\d[\w.+-]*", "#", fault)[:60]] += 1
            if shown < arguments.show:
                say(f"{seed}: {fault}")
                shown += 1
    seconds = time.perf_counter() - began
    say(
        f"{arguments.blocks} blocks from seed {arguments.seed} in {seconds:.0f} s, "
        f"{time.process_time():.0f} s of the processor"
    )
    for name, count in sorted(counts.items()):
        say(f"  {name}: {count}")
    say(f"{kinds.total()} faults")
    for name, count in kinds.most_common():
        say(f"  {name}: {count}")


if __name__ == "__main__":
    main()
