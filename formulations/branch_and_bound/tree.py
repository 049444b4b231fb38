"""The search: best bound first with diving (or depth first), under limits, with an anytime trace."""

from __future__ import annotations

import heapq
import itertools
import math
import time
from dataclasses import dataclass, field, replace

import numpy as np

from formulations.branch_and_bound.node import Node
from formulations.branch_and_bound.outcomes import CLOSED, LEAF
from formulations.branch_and_bound.subproblems import NODE_SPLIT_ROUNDS, Subproblems
from formulations.dense_forms import Rounding
from formulations.incumbents import IncumbentPool
from formulations.problem import SPLIT_LARGEST, BoolArray
from formulations.reduction import FREE
from formulations.relaxations.bounds import root_bounds
from formulations.relaxations.certificate import RelaxationCertificate
from formulations.solution import Certificate, Limit, Limits, Termination, TracePoint, status_of

TRACE_INTERVAL = 0.25
"""Seconds between two trace points that only show a better bound."""
MOST_OPEN = 200_000
"""Open nodes from which the search prefers closing nodes to raising the bound."""
FLOOR_WORK = 128_000
"""Nodes times weights after which a search that goes on is given the bound of `lower_bound` as a floor."""
FLOOR_SHARE = 0.1
"""Share of the time limit after which it is, at the latest."""
LONG_NODE = 0.25
"""Share of the time limit from which a node is named as what delays the return."""
SPLIT_COST = 30.0
"""Time that is left, in plain evaluations of a node, from which large nodes take a step on their split."""
CLUSTER_COST = 10.0
"""Work of a node that is bounded by clusters, in nodes of a diagonal split that are as large."""


@dataclass(frozen=True)
class Elsewhere:
    """What another search of the same block has proved, in units of the loss, and its nodes."""

    bound: float = -math.inf
    nodes: int = 0


@dataclass
class Search:
    """State of one branch and bound; bounds and values in form units unless said otherwise.

    Parameters
    ----------
    subproblems : Subproblems
    pool : IncumbentPool
    limits : Limits
    scale : float
        Loss units of one form unit.
    rounding : Rounding
        Gives the rounding allowance of a bound.
    started : float
        `time.perf_counter` at the start of the solve.
    depth_first : bool
    improve_period : int
        Nodes between two roundings; 0 for none.

    Attributes
    ----------
    work : float
        Cubes of the free weights of its nodes, those in clusters counted `CLUSTER_COST` times.
    closed : float
        Share of the tree that is closed, each child taken for half of its parent.
    """

    subproblems: Subproblems
    pool: IncumbentPool
    limits: Limits
    scale: float
    rounding: Rounding
    started: float
    depth_first: bool = False
    improve_period: int = 25
    nodes: int = 0
    work: float = 0.0
    closed: float = 0.0
    closed_bound: float = float("inf")
    trace: list[TracePoint] = field(default_factory=list)
    rooted: bool = False
    proved: float = -math.inf
    certificate: Certificate | None = None
    open_after_root: int = 0
    current: Node | None = None
    _heap: list[tuple[float, int, Node]] = field(default_factory=list)
    _stack: list[Node] = field(default_factory=list)
    _ticket: itertools.count[int] = field(default_factory=itertools.count)
    _traced: float = 0.0
    floored: bool = False
    message: str = ""
    elsewhere: Elsewhere = Elsewhere()
    _plain_seconds: float = math.inf

    @property
    def incumbent(self) -> float:
        """Value of the best set."""
        return self.pool.objective / self.scale

    @property
    def allowance(self) -> float:
        """Proven bound on all rounding in a bound that matters to the incumbent."""
        return self.rounding.allowance(self.incumbent)

    @property
    def cutoff(self) -> float:
        """Bound from which a node cannot hold a set better by more than the gap asked for."""
        slack = self.limits.rel_gap * max(abs(self.incumbent), 1e-12 / self.scale)
        allowance = self.allowance
        if slack < 4.0 * allowance:
            # The bound is the cutoff less one allowance: room for that where the gap can be met at all.
            room = slack - allowance if 2.0 * slack >= 3.0 * allowance else 2.0 * allowance
        else:
            room = slack - 2.0 * allowance
        return self.incumbent - room

    @property
    def floor(self) -> float:
        """Bound of the best certificate of the whole block."""
        return self.proved / self.scale

    @property
    def bound(self) -> float:
        """Lower bound on the optimum that a search or a certificate has proved, in units of the loss."""
        searched = self._searched
        own = searched * self.scale if searched > self.floor else self.proved
        return max(own, self.elsewhere.bound)

    @property
    def all_nodes(self) -> int:
        """Nodes of this search and of the other one."""
        return self.nodes + self.elsewhere.nodes

    @property
    def _searched(self) -> float:
        """Bound of the search alone."""
        if not self.rooted:
            return -math.inf
        # Fixing drops subtrees whose bound is only known to reach the cutoff.
        lowest = min(self.closed_bound, self.cutoff)
        if self.current is not None:
            lowest = min(lowest, self.current.bound)
        if self._heap:
            lowest = min(lowest, self._heap[0][0])
        if self._stack:
            lowest = min(lowest, min(node.bound for node in self._stack))
        return lowest - self.allowance

    @property
    def met(self) -> bool:
        """Whether the floor alone meets the best set to the gap asked for."""
        return status_of(self.incumbent, self.floor, self.limits.rel_gap) is Termination.OPTIMAL

    def prove(self, certificate: Certificate | None) -> None:
        """Take over the bound of a certificate of this program if it is the best so far."""
        if not isinstance(certificate, RelaxationCertificate) or certificate.program != self.pool.program:
            return
        bound = certificate.lower_bound(self.pool.problem)
        if bound > self.proved:
            self.proved, self.certificate = bound, certificate

    def lift_floor(self) -> None:
        """Have what `root_bounds` prove in the time that is left, once: the tree may take long to get there.

        Its split of ``H`` is optimised for the root. The nodes go on with theirs: see `root`.
        """
        if self.floored or self.limits.out_of_time(self.started):
            return
        self.floored = True
        known = self.pool.solution(method="branch_and_bound")
        limits = replace(self.limits.left(self.started), iteration_limit=None)
        for found in root_bounds(self.pool.problem, self.pool.program, limits=limits, incumbent=known):
            self.prove(found.certificate)
            assert found.keep is not None
            self.offer(found.keep)
        self.record()

    def twin(self, node: Node) -> Search:
        """Return a search of its own from a node that stands for all that is left, for the same sets."""
        return replace(
            self,
            current=node,
            nodes=0,
            work=0.0,
            closed=0.0,
            closed_bound=math.inf,
            elsewhere=Elsewhere(),
            _heap=[],
            _stack=[],
            _ticket=itertools.count(),
        )

    def learn(self, other: Search) -> None:
        """Take over what another search of the block has proved."""
        self.prove(other.certificate)
        self.floored = self.floored or other.floored
        self.elsewhere = Elsewhere(other.bound, other.nodes)

    def run(self, until: float = math.inf) -> Limit | None:
        """Search from the current node until the tree is closed, that much work is done, or a limit comes."""
        try:
            while self.current is not None and not self.met and self.work < until:
                limit = self.reached()
                if limit is Limit.NODE or self._floor_is_due():
                    self.lift_floor()
                if limit is not None:
                    return limit
                self._process(self.current)
            reached = status_of(self.pool.objective, self.bound, self.limits.rel_gap)
            if self.current is None and reached is not Termination.OPTIMAL:
                # Nothing is left to search, and rounding takes more off its bound than was asked for.
                self.lift_floor()
        except KeyboardInterrupt:
            return Limit.INTERRUPTED
        return None

    def _floor_is_due(self) -> bool:
        limit = self.limits.time_limit
        late = limit is not None and time.perf_counter() - self.started >= FLOOR_SHARE * limit
        return late or self.nodes * self.pool.problem.n >= FLOOR_WORK

    def offer(self, keep: BoolArray) -> bool:
        """Take a set if its form value beats the incumbent; whether it was taken."""
        taken = self.subproblems.value(keep) < self.incumbent and self.pool.offer(keep)
        if taken:
            self.record()
        return taken

    def improve(self, node: Node) -> None:
        """Offer what rounding the relaxation of a node and swaps from there come to."""
        self.offer(self.subproblems.improve(node, self.limits, self.started))

    def record(self) -> None:
        """Append a trace point with the incumbent and bound of now."""
        self._traced = time.perf_counter()
        bound = self.bound
        self.trace.append(
            TracePoint(
                seconds=self._traced - self.started,
                nodes=self.all_nodes,
                objective=self.pool.objective,
                bound=bound if math.isfinite(bound) else None,
            )
        )

    def reached(self) -> Limit | None:
        """Return the limit that has been reached, if any; keeps the trace going."""
        now = time.perf_counter()
        if now - self._traced > TRACE_INTERVAL:
            self.record()
        if self.limits.out_of_time(self.started):
            return Limit.TIME
        if self.limits.node_limit is not None and self.all_nodes >= self.limits.node_limit:
            return Limit.NODE
        return None

    def _process(self, node: Node) -> None:
        cutoff = self.cutoff
        children: list[Node] = []
        if node.bound >= cutoff:
            self.finish(node, CLOSED)
        else:
            began = time.perf_counter()
            cost = CLUSTER_COST if node.clusters is not None else 1.0
            self.work += cost * float(np.count_nonzero(node.status == FREE)) ** 3
            rounds = NODE_SPLIT_ROUNDS if self._split_is_affordable(node) else 0
            outcome, children = self.subproblems.expand(node, cutoff, rounds)
            self.nodes += 1
            seconds = time.perf_counter() - began
            if rounds == 0:
                self._plain_seconds = seconds
            limit = self.limits.time_limit
            if limit is not None and seconds > LONG_NODE * limit:
                self.message = f"one node took {seconds:.2f} s, within which the time limit is not looked at"
            if not children:
                self.finish(node, outcome)
            elif self.improve_period and (self.nodes < 20 or self.nodes % self.improve_period == 0):
                self.improve(node)
        following = children.pop() if children else None
        for child in children:
            self._push(child)
        self.current = following if following is not None else self._pop()

    def _split_is_affordable(self, node: Node) -> bool:
        """Whether there is time for a step on the split: in a large block it is many times a plain node."""
        if node.status.size <= SPLIT_LARGEST or self.limits.time_limit is None:
            return True
        left = self.limits.left(self.started).time_limit
        return left is not None and left > SPLIT_COST * self._plain_seconds

    def finish(self, node: Node, outcome: int) -> None:
        """Account for a node that needs no children."""
        bound = node.bound
        self.closed += 0.5**node.depth
        if outcome == LEAF:
            keep = self.subproblems.keep(node)
            bound = max(bound, self.subproblems.value(keep))
            self.offer(keep)
        self.closed_bound = min(self.closed_bound, bound)

    def _push(self, node: Node) -> None:
        if self.depth_first:
            self._stack.append(node)
        else:
            heapq.heappush(self._heap, (node.bound, next(self._ticket), node))

    def _pop(self) -> Node | None:
        if self._stack:
            return self._stack.pop()
        if len(self._heap) > MOST_OPEN:
            # The end of a heap holds nodes of high bound: they close soonest and free memory.
            return self._heap.pop()[2]
        if self._heap:
            return heapq.heappop(self._heap)[2]
        return None
