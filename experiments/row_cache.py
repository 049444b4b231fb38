"""Gradient rows kept from one cell of a table to the next that asks for the same."""

from __future__ import annotations

import torch
from torch import Tensor

import cbs_opt
from cbs_opt.curvature.kinds import Fisher
from cbs_opt.curvature.layer_inputs import with_layer_inputs
from cbs_opt.curvature.rows import Rows
from cbs_opt.recipe.records import Recipe
from experiments.networks import Network


class RowCache:
    """The last rows, and the last layer-input term, of one network on one set of training data.

    Parameters
    ----------
    data : pair of Tensors (X, y)
    progress : bool
        Show a bar.
    """

    def __init__(self, data: tuple[Tensor, Tensor], *, progress: bool) -> None:
        self.data = data
        self.progress = progress
        self._rows: tuple[tuple[Fisher, int, bool], Rows] | None = None
        self._term: Rows | None = None

    def get(self, network: Network, recipe: Recipe, seed: int) -> Rows:
        """Return what `prune` would compute for a recipe: the same as the last time, or new.

        Two sets of rows are never in memory at once.
        """
        assert isinstance(recipe.curvature, Fisher)
        wanted = recipe.curvature, seed, recipe.gradient
        partition = cbs_opt.Partition.from_model(network.model, target=network.target, blocks="global")
        if self._rows is None or self._rows[0] != wanted:
            self._rows = self._term = None
            rows = cbs_opt.gradient_rows(
                network.model,
                self.data,
                torch.nn.functional.cross_entropy,
                partition,
                curvature=recipe.curvature,
                seed=seed,
                gradient=recipe.gradient,
                progress=self.progress,
            )
            self._rows = (wanted, rows)
        if not recipe.layer_inputs:
            return self._rows[1]
        if self._term is None:
            # Of weight 1, which `prune` scales.
            self._term = with_layer_inputs(self._rows[1], network.model, self.data, partition, seed=seed)
        return self._term
