"""Recipes by name."""

from __future__ import annotations

from cbs_opt.recipe.records import Recipe
from cbs_opt.recipe.select import GreedyOBS
from cbs_opt.system.checks import one_of

NAMED: dict[str, Recipe] = {
    "fast": Recipe(select=GreedyOBS()),
    "balanced": Recipe(),
}
"""fast: greedy OBS in drops, without exchanges; balanced, the default: with them."""


def recipe_by_name(name: str) -> Recipe:
    """Return the recipe called `name`, one of `NAMED`."""
    return NAMED[one_of("recipe", name, NAMED)]
