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
    some of the tokens, `HELD` of them, is kept apart as well, for the shrinkage. With `paired` inputs come
    with those that are wanted in their place, and sums of ``(wanted - x) x^T`` are kept.
    """

    def __init__(
        self, inputs: int, device: torch.device, *, hold: bool = False, paired: bool = False
    ) -> None:
        self.tokens = 0
        """Number of inputs so far."""
        self.held = 0
        """How many of them are set aside."""
        self._held_sum = torch.zeros(inputs, inputs, dtype=torch.float64, device=device) if hold else None
        self._sum = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._fourth = 0.0
        self.pairs = Pairs(inputs, device) if paired else None
        """What the inputs miss, if that is asked for."""

    def add(
        self,
        inputs: Tensor,
        layer: str,
        batch: int,
        *,
        wanted: Tensor | None = None,
        aside: Tensor | None = None,
    ) -> None:
        """Add inputs (tokens, n), of any floating dtype.

        `wanted` (tokens, n) belong in their place; nothing is missing without. Those of tokens that are
        `aside` (tokens,) bool count in `pairs` alone. Raises `NonFiniteError`, which names the layer and the
        batch, if an input is NaN or infinite.
        """
        if self.pairs is not None and wanted is not None:
            self.pairs.add(inputs, wanted, aside)
        if aside is not None:
            inputs = inputs[~aside]
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
        if self._held_sum is not None:
            last = x[len(x) - int(HELD * len(x)) :]
            self._held_sum += last.T @ last
            self.held += len(last)

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


class Pairs:
    """Sums over inputs x (n,) and what they miss, y - x, of tokens that count and of those set aside."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.aside = 0
        """Number of inputs that are set aside."""
        shape = (inputs, inputs)
        self.missing = torch.zeros(shape, dtype=torch.float64, device=device)
        """Sum of ``(y - x) x^T`` over tokens that count, (n, n)."""
        self.aside_missing = torch.zeros_like(self.missing)
        """The same over those set aside."""
        self.aside_gram = torch.zeros_like(self.missing)
        """Sum of ``x x^T`` over those set aside."""

    def add(self, inputs: Tensor, wanted: Tensor, aside: Tensor | None) -> None:
        """Add inputs x (tokens, n), those wanted in their place, and which are set aside, (tokens,) bool."""
        double = inputs.dtype == torch.float64
        x, y = (inputs, wanted.double()) if double else (inputs.float(), wanted.float())
        for part in (slice(None),) if aside is None else (~aside, aside):
            fed, missing = x[part], y[part] - x[part]
            cross = missing.T @ fed
            if not bool(torch.isfinite(cross).all()):
                fed, missing = fed.double(), y[part].double() - fed.double()
                cross = missing.T @ fed
            if part is aside:
                self.aside += len(fed)
                self.aside_missing += cross
                self.aside_gram += fed.T @ fed
            else:
                self.missing += cross


def shrunk(gram: Tensor, share: float) -> Tensor:
    """Return ``(1 - s) G + s mean(diag G) I`` of a Gram matrix, as a new one."""
    level = gram.diagonal().mean()
    gram = (1.0 - share) * gram
    gram.diagonal().add_(share * level)
    return gram
