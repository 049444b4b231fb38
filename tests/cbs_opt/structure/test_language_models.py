"""Neurons and heads of a small Llama whose queries share keys: pruned, run, written and read again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.layers.divergence import Divergence
from cbs_opt.structure.chain import Chain
from cbs_opt.structure.columns import Columns
from cbs_opt.structure.reading import regression
from formulations.errors import ArgumentError
from tests.cbs_opt.structure.networks import masking, random_keep, relative

transformers = pytest.importorskip("transformers")

WORDS, LENGTH = 64, 12
QUERIES, KEYS, HEAD, NEURONS = 9, 3, 8, 20
HEADS, MLP = "model.layers.*.self_attn.q_proj", "model.layers.*.mlp.gate_proj"
FITTED = cbs.GroupRecipe(steps=0, spread="set")


def llama(blocks: int = 2, attention: str = "sdpa") -> Any:
    """A Llama with as many keys as queries a key, as SmolLM2 has: no size may be taken for the other."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=QUERIES * HEAD,
        intermediate_size=NEURONS,
        num_hidden_layers=blocks,
        num_attention_heads=QUERIES,
        num_key_value_heads=KEYS,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tokens(samples: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, WORDS, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


def scores(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def padded(samples: int = 6) -> dict[str, Tensor]:
    """Sequences that begin with padding, as generation in batches has them."""
    mask = torch.ones(samples, LENGTH, dtype=torch.int64)
    mask[::2, :4] = 0
    return {"input_ids": tokens(samples, 5), "attention_mask": mask}


def sizes(model: Any) -> list[tuple[int, int, int]]:
    """Query heads, key heads and neurons of every block."""
    return [
        (
            block.self_attn.q_proj.out_features // HEAD,
            block.self_attn.k_proj.out_features // HEAD,
            block.mlp.down_proj.in_features,
        )
        for block in model.model.layers
    ]


def test_a_key_goes_with_its_queries_and_a_neuron_with_both_of_its_weights() -> None:
    structure = cbs.groups(llama(), tokens(2))
    kinds = [(part.kind, part.n_groups) for part in structure.sets]
    assert kinds == [("heads", KEYS), ("neurons", NEURONS)] * 2
    heads, neurons = structure.sets[:2]
    rows = {entry.name.split(".")[-2]: entry.index[1] for entry in heads.members}
    assert rows["k_proj"].tolist() == rows["v_proj"].tolist() == list(range(HEAD, 2 * HEAD))
    of_queries = list(range(QUERIES // KEYS * HEAD, 2 * QUERIES // KEYS * HEAD))
    assert rows["q_proj"].tolist() == rows["o_proj"].tolist() == of_queries
    assert neurons.parameters == 3 * QUERIES * HEAD
    assert {entry.name.split(".")[-2] for entry in neurons.members} == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_shrunk_llama_computes_what_the_masked_one_does_padding_and_generation_too(attention: str) -> None:
    model = llama(attention=attention)
    structure = cbs.groups(model, tokens(2))
    keep = random_keep(structure)
    small, record = cbs.shrink(model, tokens(2), keep=keep)
    kept = [(int(a.sum()), int(b.sum())) for a, b in zip(*[iter(record.keep.values())] * 2, strict=True)]
    assert sizes(small) == [(QUERIES // KEYS * heads, heads, neurons) for heads, neurons in kept]
    with masking(model, structure, keep):
        for other in ("sdpa", "eager"):
            model.set_attn_implementation(other)
            small.set_attn_implementation(other)
            for inputs in ({"input_ids": tokens(100, 3)}, padded()):
                assert relative(scores(model, **inputs), scores(small, **inputs)) < 1e-5
            ends = [entry.generate(**padded(), max_new_tokens=6, do_sample=False) for entry in (model, small)]
            assert ends[0].equal(ends[1])
    assert ends[1].shape[1] > LENGTH


def test_neurons_and_heads_are_pruned_by_default_and_the_network_moves_towards_the_dense_one() -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    recipe = cbs.GroupRecipe(divergence=Divergence(passes=2, rate=1e-3, step_tokens=4 * LENGTH))
    small, report = cbs.prune_groups(model, tokens(96), keep=0.75, recipe=recipe)
    heads, keys, neurons = np.array(sizes(small)).sum(0).tolist()
    assert (heads, keys) == (4 * QUERIES // KEYS, 4)
    assert 30 - 2 <= neurons <= 30
    assert report.moved is not None
    assert report.moved.after < report.moved.before
    assert report.moved.tokens == 2 * 84 * LENGTH
    assert str(report.moved) in str(report)
    assert small.model.embed_tokens.weight.equal(model.model.embed_tokens.weight)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.config.use_cache
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    grown = small.generate(tokens(2), max_new_tokens=5, do_sample=False)
    assert grown.shape[1] > LENGTH


def test_samples_that_judge_the_passes_are_in_no_choice_or_fit() -> None:
    found = []
    last = torch.randperm(24, generator=torch.Generator().manual_seed(0))[-3:]
    for word in (5, 6):
        x = tokens()
        x[last] = word
        recipe = cbs.GroupRecipe(divergence=Divergence(passes=1))
        _, report = cbs.prune_groups(llama(), x, keep=0.75, recipe=recipe)
        assert report.moved is not None
        assert report.moved.held == 3 * LENGTH
        found.append(report)
    one, other = ([choice.loss for choice in report.choices.values()] for report in found)
    assert one == pytest.approx(other, rel=1e-9)
    assert found[0].moved.before != found[1].moved.before


def test_a_network_whose_layers_are_the_conv1d_of_transformers_is_pruned_too() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": NEURONS}
    config = transformers.GPT2Config(n_positions=64, bos_token_id=1, eos_token_id=2, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    keep = {"*.c_attn": 0.5, "*.c_fc": 0.5}
    small, report = cbs.prune_groups(model, tokens(), keep=keep, recipe=FITTED)
    assert [choice.n_keep for choice in report.choices.values()] == [2, NEURONS // 2] * 2
    assert [tuple(block.mlp.c_proj.weight.shape) for block in small.transformer.h] == [(NEURONS // 2, 24)] * 2
    bare, _ = cbs.shrink(model, tokens(2), keep=report.shrinkage.keep)
    errors = [float((scores(model, **padded()) - scores(one, **padded())).norm()) for one in (small, bare)]
    assert errors[0] < errors[1]
    assert small.generate(tokens(2), max_new_tokens=4, do_sample=False).shape[1] > LENGTH


def test_a_smaller_network_is_read_from_its_state_dict() -> None:
    model, other = llama(), llama()
    small, _ = cbs.prune_groups(model, tokens(), keep={HEADS: 0.67, "*.1.mlp.gate_proj": 0.5}, recipe=FITTED)
    again = cbs.resized(other, tokens(2), small.state_dict())
    assert sizes(again) == sizes(small) == [(6, 2, NEURONS), (6, 2, NEURONS // 2)]
    assert scores(again, **padded()).equal(scores(small, **padded()))
    wrong = small.state_dict()
    wrong["model.layers.1.mlp.gate_proj.weight"] = wrong["model.layers.1.mlp.gate_proj.weight"][:-1]
    with pytest.raises(ArgumentError, match=r"state: .*size mismatch"):
        cbs.resized(other, tokens(2), wrong)
    wrong["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(5, QUERIES * HEAD)
    with pytest.raises(
        ArgumentError, match=r"state: .*q_proj\.weight of shape \(5, 72\), which no number of heads"
    ):
        cbs.resized(other, tokens(2), wrong)


def test_a_share_is_spread_over_blocks_exactly() -> None:
    model = llama(4)
    recipe = cbs.GroupRecipe(steps=0)
    with torch.no_grad():
        # Heads of one block do nothing, so these are the ones to go.
        model.model.layers[2].self_attn.o_proj.weight *= 1e-3
    _, report = cbs.prune_groups(model, tokens(), keep={HEADS: 0.75, MLP: 0.75}, recipe=recipe)
    counts = {name: choice.n_keep for name, choice in report.choices.items()}
    heads = [count for name, count in counts.items() if "attn" in name]
    neurons = [count for name, count in counts.items() if "mlp" in name]
    assert sum(heads) == 9
    assert heads[2] == 1
    assert 0.75 * 4 * NEURONS - 4 <= sum(neurons) <= 0.75 * 4 * NEURONS
    assert len(set(neurons)) > 1


def test_blocks_are_fitted_to_what_whole_passes_say() -> None:
    model = llama()
    layers = [name for name, module in model.named_modules() if name.endswith(("o_proj", "down_proj"))]
    batches = list(cbs_batches(tokens()))
    work = copy.deepcopy(model)
    chain = Chain.of(model, layers, batches)
    assert chain is not None
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def visit(name: str, gram: np.ndarray, cross: np.ndarray) -> None:
        wanted = regression(model, work, name, batches)
        assert np.allclose(gram, wanted[0], rtol=1e-4, atol=1e-6)
        assert np.allclose(cross, wanted[1], rtol=1e-4, atol=1e-6)
        seen[name] = gram, cross
        with torch.no_grad():
            work.get_submodule(name).weight[:, 3:7] = 0.0

    chain.run(work, visit)
    assert list(seen) == layers
    assert Chain.of(model, [*layers, "lm_head"], batches) is None
    assert Chain.of(nn.Sequential(nn.Linear(2, 2)), ["0"], batches) is None


def cbs_batches(x: Tensor) -> Any:
    from cbs_opt.network.data import iterate

    return iterate(x, batch_size=8)


def columns(seed: int, p: int = 30) -> Columns:
    rng = np.random.default_rng(seed)
    scatter, moment = [], []
    for outputs in (4, 9):
        x, w = rng.normal(size=(p, 3 * p)), rng.normal(size=(outputs, p))
        scatter.append(np.linalg.inv(x @ x.T / p + 0.1 * np.eye(p)))
        moment.append(w.T @ w)
    return Columns(scatter, moment)


def value(made: Columns, keep: np.ndarray) -> float:
    """The loss of a set, from its definition."""
    gone = np.flatnonzero(~keep)
    pairs = zip(made.scatter, made.moment, strict=True)
    return sum(
        0.5 * float(np.trace(np.linalg.solve(s[np.ix_(gone, gone)], m[np.ix_(gone, gone)]))) for s, m in pairs
    )


@pytest.mark.parametrize("seed", range(3))
def test_single_columns_go_greedily_and_exchanges_gain_what_they_say(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cbs_opt.structure.columns.PANEL", 4)
    made = columns(seed)
    keep = np.ones(30, dtype=np.bool_)
    _, losses = made.greedy(12)
    for step in range(1, losses.size):
        trials = {}
        for group in np.flatnonzero(keep):
            trial = keep.copy()
            trial[group] = False
            trials[int(group)] = value(made, trial)
        best = min(trials, key=trials.__getitem__)
        keep[best] = False
        assert losses[step] == pytest.approx(trials[best])
    assert keep.tolist() == made.greedy(12)[0].tolist()
    worse = np.arange(30) < 12
    exchanges = made.exchanges(worse)
    assert exchanges
    for gain, goes, returns in exchanges:
        trial = worse.copy()
        trial[goes], trial[returns] = False, True
        assert value(made, worse) - value(made, trial) == pytest.approx(gain)
    assert len({goes for _, goes, _ in exchanges} | {back for *_, back in exchanges}) == 2 * len(exchanges)


@pytest.mark.parametrize("metric", ["loss", "outputs"])
def test_padding_says_nothing(metric: str) -> None:
    """Tokens behind the end of a text, which nothing before them sees, change neither choices nor fits."""
    mask = torch.ones(24, LENGTH, dtype=torch.int64)
    mask[::2, 7:] = 0
    recipe, found = cbs.GroupRecipe(steps=0, metric=metric), []
    for filler in (0, 1):
        data = {"input_ids": tokens().masked_fill(mask == 0, filler), "attention_mask": mask}
        small, report = cbs.prune_groups(llama(), data, keep=0.5, recipe=recipe)
        found.append((small, report.choices))
    assert found[0][1].keys() == found[1][1].keys()
    for name, choice in found[0][1].items():
        assert choice.loss == pytest.approx(found[1][1][name].loss, rel=1e-4)
    assert relative(scores(found[0][0], **padded()), scores(found[1][0], **padded())) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": {HEADS: 0.0}}, r"keep\['.*q_proj'\]: 0\.0"),
        ({"keep": {HEADS: 0.5, "*.v_proj": 0.5}}, "'\\*.v_proj' matches no groups; choose among"),
        ({"keep": {HEADS: 0.5}, "ignore": "*.k_proj"}, "'model.*q_proj' matches no groups"),
    ],
)
def test_what_cannot_be_done_is_named(options: Mapping[str, Any], message: str) -> None:
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ArgumentError, match=message):
        cbs.prune_groups(model, tokens(), **options)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spread": "blocks"}, r"recipe\.spread: 'blocks'"),
        ({"divergence": 2}, r"recipe\.divergence: a int"),
    ],
)
def test_a_recipe_out_of_range_is_named(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cbs.GroupRecipe(**options)


def test_an_ignored_layer_leaves_the_heads_that_it_belongs_to_whole() -> None:
    small, report = cbs.prune_groups(llama(), tokens(), keep=0.5, ignore="*.k_proj", recipe=FITTED)
    assert sizes(small) == [(QUERIES, KEYS, NEURONS // 2)] * 2
    assert (
        "model.layers.0.self_attn.q_proj is left whole: model.layers.0.self_attn.k_proj is ignored"
        in report.notes
    )


def test_the_number_of_a_block_is_no_size_though_it_equals_one() -> None:
    """Block 9 of ten has the number 9, which is how many heads it reads before some of them go."""
    model = llama(QUERIES + 1)
    structure = cbs.groups(model, tokens(2))
    keep = random_keep(structure)
    small, _ = cbs.shrink(model, tokens(2), keep=keep)
    assert [block.self_attn.layer_idx for block in small.model.layers] == list(range(QUERIES + 1))
    with masking(model, structure, keep):
        assert relative(scores(model, **padded()), scores(small, **padded())) < 1e-5
