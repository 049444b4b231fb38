"""A language model of two small blocks with random texts, as the experiments on SmolLM2 keep theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from experiments.language_model import CALIBRATION_LENGTH, TEST_LENGTH, TEST_SEQUENCES

WORDS, WIDTH = 64, 16


def small_cache(tmp_path: Path, *, heads: int, keys: int) -> Path:
    """Return a folder as `experiments.language_model.prepare` leaves it; skip without transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=WORDS, num_attention_heads=heads, num_key_value_heads=keys, **sizes
    )
    folder = tmp_path / "cache"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    lengths = {"valid": 2 * CALIBRATION_LENGTH, "test": TEST_SEQUENCES * TEST_LENGTH}
    tokens = {name: torch.randint(0, WORDS, (length,)) for name, length in lengths.items()}
    save_file(tokens, folder / "tokens.safetensors")
    return folder
