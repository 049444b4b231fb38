"""What the layers before have lost is made up for, as far as what a layer is fed still tells it.

A layer of the pruned network is fed x in the place of y, which the dense network feeds it. Its outputs would
be compared with ``W x``; what is wanted are ``W y``. The weights that come nearest to these,

    minimise  E |W y - V x|^2 + ridge |V - W|^2   over V,
    V = W + W E[(y - x) x^T] (E[x x^T] + ridge I)^-1,

are the ones that its program prunes. What ``y - x`` owes to chance in the calibration tokens is not to be
made up for: the ridge, and the share of the way from W to V, are those that come nearest to ``W y`` on
tokens that are set aside, and count again afterwards. (SmolLM2 at 2:4 by SparseGPT, 16 sequences: perplexity
114.9 without, 89.8 so, 95.7 with two sequences that count in no layer. A pass on the divergence then ends
higher than without: it learns the same from the same tokens.)

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
ROWS = 128
"""Rows of a layer by which ridge and share are chosen."""


class Asymmetry:
    """What inputs of one sum miss, with what depends on it alone: for all layers that are fed the same."""

    def __init__(self, sums: GramSum) -> None:
        self._all, self._fitted, self._held = sums.missing()
        self._gram = sums.mean(0.0)[0]
        self._fitted_gram, self._held_gram = sums.parted()
        self._unit = float(self._gram.diagonal().mean())
        self._factors: dict[tuple[bool, float], Tensor] = {}

    def target(self, weights: Tensor) -> tuple[Tensor, float]:
        """Return the weights to prune in the place of a layer's own (r, n), and how far they are from these.

        The distance is relative, by the Frobenius norm. At most eight Cholesky factors for all layers that
        are fed the same, O(n^3) each; two products O(r n^2), and as many for each ridge with `ROWS` rows.
        """
        own = weights.double()
        some = own[spread(len(own), ROWS, own.device)]
        most, share, ridge = 0.0, 0.0, RIDGES[0]
        if not self._unit > 0.0 or not bool(self._all.any()):
            return weights, 0.0
        fitted, held = some @ self._fitted, some @ self._held
        for entry in RIDGES:
            change = self._solved(fitted, self._fitted_gram, entry, held_out=True)
            along = float((change * held).sum())
            across = float(((change @ self._held_gram) * change).sum())
            part = min(1.0, max(0.0, along / across)) if across > 0.0 else 0.0
            gain = part * (2.0 * along - part * across)
            if gain > most:
                most, share, ridge = gain, part, entry
        if share == 0.0:
            return weights, 0.0
        change = share * self._solved(own @ self._all, self._gram, ridge, held_out=False)
        size = float(torch.linalg.vector_norm(own))
        distance = float(torch.linalg.vector_norm(change)) / size if size else 0.0
        # Half precision would round the change away.
        return (own + change).to(torch.promote_types(weights.dtype, torch.float32)), distance

    def _solved(self, right: Tensor, gram: Tensor, ridge: float, *, held_out: bool) -> Tensor:
        """Return ``right (G + ridge I)^-1``."""
        key = (held_out, ridge)
        if key not in self._factors:
            damped = gram.clone()
            damped.diagonal().add_(ridge * self._unit)
            self._factors[key] = torch.linalg.cholesky(damped)
        return torch.cholesky_solve(right.mT, self._factors[key]).mT
