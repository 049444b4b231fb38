"""Small random networks of `transformers`, in the batches that its tokenizers and collators make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments.any_network.case import CLASSES, SAMPLES, Case, Trial, classes

LENGTH = 6
WORDS = 20
SCALE = 0.3
"""Standard deviation of the weights: with .02, the default, such small networks return constants."""
NEEDS = ("transformers",)
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "initializer_range": SCALE,
}
"""Sizes of networks of Hugging Face, where they have these names."""


class Pooled(nn.Module):
    """A text encoder and the mean of its hidden states over the words: a sentence embedding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return embeddings (B, width)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden)
        pooled: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return pooled


def _bert(**options: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=WORDS,
        **SIZES,
        max_position_embeddings=16,
        **options,
    )


def _words() -> dict[str, Tensor]:
    mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (SAMPLES, 1))).long()
    return {"input_ids": torch.randint(1, WORDS, (SAMPLES, LENGTH)) * mask, "attention_mask": mask}


def _batches(*, size: int = 8, **columns: Tensor) -> list[dict[str, Tensor]]:
    """Return the columns cut into batches, as a loader's collator makes them."""
    return [{name: x[i : i + size] for name, x in columns.items()} for i in range(0, SAMPLES, size)]


def bert_classifier() -> Trial:
    """Return a classifier of one sentence, with attention mask and labels."""
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert(num_labels=CLASSES)).eval()
    return Trial(model=model, data=_batches(**_words(), labels=classes()))


def _bert_tuples() -> Trial:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert(num_labels=CLASSES, return_dict=False)).eval()

    def loss_fn(output: tuple[Tensor], labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output[0], labels)

    words = _words()
    return Trial(model=model, data=[((*words.values(),), classes())], options={"loss_fn": loss_fn})


def _bert_pairs() -> Trial:
    from transformers import BatchEncoding, BertForSequenceClassification

    model = BertForSequenceClassification(_bert(num_labels=CLASSES)).eval()
    second = (torch.arange(LENGTH) >= 3).long().expand(SAMPLES, LENGTH)
    batches = _batches(**_words(), token_type_ids=second, labels=classes())
    return Trial(model=model, data=[BatchEncoding(batch) for batch in batches])


def _bert_regression() -> Trial:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert(num_labels=1)).eval()
    return Trial(model=model, data=_batches(**_words(), labels=torch.randn(SAMPLES)))


def _bert_labels_apart() -> Trial:
    from transformers import BertForSequenceClassification

    model = BertForSequenceClassification(_bert(num_labels=CLASSES)).eval()
    data = [(batch, batch.pop("labels")) for batch in _batches(**_words(), labels=classes())]

    def loss_fn(output: Any, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.logits, labels)

    return Trial(model=model, data=data, options={"loss_fn": loss_fn})


def _masked_words() -> Trial:
    from transformers import BertForMaskedLM

    words = _words()
    labels = words["input_ids"].clone()
    labels[(torch.rand(labels.shape) > 0.3) | (words["attention_mask"] == 0)] = -100
    return Trial(model=BertForMaskedLM(_bert()).eval(), data=_batches(**words, labels=labels))


def _sentence_embedding() -> Trial:
    from transformers import BertModel

    model = Pooled(BertModel(_bert(), add_pooling_layer=False)).eval()

    def in_batch_contrast(embedding: Tensor, _: None) -> Tensor:
        normed = nn.functional.normalize(embedding, dim=1)
        return nn.functional.cross_entropy(normed[::2] @ normed[1::2].T / 0.1, torch.arange(len(normed) // 2))

    return Trial(model=model, data=_batches(**_words()), options={"loss_fn": in_batch_contrast})


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=SCALE
    )
    return GPT2LMHeadModel(config).eval()


def _gpt2_unlabelled() -> Trial:
    return Trial(model=_gpt2(), data=_batches(**_words()))


def _gpt2_labelled() -> Trial:
    words = _words()
    labels = words["input_ids"].masked_fill(words["attention_mask"] == 0, -100)
    return Trial(model=_gpt2(), data=_batches(**words, labels=labels))


def _llama() -> Trial:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        **SIZES,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    words = torch.randint(1, WORDS, (SAMPLES, LENGTH))
    return Trial(model=LlamaForCausalLM(config).eval(), data=_batches(input_ids=words, labels=words))


def _t5() -> Trial:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=WORDS, d_model=4, d_kv=2, d_ff=6, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    labels = torch.randint(1, WORDS, (SAMPLES, 4))
    return Trial(model=T5ForConditionalGeneration(config).eval(), data=_batches(**_words(), labels=labels))


def _vit() -> Trial:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        **SIZES,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
    )
    images = torch.randn(SAMPLES, 1, 8, 8)
    model = ViTForImageClassification(config).eval()
    return Trial(model=model, data=_batches(pixel_values=images, labels=classes()))


def _cases(*entries: tuple[str, str, Any]) -> tuple[Case, ...]:
    return tuple(Case(network=n, batch=b, build=build, needs=NEEDS) for n, b, build in entries)


CASES = _cases(
    ("BERT, classifier", "dict with attention mask and labels", bert_classifier),
    ("BERT, classifier", "BatchEncoding of pairs of sentences", _bert_pairs),
    ("BERT, classifier", "(dict, labels), own loss_fn", _bert_labels_apart),
    ("BERT, classifier", "(ids, mask), labels; returns a tuple", _bert_tuples),
    ("BERT, regression head", "dict with float labels", _bert_regression),
    ("BERT, masked words", "dict with labels, -100 ignored", _masked_words),
    ("BERT, sentence embedding", "dict without labels, loss over the batch", _sentence_embedding),
    ("GPT-2 (Conv1D, tied head)", "dict without labels", _gpt2_unlabelled),
    ("GPT-2 (Conv1D, tied head)", "dict with labels, -100 ignored", _gpt2_labelled),
    ("Llama", "dict with labels", _llama),
    ("T5, encoder and decoder", "dict with labels", _t5),
    ("ViT", "dict with pixel_values and labels", _vit),
)
