"""Text that the dense network writes itself, which layers are fed beside the calibration data.

What a layer makes up for is learnt from tokens, and a pass on the divergence over the same tokens learns the
same from them once more. A language model has more: it goes on from pieces of the calibration data, with
words drawn from its own predictions. The layers see both, the pass only what was given, so that each tells
the network something else; no labels are needed, and nothing more is differentiated.

Source: Liu et al., "LLM-QAT: data-free quantization aware training for large language models" (2023), where
the text of the network takes the place of the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cbs_opt.errors import ForwardError
from cbs_opt.layers.calibration import token_positions
from cbs_opt.network.data import Batch, device_of, structure

PROMPT, PROMPT_SHARE = 32, 0.25
"""Tokens that a piece of the data has from which the network goes on, and their share of a sample at most."""
AT_ONCE = 16
"""Sequences that are written at a time."""
NO_TEXT = "use written=0, and pass more data in the place of the text"
"""What to do where there can be none."""


def why_not(network: nn.Module, batches: Sequence[Batch]) -> str:
    """Return why a network cannot write text, empty if it can.

    It can as language models of transformers do, by their `generate`, from token ids alone.
    """
    can, writes = (getattr(network, name, None) for name in ("can_generate", "generate"))
    if not callable(can) or not callable(writes) or not can():
        return "the network cannot write text as language models of transformers do, by generate()"
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        return "the network reads one text and writes another"
    if not batches or _ids(batches[0]) is None:
        return "the data are no token ids (N, T)"
    return "" if _samples(batches) else "there is no token that is no padding"


def write(
    network: nn.Module,
    batches: Sequence[Batch],
    tokens: int,
    *,
    seed: int,
    advance: Callable[[int], object],
) -> Tensor:
    """Return about so many tokens of text that the network writes, (sequences, T) int64 as the first batch.

    Each sequence goes on from a piece of one of the samples, in order and at random places that are no
    padding, with tokens drawn from the predictions. One token of all `AT_ONCE` sequences a step, by the cache
    of keys and values of the network. Raises `ForwardError` for what that raises, or where it returns
    something else.
    """
    first = _ids(batches[0])
    assert first is not None
    length = first.shape[1]
    generator = torch.Generator().manual_seed(seed)
    prompts = _prompts(batches, max(1, round(tokens / length)), length, generator)
    found = []
    with torch.random.fork_rng(devices=_accelerators(network)):
        torch.manual_seed(seed)
        for part in torch.split(prompts.to(device_of(network)), AT_ONCE):
            found.append(_continued(network, part, length))
            advance(part.shape[0] * length)
    return torch.cat(found).cpu()


def batch_of(text: Tensor, like: Batch, device: torch.device) -> Batch:
    """Return written text in the form of the data: a tensor, or a mapping with a mask."""
    ids = text.to(device)
    if not isinstance(like.inputs, dict):
        return Batch(inputs=ids)
    mask = like.inputs.get("attention_mask")
    masked = {"attention_mask": torch.ones_like(ids, dtype=mask.dtype)} if isinstance(mask, Tensor) else {}
    return Batch(inputs={"input_ids": ids, **masked})


def _ids(batch: Batch) -> Tensor | None:
    ids = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else batch.inputs
    usable = isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape[1] > 1 and not ids.is_floating_point()
    return ids if usable else None


def _samples(batches: Sequence[Batch]) -> list[Tensor]:
    """Return the token ids of every sample without padding, none that are empty."""
    found = []
    for batch in batches:
        ids, counted = _ids(batch), token_positions(batch)
        if ids is not None:
            found += (
                list(ids) if counted is None else [row[mask] for row, mask in zip(ids, counted, strict=True)]
            )
    return [row.cpu().long() for row in found if len(row)]


def _prompts(batches: Sequence[Batch], count: int, length: int, generator: torch.Generator) -> Tensor:
    """Return pieces of samples that are long enough, (count, tokens) int64."""
    samples = _samples(batches)
    size = max(1, min(PROMPT, math.floor(PROMPT_SHARE * length), max(map(len, samples))))
    samples = [row for row in samples if len(row) >= size]
    pieces = []
    for number in range(count):
        row = samples[number % len(samples)]
        place = int(torch.randint(len(row) - size + 1, (), generator=generator))
        pieces.append(row[place : place + size])
    return torch.stack(pieces)


def _continued(network: Any, prompts: Tensor, length: int) -> Tensor:
    """Return sequences of `length` tokens that begin with `prompts`, the rest drawn from the predictions."""
    new = length - prompts.shape[1]
    try:
        written = network.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=True,
            num_beams=1,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            use_cache=True,
            pad_token_id=0,
            return_dict_in_generate=False,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what networks do is the caller's
        found = f"generate() raised {type(error).__name__}: {error}"
        raise ForwardError("model", found, NO_TEXT) from error
    if not isinstance(written, Tensor) or written.shape != (len(prompts), length):
        raise ForwardError("model", f"generate() returned {structure(written)}", NO_TEXT)
    return written.detach().long()


def _accelerators(network: nn.Module) -> list[torch.device]:
    device = device_of(network)
    return [device] if device.type == "cuda" else []
