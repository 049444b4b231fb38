"""What the layers before have lost is made up for, as far as what a layer is fed still tells it.

A layer of the pruned network is fed x in the place of y, which the dense network feeds it. Its outputs would
be compared with ``W x``; what is wanted are ``W y``. The weights that come nearest to these,

    minimise  E |W y - V x|^2 + ridge |V - W|^2   over V,
    V = W + W E[(y - x) x^T] (E[x x^T] + ridge I)^-1,

are the ones that its program prunes. What ``y - x`` owes to chance in the calibration tokens is not to be
made up for: the ridge, and the share of the way from W to V, are those that come nearest to ``W y`` on
samples that are set aside. These count in no layer: where they did in the layers before, x would be nearer
to y on them than on any text that is new.

Layers are pruned by levels, each fed by those before it in the same block: otherwise two layers that feed one
another would both make up for the same loss.

Source: Li et al., "GPTAQ: efficient finetuning-free quantization for asymmetric calibration" (2025), for
quantisation, with a fixed share and without the tokens set aside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cbs_opt.layers.gram import GramSum
from cbs_opt.select.layer_program.exchanges import spread

RIDGES = (0.1, 0.3, 1.0, 3.0)
"""In units of the mean diagonal of the Gram matrix."""
ASIDE = 0.125
"""Share of the samples that is set aside, the last ones."""
ROWS = 128
"""Rows of a layer by which ridge and share are chosen."""


class Asymmetry:
    """What inputs of one sum miss, with what depends on it alone: for all layers that are fed the same."""

    def __init__(self, sums: GramSum) -> None:
        pairs = sums.pairs
        assert pairs is not None
        self._missing, self._gram = pairs.missing / max(1, sums.tokens), sums.mean(0.0)[0]
        self._aside = pairs.aside_missing / max(1, pairs.aside)
        self._aside_gram = pairs.aside_gram / max(1, pairs.aside)
        self._unit = float(self._gram.diagonal().mean())
        self._factors: dict[float, Tensor] = {}

    def target(self, weights: Tensor) -> tuple[Tensor, float]:
        """Return the weights to prune in the place of a layer's own (r, n), and how far they are from these.

        The distance is relative, by the Frobenius norm. Four Cholesky factors for all layers that are fed the
        same, O(n^3) each; two products O(r n^2), and three for each ridge with `ROWS` rows.
        """
        own = weights.double()
        some = own[spread(len(own), ROWS, own.device)]
        most, share, ridge = 0.0, 0.0, RIDGES[0]
        if not self._unit > 0.0 or not bool(self._missing.any()):
            return weights, 0.0
        missing, aside = some @ self._missing, some @ self._aside
        for entry in RIDGES:
            change = self._solved(missing, entry)
            along = float((change * aside).sum())
            across = float(((change @ self._aside_gram) * change).sum())
            part = min(1.0, max(0.0, along / across)) if across > 0.0 else 0.0
            gain = part * (2.0 * along - part * across)
            if gain > most:
                most, share, ridge = gain, part, entry
        if share == 0.0:
            return weights, 0.0
        change = share * self._solved(own @ self._missing, ridge)
        size = float(torch.linalg.vector_norm(own))
        distance = float(torch.linalg.vector_norm(change)) / size if size else 0.0
        return (own + change).to(weights.dtype), distance

    def _solved(self, right: Tensor, ridge: float) -> Tensor:
        """Return ``right (G + ridge I)^-1``."""
        if ridge not in self._factors:
            damped = self._gram.clone()
            damped.diagonal().add_(ridge * self._unit)
            self._factors[ridge] = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(right.mT, self._factors[ridge]).mT
