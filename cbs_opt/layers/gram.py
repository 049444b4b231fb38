"""Gram matrices of what layers are fed, and of what they miss of it, summed up batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from formulations.errors import NonFiniteError

FEW = 1
"""Tokens an input, below which some are set aside to choose the shrinkage by; with as many none is best."""
HELD = 0.25
"""Share of the tokens that are set aside, the last ones of every batch."""


class GramSum:
    """The sum of ``x x^T`` over inputs x (n,) of one layer, and what its shrinkage is told from.

    Products are in float32, or in float64 where those overflow; sums are in float64. With `hold` the sum over
    some of the tokens, `HELD` of them, is kept apart as well, for the shrinkage. With `paired` every input
    comes with the one that is `wanted` in its place, and the sum of ``(wanted - x) x^T`` is kept, of the same
    tokens apart as well.
    """

    def __init__(
        self, inputs: int, device: torch.device, *, hold: bool = False, paired: bool = False
    ) -> None:
        self.tokens = 0
        """Number of inputs so far."""
        self.held = 0
        """How many of them are set aside."""
        self.hold = hold
        self.paired = paired
        shape = (inputs, inputs)
        self._sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self._held_sum = torch.zeros_like(self._sum) if hold or paired else None
        self._cross = torch.zeros_like(self._sum) if paired else None
        self._held_cross = torch.zeros_like(self._sum) if paired else None
        self._fourth = 0.0

    def add(self, inputs: Tensor, layer: str, batch: int, wanted: Tensor | None = None) -> None:
        """Add inputs (tokens, n), of any floating dtype, and those that are wanted in their place.

        Without `wanted`, of a sum that is paired, nothing is missing of these inputs. Raises
        `NonFiniteError`, which names the layer and the batch, if an input is NaN or infinite.
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
        held = slice(len(x) - int(HELD * len(x)), None)
        if self._held_sum is not None:
            last = x[held]
            self._held_sum += last.T @ last
            self.held += len(last)
        if wanted is not None and self._cross is not None and self._held_cross is not None:
            missing = wanted.to(x.dtype) - x
            cross = missing.T @ x
            if not bool(torch.isfinite(cross).all()):
                x = x.double()
                missing = wanted.double() - x
                cross = missing.T @ x
            self._cross += cross
            self._held_cross += missing[held].T @ x[held]

    def mean(self, shrinkage: float | None = None) -> tuple[Tensor, float]:
        """Return the Gram matrix ``E[x x^T]``, (n, n) float64, and the share of it that was shrunk.

        With share s it is ``(1 - s) G + s mean(diag G) I``. Without one s is zero if there are as many tokens
        as inputs, else that of `ledoit_wolf`.
        """
        gram = self._sum / max(1, self.tokens)
        if shrinkage is None:
            shrinkage = self.ledoit_wolf() if 0 < self.tokens < len(gram) else 0.0
        return shrunk(gram, shrinkage), shrinkage

    def ledoit_wolf(self) -> float:
        """Return the share of shrinkage with the least expected squared error of the matrix.

        Source: Ledoit, Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004),
        for moments about zero.
        """
        gram = self._sum / max(1, self.tokens)
        level = gram.diagonal().mean()
        squares = float(gram.square().sum())
        noise = max(0.0, self._fourth / self.tokens - squares) / self.tokens
        distance = squares - len(gram) * float(level) ** 2
        return min(1.0, noise / distance) if distance > 0.0 else 1.0

    def parted(self) -> tuple[Tensor, Tensor]:
        """Return the Gram matrices of the tokens that are not set aside, and of those that are."""
        assert self._held_sum is not None
        fitted = (self._sum - self._held_sum) / max(1, self.tokens - self.held)
        return fitted, self._held_sum / max(1, self.held)

    def missing(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return means of ``(wanted - x) x^T``: over all tokens, those not set aside, and those that are."""
        assert self._cross is not None
        assert self._held_cross is not None
        fitted = (self._cross - self._held_cross) / max(1, self.tokens - self.held)
        return self._cross / max(1, self.tokens), fitted, self._held_cross / max(1, self.held)


def shrunk(gram: Tensor, share: float) -> Tensor:
    """Return ``(1 - s) G + s mean(diag G) I`` of a Gram matrix, as a new one."""
    level = gram.diagonal().mean()
    gram = (1.0 - share) * gram
    gram.diagonal().add_(share * level)
    return gram
