"""Gram matrices of what layers are fed, summed up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from formulations.errors import NonFiniteError


class GramSum:
    """The sum of ``x x^T`` over inputs x (n,) of one layer, and what its shrinkage is told from.

    Products are in float32, or in float64 where those overflow; sums are in float64.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.tokens = 0
        """Number of inputs so far."""
        self._sum = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._fourth = 0.0

    def add(self, inputs: Tensor, layer: str, batch: int) -> None:
        """Add inputs (tokens, n), of any floating dtype.

        Raises `NonFiniteError`, which names the layer and the batch, if one is NaN or infinite.
        """
        x = inputs if inputs.dtype == torch.float64 else inputs.float()
        product = x.T @ x
        # The diagonal bounds every entry, and NaN comes through to it.
        if not bool(torch.isfinite(product.diagonal()).all()):
            bad = int((~torch.isfinite(x)).any(1).sum())
            if bad:
                found = (
                    f"the inputs of {layer} are NaN or infinite at {bad} of {len(x)} tokens of batch {batch}"
                )
                remedy = "check the tokens and the weights, or run the network in float32 or bfloat16"
                raise NonFiniteError("model, data", found, remedy)
            x = x.double()
            product = x.T @ x
        self._sum += product
        self._fourth += float(x.double().square().sum(1).square().sum())
        self.tokens += len(x)

    def mean(self, shrinkage: float | None = None) -> tuple[Tensor, float]:
        """Return the Gram matrix ``E[x x^T]``, (n, n) float64, and the share of it that was shrunk.

        With share s it is ``(1 - s) G + s mean(diag G) I``. Without one s is zero if there are as many tokens
        as inputs, else it has the least expected squared error: Ledoit, Wolf, "A well-conditioned estimator
        for large-dimensional covariance matrices" (2004), for moments about zero.
        """
        gram = self._sum / max(1, self.tokens)
        level = gram.diagonal().mean()
        if shrinkage is None:
            shrinkage = 0.0
            if 0 < self.tokens < len(gram):
                squares = float(gram.square().sum())
                noise = max(0.0, self._fourth / self.tokens - squares) / self.tokens
                distance = squares - len(gram) * float(level) ** 2
                shrinkage = min(1.0, noise / distance) if distance > 0.0 else 1.0
        gram = (1.0 - shrinkage) * gram
        gram.diagonal().add_(shrinkage * level)
        return gram, shrinkage
