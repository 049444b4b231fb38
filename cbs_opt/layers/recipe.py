"""How the layers of a network are pruned: a method of the layer program and the Hessian it sees."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cbs_opt.layers.divergence import Divergence
from cbs_opt.select.layer_program.alternating import Alternating
from cbs_opt.select.layer_program.exchanges import Exchanges
from cbs_opt.select.layer_program.methods import layer_method
from cbs_opt.select.layer_program.program import DAMPING
from cbs_opt.select.layer_program.support import BUDGETS, Sparsity
from cbs_opt.system.checks import (
    RUN_SEEDS,
    check_fields,
    finite_number,
    flag,
    one_of,
    seed_number,
    whole_number,
)
from formulations.errors import ArgumentError

ALL_BUDGETS = (*BUDGETS, "network")
OWN = ("exchanges", "greedy_obs")
"""Methods that are no comparison with a paper on pruning layers."""


WRITTEN = 8_192, 32_768
"""Fewest and most tokens that a language model writes itself where a recipe by name looks at its predictions;
between these as many as it is given.

SmolLM2-135M at 2:4 and 64 x 512 tokens of data, after a pass: with 8 192 a perplexity of 56.2, with 32 768
of 54.2.
"""


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
    budget : {"rows", "layer", "network"}, default "rows"
        Whether every row of a layer has as many zeros; or all rows together, so that those that lose more
        by a zero have fewer; or all layers together, by what their outputs matter to the network's
        predictions, see `cbs_opt.layers.shares`: this takes gradients of the whole network. Only "rows" with
        n:m and with "greedy_obs". "sparsegpt" goes over the whole layer in any case, as in its paper.
    written : int, default 0
        Tokens of text that a language model writes itself, beside the calibration data, for its layers to be
        fed, see `cbs_opt.layers.writing`. They are not differentiated.
    asymmetric : bool, optional
        Make up in each layer for what those before it have lost, as far as what it is fed tells it, see
        `cbs_opt.layers.asymmetry`. By default with "exchanges" and "greedy_obs", but where weights move on
        the divergence and no text is written: they would learn the same from the same tokens. Other methods
        are as in their papers.
    damping : float, default 0.01
        Of the mean diagonal of each Gram matrix.
    shrinkage : float in [0, 1], optional
        Share of each Gram matrix that gives way to a multiple of the identity of the same trace. By default
        none, but where a layer sees fewer tokens than it has inputs: there the share at which rows lose
        least on a quarter of the tokens, which is set aside for this and counts again afterwards.
    chunk_tokens : int, default 2048
        Tokens that run through a block at once, or one sample of more.
    divergence : Divergence, optional
        Move the kept weights of all blocks on the divergence from the dense network's predictions, after the
        layer programs or between them in stages. This takes gradients of the whole network.
    seed : int, default 0
        Of the labels that are drawn from the network's predictions for the budget "network".
    """

    method: str = "exchanges"
    options: Exchanges | Alternating | None = None
    budget: str = "rows"
    written: int = 0
    asymmetric: bool | None = None
    damping: float = DAMPING
    shrinkage: float | None = None
    chunk_tokens: int = 2_048
    divergence: Divergence | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        layer_method(self.method, self.options)
        one_of("recipe.budget", self.budget, ALL_BUDGETS)
        if self.budget != "rows" and self.method == "greedy_obs":
            found = f'"{self.budget}" with greedy_obs, which goes row by row'
            raise ArgumentError("recipe.budget", found, 'use "rows", or another method')
        check_fields(self, "recipe.", whole_number, "written", least=0)
        if self.asymmetric is None:
            other = self.divergence is None or self.written > 0
            object.__setattr__(self, "asymmetric", self.method in OWN and other)
        check_fields(self, "recipe.", flag, "asymmetric")
        check_fields(self, "recipe.", finite_number, "damping")
        check_fields(self, "recipe.", finite_number, "shrinkage", most=1.0)
        check_fields(self, "recipe.", whole_number, "chunk_tokens")
        check_fields(self, "recipe.", seed_number, "seed", below=RUN_SEEDS)
        check_fields(self, "recipe.", _divergence, "divergence")

    @property
    def differentiates(self) -> bool:
        """Whether gradients of the network are needed."""
        return self.budget == "network" or self.divergence is not None


def _divergence(argument: str, value: object) -> Divergence:
    """Return how weights move, else raise `ArgumentError`."""
    if not isinstance(value, Divergence):
        raise ArgumentError(argument, f"a {type(value).__name__}", "pass a Divergence, or None")
    return value


NAMED = {
    "fast": LayerRecipe(),
    "balanced": LayerRecipe(budget="network", written=WRITTEN[0]),
    "best": LayerRecipe(budget="network", written=WRITTEN[0], divergence=Divergence()),
}


def layer_recipe(recipe: str | LayerRecipe, sparsity: Sparsity, tokens: int = 0) -> LayerRecipe:
    """Return a recipe as it is, or the one of a name for a sparsity and so many tokens of data.

    With n:m there is no budget to share: what looks at the network's predictions moves the weights on them.
    """
    if isinstance(recipe, LayerRecipe):
        return recipe
    if not isinstance(recipe, str):
        remedy = f"pass a LayerRecipe, or one of {', '.join(NAMED)}"
        raise ArgumentError("recipe", f"a {type(recipe).__name__}", remedy)
    named = NAMED[one_of("recipe", recipe, NAMED)]
    if named.written:
        named = replace(named, written=min(max(WRITTEN[0], tokens), WRITTEN[1]))
    if not isinstance(sparsity, str) or not named.differentiates:
        return named
    moving = named.divergence or Divergence(passes=1)
    return replace(named, budget="rows", asymmetric=None, divergence=moving)
