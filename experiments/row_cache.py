"""Gradient rows kept from one cell of a table to the next that asks for the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import cbs_opt
from cbs_opt.curvature.kinds import FISHERS, Fisher
from cbs_opt.curvature.layer_inputs import with_layer_inputs
from experiments.networks import Network

SETTINGS = ("curvature", "samples", "samples_per_row", "seed")
"""Arguments of `cbs_opt.prune` that decide the rows."""


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
        self._rows: tuple[dict[str, Any], cbs_opt.Rows] | None = None
        self._term: cbs_opt.Rows | None = None

    def get(self, network: Network, arguments: Mapping[str, Any]) -> cbs_opt.Rows:
        """What `prune` would compute for `arguments`: the same as the last time, or new.

        Two sets of rows are never in memory at once.
        """
        wanted = {name: arguments[name] for name in SETTINGS}
        wanted["gradient"] = bool(arguments.get("gradient_term"))
        partition = cbs_opt.Partition.from_model(network.model, target=network.target, blocks="global")
        if self._rows is None or self._rows[0] != wanted:
            self._rows = self._term = None
            rows = cbs_opt.gradient_rows(
                network.model,
                self.data,
                torch.nn.functional.cross_entropy,
                partition,
                curvature=_fisher(arguments),
                seed=arguments["seed"],
                gradient=wanted["gradient"],
                progress=self.progress,
            )
            self._rows = (wanted, rows)
        if not arguments.get("layer_inputs"):
            return self._rows[1]
        if self._term is None:
            seed = arguments["seed"]
            # Of weight 1, which `prune` scales.
            self._term = with_layer_inputs(self._rows[1], network.model, self.data, partition, seed=seed)
        return self._term


def _fisher(arguments: Mapping[str, Any]) -> Fisher:
    """The record of the rows that `arguments` of `prune` ask for."""
    averaged = {} if arguments["samples_per_row"] == 1 else {"per_row": arguments["samples_per_row"]}
    kind: Any = FISHERS[arguments["curvature"]]
    record: Fisher = kind(samples=arguments["samples"], **averaged)
    return record
