"""Recurrent networks and attention without other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from experiments.any_network.case import CLASSES, SAMPLES, Case, Trial, classes

LENGTH = 7
WORDS = 20


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last state; `packed` takes lengths beside the sequences."""

    def __init__(self, kind: type[nn.RNNBase], *, packed: bool = False) -> None:
        super().__init__()
        self.recurrent = kind(4, 8, batch_first=True)
        self.out = nn.Linear(8, CLASSES)
        self.packed = packed

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, C)."""
        steps: Any = x
        if lengths is not None:
            steps = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.recurrent(steps)[1]
        logits: Tensor = self.out((state[0] if isinstance(state, tuple) else state)[-1])
        return logits


class Attention(nn.Module):
    """`nn.MultiheadAttention` over the sequence, then the mean."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))
        return logits


class Encoder(nn.Module):
    """`nn.TransformerEncoder` with a padding mask: word 0 is no word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (B, C)."""
        hidden = self.encoder(self.words(words), src_key_padding_mask=words == 0)
        logits: Tensor = self.out(hidden[:, 0])
        return logits


class BagOfWords(nn.Module):
    """`nn.EmbeddingBag` and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 8)
        self.out = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.out(self.words(words))
        return logits


def _recurrent(kind: type[nn.RNNBase]) -> Trial:
    return Trial(model=Recurrent(kind).eval(), data=(torch.randn(SAMPLES, LENGTH, 4), classes()))


def _packed() -> Trial:
    lengths = torch.randint(2, LENGTH + 1, (SAMPLES,))
    data = [((torch.randn(SAMPLES, LENGTH, 4), lengths), classes())]
    return Trial(model=Recurrent(nn.GRU, packed=True).eval(), data=data)


def _attention(**options: Any) -> Trial:
    return Trial(model=Attention(**options).eval(), data=(torch.randn(SAMPLES, LENGTH, 8), classes()))


def _padded() -> tuple[Tensor, Tensor]:
    words = torch.randint(1, WORDS, (SAMPLES, LENGTH))
    words[torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (SAMPLES, 1))] = 0
    return words, classes()


CASES = (
    Case(network="LSTM", batch="sequences, classes", build=lambda: _recurrent(nn.LSTM)),
    Case(network="GRU", batch="sequences, classes", build=lambda: _recurrent(nn.GRU)),
    Case(network="RNN", batch="sequences, classes", build=lambda: _recurrent(nn.RNN)),
    Case(network="GRU", batch="packed sequences with lengths", build=_packed),
    Case(network="MultiheadAttention", batch="sequences, classes", build=_attention),
    Case(
        network="MultiheadAttention, keys of another width",
        batch="sequences, classes",
        build=lambda: _attention(kdim=8, vdim=8, bias=False),
    ),
    Case(
        network="TransformerEncoder",
        batch="padding mask, classes",
        build=lambda: Trial(model=Encoder().eval(), data=_padded()),
    ),
    Case(
        network="EmbeddingBag",
        batch="words, classes",
        build=lambda: Trial(
            model=BagOfWords().eval(), data=(torch.randint(0, WORDS, (SAMPLES, LENGTH)), classes())
        ),
    ),
)
