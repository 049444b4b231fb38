"""`prune_layers`: exact counts, pruned blocks feed the next, files, resume, and bad input by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt as cbs
from cbs_opt.errors import BatchFormatError, BlockListError, ForwardError, RunMismatchError
from cbs_opt.layers import sequential
from cbs_opt.layers.blocks import NOT_REACHED, find_blocks
from cbs_opt.layers.calibration import calibrate
from cbs_opt.layers.record import ZEROS
from cbs_opt.layers.sequential import prune_layers
from formulations.errors import ArgumentError, NonFiniteError, ShapeError
from tests.cbs_opt.layers.networks import LENGTH, WIDTH, WORDS, Masked, Mixer, Network, padded_tokens, tokens


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("sparsity", [0.5, 0.75, "2:4"])
def test_every_layer_has_its_zeros_and_masks_say_where(sparsity: float | str) -> None:
    network = Network()
    before = state_of(network)
    report = prune_layers(network, tokens(), sparsity=sparsity)
    share = 0.5 if sparsity == "2:4" else sparsity
    assert report.zeros == share
    assert len(report.layers) == len(report.masks) == 9
    for name, tensor in network.state_dict().items():
        keep = report.masks.get(name)
        if keep is None:
            assert torch.equal(tensor, before[name])
            continue
        assert torch.equal(tensor == 0.0, ~keep)
        assert bool((keep.sum(1) == round((1 - float(share)) * keep.shape[1])).all())
    assert all(0.0 < layer.loss < 1.0 and layer.tokens == 24 * LENGTH for layer in report.layers)
    assert ZEROS in str(report)
    assert list(report.table["name"]) == [layer.name for layer in report.layers]


def test_hidden_states_are_carried_as_the_network_carries_them() -> None:
    network = Network()
    blocks, _ = find_blocks(network)
    with torch.no_grad():
        calibration = calibrate(network, blocks, tokens(), samples=20, chunk_tokens=4 * LENGTH)
        assert [fed.hidden.shape[0] for fed in calibration.batches] == [4] * 5
        for number, block in enumerate(blocks):
            calibration.advance(number, block.module)
        carried = torch.cat([fed.hidden for fed in calibration.batches])
        assert torch.allclose(carried, network.hidden(tokens()[:20]), atol=1e-6)
    assert calibration.tokens == 20 * LENGTH


def test_a_block_is_fed_by_the_pruned_ones_before_it() -> None:
    network = Network(2)
    seen: list[Tensor] = []
    recipe = cbs.LayerRecipe(damping=0.02, asymmetric=False)
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe)
    hook = network.layers[1].left.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(tokens())
    hook.remove()
    x = seen[0].reshape(-1, WIDTH).double()
    dense = Network(2).layers[1].left.weight.detach().double()
    change = (network.layers[1].left.weight.detach().double() - dense) @ x.T
    expected = float(change.square().sum() / (dense @ x.T).square().sum())
    record = next(layer for layer in report.layers if layer.name == "layers.1.left.weight")
    assert record.output_error == pytest.approx(expected, rel=1e-4)


def test_layers_that_are_fed_the_same_share_a_gram_matrix() -> None:
    network = Network(1 + 1)
    blocks, _ = find_blocks(network)
    with torch.no_grad():
        calibration = calibrate(network, blocks, tokens(), samples=None, chunk_tokens=64)
        sums = calibration.grams(0, blocks[0])
    assert sums["layers.0.left.weight"] is sums["layers.0.right.weight"]
    assert sums["layers.0.out.weight"] is not sums["layers.0.left.weight"]
    assert sums["layers.0.left.weight"].tokens == 24 * LENGTH


def test_data_in_any_form_give_the_same_network() -> None:
    x = tokens()
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=8)
    results = []
    for data in (x, loader, [{"tokens": part} for part in x.split(5)]):
        network = Network()
        prune_layers(network, data, sparsity=0.5, recipe=cbs.LayerRecipe(chunk_tokens=LENGTH))
        results.append(state_of(network))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_padded_tokens_do_not_count() -> None:
    x, mask = padded_tokens()
    padded, cut = Masked(), Masked()
    one = prune_layers(padded, [{"tokens": x, "attention_mask": mask}], sparsity=0.5)
    two = prune_layers(cut, [{"tokens": x[:, :4]}], sparsity=0.5)
    assert one.tokens == two.tokens == 24 * 4
    assert all(torch.equal(one.masks[name], two.masks[name]) for name in two.masks)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Network()
    expected = prune_layers(whole, tokens(), sparsity=0.5)
    pruned = sequential._pruned

    def killed(calibration: Any, number: int, *others: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return pruned(calibration, number, *others)

    monkeypatch.setattr(sequential, "_pruned", killed)
    network = Network()
    with pytest.raises(KeyboardInterrupt):
        prune_layers(network, tokens(), sparsity=0.5, run_dir=tmp_path)
    monkeypatch.setattr(sequential, "_pruned", pruned)
    with pytest.raises(RunMismatchError, match="network"):
        prune_layers(network, tokens(), sparsity=0.5, run_dir=tmp_path)
    again = Network()
    report = prune_layers(again, tokens(), sparsity=0.5, run_dir=tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert [layer.loss for layer in report.layers] == [layer.loss for layer in expected.layers]
    assert report.seconds >= sum(layer.seconds for layer in report.layers)
    assert all(torch.equal(report.masks[name], keep) for name, keep in expected.masks.items())


def test_what_is_written_is_plain_and_dense_with_the_masks_beside_it(tmp_path: Path) -> None:
    network = Network()
    network.head.weight = network.embedding.weight
    report = prune_layers(network, tokens(), sparsity="2:4")
    report.save(tmp_path, network)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "head.weight" not in tensors
    fresh = Network()
    fresh.head.weight = fresh.embedding.weight
    fresh.load_state_dict(tensors, strict=False)
    assert torch.equal(fresh(tokens()), network(tokens()))
    masks = cbs.load_masks(tmp_path / "masks.safetensors", network)
    assert all(torch.equal(masks[name], keep) for name, keep in report.masks.items())
    document = json.loads((tmp_path / "layers.json").read_text())
    assert document["note"] == ZEROS
    assert document["layers"][0]["name"] == "layers.0.left.weight"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_back_in_their_own(dtype: torch.dtype) -> None:
    network = Network().to(dtype)
    report = prune_layers(network, tokens(), sparsity=0.5)
    assert all(parameter.dtype == dtype for parameter in network.parameters())
    assert torch.equal(network.layers[0].out.weight != 0.0, report.masks["layers.0.out.weight"])


def test_the_network_is_given_back_as_it_was_but_for_its_weights() -> None:
    network = Network().train()
    network.layers[1].eval()
    prune_layers(network, tokens(), sparsity=0.5)
    assert network.training
    assert not network.layers[1].training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    copy.deepcopy(network)(tokens())


def test_fewer_tokens_than_inputs_are_shrunk() -> None:
    report = prune_layers(Network(), tokens(2), sparsity=0.5)
    assert all((layer.shrinkage > 0.0) == (layer.inputs > 2 * LENGTH) for layer in report.layers)


def test_a_layer_that_no_token_reaches_is_left_and_listed() -> None:
    class Skipping(Mixer):
        def forward(self, hidden_states: Tensor, scale: float = 1.0) -> tuple[Tensor]:
            return (hidden_states + scale * self.out(torch.relu(self.left(hidden_states))),)

    report = prune_layers(Network(block=Skipping), tokens(), sparsity=0.5)
    assert [e.name for e in report.left_out if e.reason == NOT_REACHED] == [
        f"layers.{number}.right.weight" for number in range(3)
    ]
    assert "1,536 weights of 3 parameters in the blocks, layers.0.right.weight the first" in str(report)


def test_keys_of_a_decoder_are_reached_though_it_has_a_cache_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": WIDTH, "d_ff": WIDTH, "d_kv": 8, "num_layers": 2, "num_heads": 2}
    network = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=WORDS, **sizes)).eval()
    pairs = [{"input_ids": tokens(4, seed), "decoder_input_ids": tokens(4, seed + 1)} for seed in (0, 2)]
    report = prune_layers(network, pairs, sparsity=0.5, blocks="decoder.block.*")
    assert not [entry for entry in report.left_out if entry.reason == NOT_REACHED]
    assert sum(".EncDecAttention." in layer.name for layer in report.layers) == 8
    assert network.config.use_cache
    assert network.decoder.config.use_cache


def test_transformers_are_pruned_with_their_own_masks_and_without_a_cache() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, hidden_size=16, intermediate_size=24, num_key_value_heads=1)
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=WORDS, n_layer=2, n_head=2, n_embd=16, n_positions=LENGTH)
    )
    for network in (llama.eval(), gpt2.eval()):
        with torch.no_grad():
            dense = network(tokens()).logits
        report = prune_layers(network, tokens(), sparsity="2:4")
        assert network.config.use_cache
        assert report.zeros == 0.5
        with torch.no_grad():
            after = network(tokens()).logits
        assert 0.0 < float((after - dense).norm()) < float(dense.norm())
        for layer in report.layers:
            weight = dict(network.named_parameters())[layer.name]
            rows = weight if weight.shape == (layer.rows, layer.inputs) and network is llama else weight.T
            assert bool(((rows != 0.0).reshape(layer.rows, -1, 4).sum(-1) <= 2).all())


def test_tokens_are_checked_before_the_network_runs() -> None:
    network = Network()
    bad = tokens()
    bad[7, 2] = WORDS
    with pytest.raises(ArgumentError, match=f"token {WORDS} in batch 0, .*tokens are 0 to {WORDS - 1}"):
        prune_layers(network, bad, sparsity=0.5)
    with pytest.raises(BatchFormatError, match="cut them into sequences"):
        prune_layers(network, tokens().flatten(), sparsity=0.5)


def test_nan_in_a_layer_names_the_block_and_the_batch_and_leaves_the_rest_alone() -> None:
    network = Network()
    with torch.no_grad():
        network.layers[0].out.bias[3] = torch.inf
    before = state_of(network)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.left\.weight are NaN or infinite .* of batch 0"):
        prune_layers(network, tokens(), sparsity=0.5)
    after = network.state_dict()
    assert torch.equal(after["layers.1.left.weight"], before["layers.1.left.weight"])


def test_a_pattern_that_does_not_fit_a_layer_is_refused_before_anything_changes() -> None:
    network = Network()
    before = state_of(network)
    with pytest.raises(ShapeError, match=r"layers\.0\.left\.weight: .*which 3 does not divide; leave it out"):
        prune_layers(network, tokens(), sparsity="1:3")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_blocks_that_do_not_follow_each_other_are_refused() -> None:
    class Backwards(Network):
        def hidden(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in reversed(self.layers):
                x = layer(x)[0]
            return x  # type: ignore[no-any-return]

    class Normed(Network):
        def hidden(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            for layer in self.layers:
                x = torch.tanh(layer(x)[0])
            return x

    class Short(Network):
        def hidden(self, tokens: Tensor) -> Tensor:
            return self.layers[0](self.embedding(tokens))[0]  # type: ignore[no-any-return]

    for kind, found in (
        (Backwards, "layers.2 is not fed"),
        (Normed, "layers.1 is not fed"),
        (Short, "did not run"),
    ):
        with pytest.raises(BlockListError, match=found):
            prune_layers(kind(), tokens(), sparsity=0.5)


def test_rows_of_a_layer_may_share_their_zeros() -> None:
    network = Network()
    recipe = cbs.LayerRecipe(budget="layer")
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe)
    assert report.zeros == 0.5
    assert len(set(report.masks["layers.0.left.weight"].sum(1).tolist())) > 1
    with pytest.raises(ArgumentError, match=r"recipe\.budget: 'layer' with 2:4"):
        prune_layers(Network(), tokens(), sparsity="2:4", recipe=recipe)
    with pytest.raises(ArgumentError, match=r"recipe\.budget: \"layer\" with greedy_obs"):
        cbs.LayerRecipe(method="greedy_obs", budget="layer")


def test_arguments_and_failures_are_named() -> None:
    with pytest.raises(ArgumentError, match="recipe"):
        prune_layers(Network(), tokens(), sparsity=0.5, recipe="swift")
    with pytest.raises(ArgumentError, match="samples"):
        prune_layers(Network(), tokens(), sparsity=0.5, samples=0)
    with pytest.raises(ArgumentError, match=r"recipe\.shrinkage"):
        cbs.LayerRecipe(shrinkage=1.5)
    with pytest.raises(ForwardError, match="at batch 0"):
        prune_layers(Network(), torch.ones(4, 3), sparsity=0.5)
