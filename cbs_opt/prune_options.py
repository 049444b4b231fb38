"""The arguments of `prune` as one validated record."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from cbs_opt.budget.counts import Budget, checked_sparsity
from cbs_opt.execution.selector import by_workers
from cbs_opt.execution.workers import Workers
from cbs_opt.hessian.channel_system import DENSE_LIMIT
from cbs_opt.network.partition import BlockRule, checked_rule
from cbs_opt.select.choice import Selector
from cbs_opt.select.methods import Method, available_methods, find_method
from formulations.errors import ArgumentError, UnknownMethodError, UnsupportedProblemError
from formulations.solution import Limits

DAMPING = 0.1
"""Damping by default, in units of the mean diagonal of the Fisher matrix."""
STAGE_DROPS = 3
"""Drops of joint greedy OBS in every stage, by default."""
UPDATES = {True: "cbs", False: None, "cbs": "cbs", "independent": "independent", None: None}


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """What `prune` was asked for; see there for the meaning of each field.

    `update` is "cbs", "independent" or None; `damping`, `update_scale`, `method_options` and
    `layer_inputs` are grids, the last one None where the term is left to the curvature. `executor` is
    no setting: where blocks are solved decides nothing.
    """

    sparsity: float
    program: str
    method: str
    update: str | None
    update_scale: tuple[float, ...]
    curvature: str
    samples: int
    samples_per_row: int
    damping: tuple[float, ...]
    relative_damping: bool
    selection_damping: float | None
    gradient_term: bool
    partition: BlockRule
    budget: Budget
    budget_score: str | None
    restarts: int
    choice_samples: int | None
    method_options: tuple[Mapping[str, Any], ...] = ({},)
    time_limit: float | None = None
    certify: bool = False
    certify_time_limit: float | None = None
    seed: int = 0
    layer_inputs: tuple[float, ...] | None = None
    executor: Workers | None = None

    def __post_init__(self) -> None:
        checked_sparsity("sparsity", self.sparsity)
        checked_rule("partition", self.partition)
        for name in ("samples", "samples_per_row", "restarts", "choice_samples"):
            value = getattr(self, name)
            if name == "choice_samples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(name, f"{value!r}", "pass a whole number >= 1")
        for alternative in self.method_options:
            self.chosen_method.check_options(alternative, self.program)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentError("seed", f"{self.seed!r}", "pass a whole number >= 0")
        self.limits(0)
        if not isinstance(self.certify, bool):
            raise ArgumentError("certify", f"{self.certify!r}", "pass True or False")
        checked_seconds("certify_time_limit", self.certify_time_limit)
        if self.restarts > 1 and not self.chosen_method.randomized:
            raise ArgumentError(
                "restarts", f"{self.restarts} for {self.method}", "it has no random choice: use 1"
            )
        if self.executor is not None and not self.chosen_method.blockwise:
            found = f"given for {self.method} on program {self.program!r}, which takes all blocks at once"
            remedy = "leave it out, or use a method that takes one block at a time, such as branch_and_bound"
            raise ArgumentError("executor", found, remedy)

    @property
    def chosen_method(self) -> Method:
        """The registered method."""
        return find_method(self.method, self.program)

    @property
    def engine(self) -> Selector:
        """What chooses the sets: the method on all blocks at once, or its dense form block by block."""
        method = self.chosen_method
        if self.executor is not None:
            return by_workers(method.engine, method.name, self.program, self.executor)
        return method.selector(self.program)

    @property
    def candidates(self) -> int:
        """How many pruned networks are tried."""
        steps = (self.update_scale,) if self.update is not None else ()
        same = self.update is None and self.selection_damping is not None
        tried = (self.method_options, self.layer_inputs or (0.0,), *steps, *(() if same else (self.damping,)))
        return self.restarts * math.prod(len(entries) for entries in tried)

    @property
    def scoring(self) -> Method:
        """The method whose saliency spends a global budget."""
        if self.budget_score is not None:
            return find_method(self.budget_score, "selection")
        return self.chosen_method

    @property
    def needs_curvature(self) -> bool:
        """Whether gradient rows are needed at all."""
        by_choice = self.chosen_method.needs_curvature or self.scoring.needs_curvature
        return self.update is not None or self.certify or by_choice

    @property
    def layer_input_weight(self) -> float:
        """The weight of the layer-input term where there is no grid, 0 without the term."""
        return 0.0 if self.layer_inputs is None else self.layer_inputs[0]

    @property
    def selects_by_rows(self) -> bool:
        """Whether the method leaves the layer-input term out: searches of the selection program do."""
        return self.program == "selection" and self.chosen_method.kind != "saliency"

    def limits(self, restart: int) -> Limits:
        """Limits and seed of one restart."""
        return Limits(time_limit=self.time_limit, seed=self.seed + 7919 * restart)

    def settings(self) -> dict[str, Any]:
        """Plain values for the report."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "executor"}


def check_certifiable(options: PruneOptions, largest: int, *, given_term: bool) -> None:
    """Raise `UnsupportedProblemError` if bounds for the largest block would need its whole Hessian."""
    term = given_term if options.layer_inputs is None else any(options.layer_inputs)
    if options.certify and term and not options.selects_by_rows and largest > DENSE_LIMIT:
        found = f"True with a layer-input term and a block of {largest} weights"
        remedy = f"cut blocks of at most {DENSE_LIMIT}, or leave the term out"
        raise UnsupportedProblemError("certify", found, remedy)


def checked_seconds(name: str, value: float | None) -> float | None:
    """A time limit that is None or a finite number >= 0."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real)):
        raise ArgumentError(name, f"{value!r}", "pass seconds, or None")
    if value is not None and not 0.0 <= value < math.inf:
        raise ArgumentError(name, f"{value!r}", "pass a finite number >= 0")
    return value


def grid(name: str, value: float | Sequence[float], *, positive: bool) -> tuple[float, ...]:
    """One number or several as a tuple of finite floats, none negative (or zero, if `positive`)."""
    entries = tuple(value) if isinstance(value, Iterable) else (value,)
    for entry in entries:
        bad = (
            isinstance(entry, bool) or not isinstance(entry, Real) or not math.isfinite(entry) or entry < 0.0
        )
        if bad or (positive and entry == 0.0):
            wanted = "> 0" if positive else ">= 0"
            raise ArgumentError(name, f"{entry!r}", f"pass finite numbers {wanted}")
    if not entries:
        raise ArgumentError(name, "empty", "pass at least one number")
    return tuple(float(entry) for entry in entries)


def alternatives(
    value: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
) -> tuple[Mapping[str, Any], ...]:
    """Method options as a grid of alternatives: none, one mapping or several."""
    if value is None:
        return ({},)
    entries = (value,) if isinstance(value, Mapping) else tuple(value) if isinstance(value, Iterable) else ()
    if not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ArgumentError("method_options", f"{value!r}", "pass a mapping, or several to choose from")
    return tuple(dict(entry) for entry in entries)


def chosen_method(
    method: str | None,
    method_options: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    program: str,
    *,
    staged: bool,
) -> tuple[str, Mapping[str, Any] | Sequence[Mapping[str, Any]] | None]:
    """The method and its options where none is named: exchanges pay in one stage, further stages more."""
    if method is not None:
        return method, method_options
    if not staged or program != "joint":
        return "swap_search", method_options
    return "greedy_obs", {"drops": STAGE_DROPS} if method_options is None else method_options


def update_kind(update: bool | str | None) -> str | None:
    """ "cbs", "independent" or None for what the caller passed as `update`."""
    if not isinstance(update, bool | str | None) or update not in UPDATES:
        raise ArgumentError("update", f"{update!r}", 'use True, False or "independent"')
    return UPDATES[update]


def checked_score(name: str | None) -> str | None:
    """`budget_score`, if it names a saliency."""
    known = [method.name for method in available_methods() if method.kind == "saliency"]
    if name is not None and name not in known:
        raise UnknownMethodError("budget_score", f"{name!r}", f"choose among {', '.join(known)}")
    return name
