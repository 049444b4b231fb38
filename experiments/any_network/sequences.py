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
    """A recurrent layer and a linear one on its last state; padded sequences come with their lengths."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.recurrent = kind(4, 6, batch_first=True, **options)
        self.out = nn.Linear(self.recurrent.proj_size or 6, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return logits (B, C)."""
        steps: Any = x
        if lengths is not None:
            steps = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.recurrent(steps)[1]
        logits: Tensor = self.out((state[0] if isinstance(state, tuple) else state)[-1])
        return logits


class Loop(nn.Module):
    """A cell called step after step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        state = x.new_zeros(len(x), 8)
        for step in x.unbind(dim=1):
            state = self.cell(step, state)
        logits: Tensor = self.out(state)
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


class Translator(nn.Module):
    """`nn.Transformer` from one sequence to another, word for word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.transformer = nn.Transformer(4, 2, 1, 1, dim_feedforward=6, batch_first=True)
        self.out = nn.Linear(4, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return logits (B, C, T)."""
        causal = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hidden = self.transformer(self.words(source), self.words(target), tgt_mask=causal)
        logits: Tensor = self.out(hidden).transpose(1, 2)
        return logits


class BagOfWords(nn.Module):
    """`nn.EmbeddingBag` and two linear layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(WORDS, 8, **options)
        self.out = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, CLASSES))

    def forward(self, words: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.out(self.words(words))
        return logits


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Trial:
    return Trial(model=Recurrent(kind, **options).eval(), data=(torch.randn(SAMPLES, LENGTH, 4), classes()))


def _packed() -> Trial:
    lengths = torch.randint(2, LENGTH + 1, (SAMPLES,))
    data = [((torch.randn(SAMPLES, LENGTH, 4), lengths), classes())]
    return Trial(model=Recurrent(nn.GRU).eval(), data=data)


def _attention(**options: Any) -> Trial:
    return Trial(model=Attention(**options).eval(), data=(torch.randn(SAMPLES, LENGTH, 8), classes()))


def _padded() -> tuple[Tensor, Tensor]:
    words = torch.randint(1, WORDS, (SAMPLES, LENGTH))
    words[torch.arange(LENGTH) >= torch.randint(2, LENGTH + 1, (SAMPLES, 1))] = 0
    return words, classes()


def _bag(**options: Any) -> Trial:
    words = torch.randint(0, WORDS, (SAMPLES, LENGTH))
    return Trial(model=BagOfWords(**options).eval(), data=(words, classes()))


def _translated() -> Trial:
    source, target = torch.randint(0, WORDS, (2, SAMPLES, LENGTH)).unbind()
    return Trial(model=Translator().eval(), data=[((source, target), target.roll(-1, dims=1))])


CASES = (
    Case(network="LSTM", batch="sequences, classes", build=lambda: _recurrent(nn.LSTM)),
    Case(network="GRU", batch="sequences, classes", build=lambda: _recurrent(nn.GRU)),
    Case(network="RNN", batch="sequences, classes", build=lambda: _recurrent(nn.RNN)),
    Case(
        network="LSTM, two layers both ways, projected",
        batch="sequences, classes",
        build=lambda: _recurrent(nn.LSTM, num_layers=2, bidirectional=True, proj_size=3),
    ),
    Case(
        network="GRUCell in a loop",
        batch="sequences, classes",
        build=lambda: Trial(model=Loop().eval(), data=(torch.randn(SAMPLES, LENGTH, 4), classes())),
    ),
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
    Case(network="Transformer", batch="two sequences, words", build=_translated),
    Case(network="EmbeddingBag", batch="words, classes", build=_bag),
    Case(
        network="EmbeddingBag with sparse gradients", batch="words, classes", build=lambda: _bag(sparse=True)
    ),
)
