"""Small networks of blocks, with and without transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
WORDS = 32
LENGTH = 6


class Mixer(nn.Module):
    """A block that takes hidden states and a scale: two layers fed the same, one fed by them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.left = nn.Linear(width, 2 * width)
        self.right = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width)

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
        mixed = torch.relu(self.left(hidden_states)) * self.right(hidden_states)
        return (hidden_states + scale * self.out(mixed),)


class Network(nn.Module):
    """An embedding, blocks, and a head; tokens (B, T) to scores (B, T, words)."""

    def __init__(self, blocks: int = 3, block: type[nn.Module] = Mixer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, WORDS)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def hidden(self, tokens: Tensor) -> Tensor:
        x: Any = self.embedding(tokens)
        for layer in self.layers:
            x = layer(hidden_states=x, scale=0.5)[0]
        return x  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.hidden(tokens))
        return scores


class Masked(Network):
    """The same network, called with a mask that it does not look at."""

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens)


def padded_tokens() -> tuple[Tensor, Tensor]:
    """Tokens and the mask of which only the first four of each sample count."""
    x = tokens()
    mask = torch.ones_like(x)
    mask[:, 4:] = 0
    return x, mask


def tokens(samples: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(0, WORDS, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))
