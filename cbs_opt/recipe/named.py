"""Recipes by name: what is asked for, before a network is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cbs_opt.recipe.files import REQUEST_FIELDS, with_fields
from cbs_opt.recipe.records import Recipe, Request, Weights
from cbs_opt.system.checks import check_fields, finite_number, flag, one_of, whole_number
from formulations.errors import ArgumentError

NAMES = ("fast", "balanced", "best")
ALL = Weights()
"""Which weights may go where nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A recipe that becomes a concrete one for a network, its loss and its data: see `cbs_opt.resolution`.

    Raises `ArgumentError` if a field is out of its range; the message names it as ``recipe.<field>``.

    Parameters
    ----------
    name : {"fast", "balanced", "best"}, default "balanced"
    samples : int, optional
        Training samples that may be differentiated in all; by default as the name has it, by the work that
        one of them is.
    seconds : float, optional
        The same as a time, by the gradient of a few samples that is timed at the beginning. Not together with
        `samples`. Such a run is another one each time, so that it cannot be resumed.
    recalibrate : bool, default True
        Estimate batch-norm statistics anew where that lowers the loss on training samples set aside.
    vectors : bool, default True
        Where there is fine-tuning, let biases and the scales and shifts of norms move with the kept weights;
        those stay that are frozen or that ``weights.ignore`` names, and all where batch normalisation keeps
        its statistics.
    weights : Weights
        Which weights may go, and how they form blocks.
    changes : tuple of str
        Fields set afterwards, each ``field=value`` as in ``--set`` of the command line.
    """

    name: str = "balanced"
    samples: int | None = None
    seconds: float | None = None
    recalibrate: bool = True
    vectors: bool = True
    weights: Weights = ALL
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("recipe", self.name, NAMES)
        check_fields(self, "recipe.", whole_number, "samples")
        check_fields(self, "recipe.", finite_number, "seconds", above=True)
        check_fields(self, "recipe.", flag, "recalibrate", "vectors")
        if self.samples is not None and self.seconds is not None:
            found = f"{self.seconds:g} beside samples={self.samples}"
            raise ArgumentError("recipe.seconds", found, "give one of them")
        if not isinstance(self.weights, Weights):
            raise ArgumentError("recipe.weights", f"a {type(self.weights).__name__}", "pass a Weights record")

    def with_changes(self, recipe: Recipe) -> Recipe:
        """Return a recipe with those of its own fields that are set afterwards."""
        own = tuple(change for change in self.changes if change.split(".")[0].strip() not in REQUEST_FIELDS)
        return replace(self, changes=own).changed(Request(sparsity=0.0, recipes=(recipe,))).recipes[0]

    def changed(self, request: Request) -> Request:
        """Return a request with the fields that are set afterwards."""
        return with_fields(request, self.changes) if self.changes else request


def fast(*, recalibrate: bool = True, weights: Weights = ALL) -> Named:
    """Return the recipe of one stage without fine-tuning: seconds for a small network.

    `recalibrate` and `weights`: see `Named`.
    """
    return Named(name="fast", recalibrate=recalibrate, weights=weights)


def balanced(**fields: Any) -> Named:
    """Return the default recipe: few stages, and short fine-tuning.

    Parameters
    ----------
    **fields
        ``samples``, ``seconds``, ``recalibrate``, ``vectors``, ``weights`` and ``changes`` of `Named`.
    """
    return _named("balanced", fields)


def best(**fields: Any) -> Named:
    """Return the recipe of many stages with fine-tuning between them: some ten times the work of `balanced`.

    Parameters
    ----------
    **fields
        ``samples``, ``seconds``, ``recalibrate``, ``vectors``, ``weights`` and ``changes`` of `Named`.
    """
    return _named("best", fields)


def _named(name: str, fields: Mapping[str, Any]) -> Named:
    known = [field for field in Named.__dataclass_fields__ if field != "name"]
    for field in fields:
        if field not in known:
            raise ArgumentError(f"recipe.{field}", "no field of a recipe by name", f"use {', '.join(known)}")
    return Named(name=name, **fields)
