"""Multi-head attention whose heads need not add up to the width of what it reads."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """`nn.MultiheadAttention` without some of its heads: ``num_heads * head_dim`` may be any width.

    Parameters
    ----------
    whole : nn.MultiheadAttention
        Its weights, cut to the heads that are left, are used as they are; without ``bias_k`` and
        ``add_zero_attn``.
    head_dim : int
        Width of a head, that of the network before it was cut.
    """

    in_proj_bias = None
    """What `nn.TransformerEncoderLayer` looks at to leave its fast path, which knows whole heads alone."""
    _qkv_same_embed_dim = False

    def __init__(self, whole: nn.MultiheadAttention, head_dim: int) -> None:
        super().__init__()
        if whole.in_proj_weight is not None:
            weights = [part.detach() for part in whole.in_proj_weight.chunk(3)]
        else:
            parts = (whole.q_proj_weight, whole.k_proj_weight, whole.v_proj_weight)
            weights = [part.detach() for part in parts]
        packed = whole.in_proj_bias
        biases = [None] * 3 if packed is None else [part.detach() for part in packed.chunk(3)]
        self.q_proj, self.k_proj, self.v_proj = map(_linear, weights, biases)
        self.out_proj = whole.out_proj
        self.head_dim = head_dim
        self.num_heads = weights[0].shape[0] // head_dim
        self.dropout = whole.dropout
        self.batch_first = whole.batch_first
        self.train(whole.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, where `need_weights`, the attention; as `nn.MultiheadAttention` does."""
        batched = query.dim() == 3
        if batched and not self.batch_first:
            query, key, value = (entry.transpose(0, 1) for entry in (query, key, value))
        if not batched:
            query, key, value = (entry.unsqueeze(0) for entry in (query, key, value))
        q = self._heads(self.q_proj(query))
        k, v = self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(attention, dropout) @ v
            weights = attention.mean(1) if average_attn_weights else attention
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """Return (B, T, H D) as (B, H, T, D)."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, (B or 1, H or 1, T, S); None where nothing is."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q)
            masks.append(mask.view(q.shape[0], -1, *mask.shape[1:]) if mask.dim() == 3 else mask[None, None])
        if padding is not None:
            masks.append(_additive(padding, q).reshape(q.shape[0], 1, 1, -1))
        return sum(masks[1:], masks[0]) if masks else None


def opened(model: nn.Module) -> nn.Module:
    """Return a copy of a network in which every `nn.MultiheadAttention` runs its layers as modules.

    Hooks then see what ``out_proj``, which keeps its name, is fed. Attention with ``bias_k`` or
    ``add_zero_attn`` stays as it is.
    """
    copy = deepcopy(model)
    for path, module in list(copy.named_modules()):
        if path and isinstance(module, nn.MultiheadAttention) and can_open(module):
            copy.set_submodule(path, HeadAttention(module, module.head_dim))
    return copy


def can_open(module: nn.MultiheadAttention) -> bool:
    """Return whether `HeadAttention` computes what a module does."""
    return module.bias_k is None and not module.add_zero_attn


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask that is True where nothing may be seen as one to add."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
