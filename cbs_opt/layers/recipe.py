"""How the layers of a network are pruned: a method of the layer program and the Hessian it sees."""

from __future__ import annotations

from dataclasses import dataclass

from cbs_opt.select.layer_program.alternating import Alternating
from cbs_opt.select.layer_program.exchanges import Exchanges
from cbs_opt.select.layer_program.methods import layer_method
from cbs_opt.select.layer_program.program import DAMPING
from cbs_opt.select.layer_program.support import BUDGETS
from cbs_opt.system.checks import check_fields, finite_number, one_of, whole_number
from formulations.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class LayerRecipe:
    """How `prune_layers` prunes.

    Raises `ArgumentError` if a field is out of its range.

    Parameters
    ----------
    method : {"exchanges", "alps", "sparsegpt", "greedy_obs", "wanda", "magnitude"}
        "exchanges" by default, which is ours.
    options : Exchanges or Alternating, optional
        Of "exchanges" and of "alps".
    budget : {"rows", "layer"}, default "rows"
        Whether every row of a layer has as many zeros, or all rows together, so that those that lose more
        by a zero have fewer. Not with n:m, nor with "greedy_obs". "sparsegpt" goes over the whole layer in
        any case, as in its paper.
    damping : float, default 0.01
        Of the mean diagonal of each Gram matrix.
    shrinkage : float in [0, 1], optional
        Share of each Gram matrix that gives way to a multiple of the identity of the same trace. By default
        that of Ledoit and Wolf where a layer sees fewer tokens than it has inputs, else none.
    chunk_tokens : int, default 2048
        Tokens that run through a block at once, or one sample of more.
    """

    method: str = "exchanges"
    options: Exchanges | Alternating | None = None
    budget: str = "rows"
    damping: float = DAMPING
    shrinkage: float | None = None
    chunk_tokens: int = 2_048

    def __post_init__(self) -> None:
        layer_method(self.method, self.options)
        one_of("recipe.budget", self.budget, BUDGETS)
        if self.budget == "layer" and self.method == "greedy_obs":
            remedy = 'use "rows", or another method'
            raise ArgumentError("recipe.budget", '"layer" with greedy_obs, which goes row by row', remedy)
        check_fields(self, "recipe.", finite_number, "damping")
        check_fields(self, "recipe.", finite_number, "shrinkage", most=1.0)
        check_fields(self, "recipe.", whole_number, "chunk_tokens")


NAMED = {"fast": LayerRecipe()}


def layer_recipe(recipe: str | LayerRecipe) -> LayerRecipe:
    """Return a recipe as it is, or the one of a name."""
    if isinstance(recipe, LayerRecipe):
        return recipe
    if not isinstance(recipe, str):
        remedy = f"pass a LayerRecipe, or one of {', '.join(NAMED)}"
        raise ArgumentError("recipe", f"a {type(recipe).__name__}", remedy)
    return NAMED[one_of("recipe", recipe, NAMED)]
