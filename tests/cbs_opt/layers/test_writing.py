"""Text that a network writes itself: it goes on from the data, layers are fed it, no pass is made over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.errors import ForwardError
from cbs_opt.layers import sequential, writing
from cbs_opt.layers.divergence import Divergence
from cbs_opt.layers.recipe import WRITTEN, layer_recipe
from cbs_opt.layers.sequential import prune_layers
from cbs_opt.layers.writing import batch_of, why_not, write
from cbs_opt.network.data import Batch
from formulations.errors import ArgumentError
from tests.cbs_opt.layers.networks import LENGTH, WORDS, Masked, Network, padded_tokens, tokens

MOVING = Divergence(passes=1, rate=1e-3, step_tokens=4 * LENGTH)


class Writer(Masked):
    """A network that goes on as language models of transformers do, without a cache."""

    def can_generate(self) -> bool:
        return True

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        assert options["do_sample"]
        assert options["min_new_tokens"] == max_new_tokens
        for _ in range(max_new_tokens):
            chances = self(input_ids)[:, -1].softmax(-1)
            input_ids = torch.cat([input_ids, torch.multinomial(chances, 1)], 1)
        return input_ids


class Other(Network):
    """A network that writes in a way of its own."""

    def generate(self, ids: Tensor, count: int) -> Tensor:
        raise AssertionError


def written(network: nn.Module, batch: Batch, count: int, seed: int = 0) -> Tensor:
    told: list[int] = []
    with torch.no_grad():
        text = write(network, [batch], count, seed=seed, advance=told.append)
    assert sum(told) == text.numel()
    return text


def test_text_goes_on_from_the_data_and_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PROMPT_SHARE", 0.5)
    network, data = Writer(), tokens(5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    text = written(network, Batch(inputs=data), 40 * LENGTH)
    assert torch.equal(torch.get_rng_state(), before)
    assert text.shape == (40, LENGTH)
    assert int(text.min()) >= 0
    assert int(text.max()) < WORDS
    for number, row in enumerate(text):
        source = data[number % 5].unfold(0, 3, 1)
        assert (source == row[:3]).all(1).any()
    assert len({tuple(row[3:].tolist()) for row in text}) > 30
    assert torch.equal(text, written(network, Batch(inputs=data), 40 * LENGTH))
    assert not torch.equal(text, written(network, Batch(inputs=data), 40 * LENGTH, seed=1))


def test_words_are_drawn_from_the_predictions() -> None:
    network = Writer()
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.fill_(-100.0)
        network.head.bias[:2] = torch.tensor([3.0, 0.25]).log()
    text = written(network, Batch(inputs=tokens()), 400 * LENGTH)[:, 1:]
    assert int(text.max()) == 1
    assert float((text == 0).double().mean()) == pytest.approx(3.0 / 3.25, abs=0.03)


def test_padding_is_no_piece_to_go_on_from() -> None:
    x, mask = padded_tokens()
    x = torch.where(mask.bool(), x, WORDS - 1)
    x[mask.bool()] %= WORDS - 1
    batch = Batch(inputs={"tokens": x, "input_ids": x, "attention_mask": mask})
    text = written(Writer(), batch, 60 * LENGTH)
    assert int(text[:, 0].max()) < WORDS - 1
    found = batch_of(text, batch, torch.device("cpu")).inputs
    assert isinstance(found, dict)
    assert found["attention_mask"].dtype == mask.dtype
    assert bool(found["attention_mask"].all())


@pytest.mark.parametrize(
    ("network", "inputs", "reason"),
    [
        (Network(), tokens(), "cannot write text"),
        (Other(), tokens(), "cannot write text"),
        (Writer(), torch.randn(4, LENGTH), "no token ids"),
        (Writer(), {"input_ids": tokens(), "attention_mask": torch.zeros(24, LENGTH)}, "no padding"),
        (Writer(), tokens(), ""),
    ],
)
def test_who_cannot_write_is_told_why(network: nn.Module, inputs: Any, reason: str) -> None:
    found = why_not(network, [Batch(inputs=inputs)])
    assert reason in found
    assert bool(found) == bool(reason)


def test_layers_are_fed_the_text_and_no_pass_is_made_over_it() -> None:
    network = Writer()
    recipe = cbs.LayerRecipe(written=16 * LENGTH, divergence=MOVING)
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe, progress=False)
    assert (report.tokens, report.written) == (24 * LENGTH, 16 * LENGTH)
    assert {layer.tokens for layer in report.layers} == {40 * LENGTH}
    assert report.differentiated == 21 * LENGTH
    assert max(layer.distance for layer in report.layers) > 0.0
    assert f"{24 * LENGTH} tokens and {16 * LENGTH} that the network wrote" in str(report)
    assert report.zeros == 0.5


@pytest.mark.parametrize(
    ("tokens", "count"), [(0, WRITTEN[0]), (20_000, 20_000), (10 * WRITTEN[1], WRITTEN[1])]
)
def test_a_recipe_by_name_has_as_much_written_as_it_is_given_within_limits(tokens: int, count: int) -> None:
    for name in ("balanced", "best"):
        assert layer_recipe(name, 0.5, tokens).written == layer_recipe(name, "2:4", tokens).written == count
    assert layer_recipe("fast", 0.5, tokens).written == 0
    assert layer_recipe(cbs.LayerRecipe(written=7), 0.5, tokens).written == 7


def test_a_recipe_by_name_goes_without_where_a_network_cannot_write_and_says_so() -> None:
    report = prune_layers(Network(), tokens(), sparsity=0.5, recipe="best", progress=False)
    assert (report.written, report.recipe.written, report.recipe.asymmetric) == (0, 0, False)
    assert "No text was written beside the data: the network cannot write text" in str(report)
    able = prune_layers(Writer(), tokens(), sparsity="2:4", recipe="balanced", progress=False)
    assert able.written == round(able.recipe.written / LENGTH) * LENGTH > 0
    assert able.unwritten == ""
    assert able.recipe.asymmetric
    with pytest.raises(ArgumentError, match=r"recipe\.written: the network cannot write"):
        prune_layers(Network(), tokens(), sparsity=0.5, recipe=cbs.LayerRecipe(written=9), progress=False)


@pytest.mark.parametrize(
    ("generate", "found"),
    [
        (lambda self, **_: self.no_such_thing, "raised AttributeError"),
        (lambda self, input_ids, **_: input_ids, "returned int64"),
    ],
)
def test_what_is_no_text_is_named_or_done_without(
    generate: Any, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "generate", generate)
    report = prune_layers(Writer(), tokens(), sparsity=0.5, recipe="balanced", progress=False)
    assert (report.written, report.recipe.asymmetric) == (0, True)
    assert found in report.unwritten
    recipe = cbs.LayerRecipe(written=9)
    with pytest.raises(ForwardError, match=f"{found}.*pass more data"):
        prune_layers(Writer(), tokens(), sparsity=0.5, recipe=recipe, progress=False)


def test_a_run_that_goes_on_does_not_write_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = cbs.LayerRecipe(written=8 * LENGTH, budget="network", divergence=MOVING)

    def prune(network: nn.Module, run_dir: Path | None = None) -> cbs.LayersReport:
        return prune_layers(network, tokens(), sparsity=0.5, recipe=recipe, run_dir=run_dir, progress=False)

    whole = Writer()
    prune(whole)
    with monkeypatch.context() as patch:
        patch.setattr(sequential, "_remember", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(Writer(), tmp_path)
    monkeypatch.setattr(Writer, "generate", interrupted)
    again = Writer()
    report = prune(again, tmp_path)
    assert report.written == 8 * LENGTH
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_a_language_model_of_transformers_writes_by_its_own_method() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=24, eos_token_id=1, **sizes
    )
    network = transformers.LlamaForCausalLM(config).eval()
    settings = network.generation_config.to_dict()
    data = [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}]
    recipe = cbs.LayerRecipe(written=20 * LENGTH, divergence=MOVING)
    report = prune_layers(network, data, sparsity="2:4", recipe=recipe, progress=False)
    assert report.written == 20 * LENGTH
    assert report.zeros == 0.5
    assert network.config.use_cache
    assert network.generation_config.to_dict() == settings
