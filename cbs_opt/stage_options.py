"""The arguments of `prune` that concern stages, as one validated record."""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt.budget.schedule import Schedule, sparsity_schedule
from cbs_opt.prune_options import PruneOptions
from formulations.errors import ArgumentError

UPDATES_PER_STAGE = 2
FINAL_UPDATES = 4


@dataclass(frozen=True, kw_only=True)
class StageOptions:
    """What `prune` was asked for about stages; see there.

    Parameters
    ----------
    sparsities : tuple of float
        One a stage; a last stage of updates alone follows if there are any.
    updates_per_stage, final_updates : int
    gradient_samples : int or None
        None: as many as the rows of a stage are made of.
    """

    sparsities: tuple[float, ...]
    updates_per_stage: int
    final_updates: int
    gradient_samples: int | None

    @property
    def updates(self) -> tuple[int, ...]:
        """Steps of every stage, the final updates included."""
        pruning = (self.updates_per_stage,) * len(self.sparsities)
        return (*pruning, self.final_updates) if self.final_updates else pruning

    def sparsity(self, stage: int) -> float:
        """Sparsity of a stage, the final updates included."""
        return self.sparsities[min(stage, len(self.sparsities) - 1)]


def stage_options(
    sparsity: float,
    *,
    stages: int,
    schedule: Schedule,
    start_sparsity: float | None,
    updates_per_stage: int | None,
    final_updates: int | None,
    gradient_samples: int | None,
) -> StageOptions | None:
    """The plan of a run in stages, or None for the one-shot run of one stage without extra updates."""
    sparsities = sparsity_schedule(sparsity, stages=stages, schedule=schedule, start=start_sparsity)
    for name, value, least in (
        ("updates_per_stage", updates_per_stage, 1),
        ("final_updates", final_updates, 0),
        ("gradient_samples", gradient_samples, 1),
    ):
        wrong = value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least)
        if wrong:
            raise ArgumentError(name, f"{value!r}", f"pass a whole number >= {least}")
    if stages == 1 and updates_per_stage is None and final_updates is None:
        if gradient_samples is not None:
            remedy = "use more stages, or give updates_per_stage or final_updates"
            raise ArgumentError("gradient_samples", f"{gradient_samples} for one stage", remedy)
        return None
    return StageOptions(
        sparsities=sparsities,
        updates_per_stage=UPDATES_PER_STAGE if updates_per_stage is None else updates_per_stage,
        final_updates=FINAL_UPDATES if final_updates is None else final_updates,
        gradient_samples=gradient_samples,
    )


def check_stageable(options: PruneOptions, plan: StageOptions, *, given_rows: bool) -> None:
    """Raise `ArgumentError` for options that make no sense with stages."""
    if given_rows:
        remedy = "name a curvature: every stage needs rows at its own weights"
        raise ArgumentError("curvature", "rows computed once, for a run in stages", remedy)
    if options.update == "independent":
        remedy = "use update=True or False"
        raise ArgumentError("update", "'independent' for a run in stages", remedy)
    if options.layer_inputs is not None and len(options.layer_inputs) > 1:
        remedy = "name one: in stages the damping scales the term, and is chosen by training loss"
        raise ArgumentError(
            "layer_inputs", f"{len(options.layer_inputs)} weights for a run in stages", remedy
        )
    if options.certify:
        remedy = "use one stage: a bound holds for the model of one stage only"
        raise ArgumentError("certify", "True for a run in stages", remedy)
    if options.update is None and (plan.updates_per_stage > 1 or plan.final_updates):
        found = f"False with {plan.updates_per_stage} updates a stage and {plan.final_updates} at the end"
        raise ArgumentError("update", found, "use updates_per_stage=1, final_updates=0")


def check_one_stage(on_stage: object) -> None:
    """Raise `ArgumentError` for what only a run in stages can use."""
    if on_stage is not None:
        remedy = "use more stages, or give updates_per_stage or final_updates"
        raise ArgumentError("on_stage", "given for one stage", remedy)
