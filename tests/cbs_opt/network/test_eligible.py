"""What is eligible by default, and that everything else is named with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from cbs_opt.errors import NoEligibleWeightsError, UnmatchedPatternError
from cbs_opt.network import eligible
from cbs_opt.network.eligible import eligible_parameters, names_by_parameter, unwrapped
from cbs_opt.network.masks import apply_masks
from cbs_opt.network.partition import Partition
from formulations.errors import ArgumentError

ELIGIBLE: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear of one output": (lambda: nn.Linear(4, 1), ["weight"]),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), ["weight"]),
    "conv2d": (lambda: nn.Conv2d(2, 3, 2), ["weight"]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), ["weight"]),
    "depthwise": (lambda: nn.Conv2d(3, 3, 1, groups=3), ["weight"]),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 2), ["weight"]),
    "bilinear": (lambda: nn.Bilinear(2, 3, 4), ["weight"]),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
        ["in_proj_weight", "out_proj.weight"],
    ),
    "attention of other widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
    ),
    "lstm": (lambda: nn.LSTM(3, 2), ["weight_ih_l0", "weight_hh_l0"]),
    "gru cell": (lambda: nn.GRUCell(3, 2), ["weight_ih", "weight_hh"]),
}


@pytest.mark.parametrize("kind", ELIGIBLE)
def test_matrices_of_every_layer_are_eligible_and_vectors_are_named(kind: str) -> None:
    make, expected = ELIGIBLE[kind]
    model = make()
    partition = Partition.from_model(model)
    assert [span.name for span in partition.parameters] == expected
    left = {entry.name for entry in partition.left_out}
    assert left == {name for name, _ in model.named_parameters()} - set(expected)
    assert {entry.reason for entry in partition.left_out} <= {eligible.BIAS}
    assert partition.n_network == sum(p.numel() for p in model.parameters())


class Tokens(nn.Module):
    """A small language model of raw and ordinary parameters."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.pos_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.norm = nn.LayerNorm((5, 4))
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {entry.name: entry.reason for entry in Partition.from_model(model, **options).left_out}


def test_reasons_of_what_is_left_out_by_default() -> None:
    assert reasons(Tokens()) == {
        "embed.weight": eligible.TIED,
        "pos_embedding": eligible.EMBEDDING,
        "cls_token": eligible.VECTOR,
        "norm.weight": eligible.NORM,
        "norm.bias": eligible.BIAS,
    }
    assert reasons(Tokens(tied=False))["embed.weight"] == eligible.EMBEDDING
    untied = Partition.from_model(Tokens(tied=False))
    assert [span.name for span in untied.parameters] == ["mixing", "head.weight"]


def test_target_names_anything_that_can_be_pruned() -> None:
    model = Tokens()
    for target in ("head.weight", "embed.*", "pos_embedding", "norm.weight"):
        assert len(Partition.from_model(model, target=target).parameters) == 1
    left = reasons(model, target="mixing", ignore="norm.*")
    assert left["cls_token"] == eligible.UNTARGETED
    assert left["norm.bias"] == eligible.IGNORED


def normed(old: bool) -> nn.Module:
    layer = nn.Linear(3, 4)
    return nn.utils.weight_norm(layer) if old else parametrizations.weight_norm(layer)


class Shared(nn.Module):
    """Two Parameters over the same memory, one of them transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 3)
        self.second.weight = nn.Parameter(self.first.weight.data.t())


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


def masked() -> nn.Module:
    layer = nn.Linear(3, 4)
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def parametrised() -> nn.Module:
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", Double())
    return layer


def buffered() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.register_buffer("copy", layer.weight.data.t())
    return layer


def expanded() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight = nn.Parameter(torch.randn(1, 3).expand(4, 3))
    return layer


def views() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    memory = torch.randn(20)
    model[0].weight = nn.Parameter(memory[:12].view(4, 3))
    model[1].weight = nn.Parameter(memory[8:].view(4, 3))
    return model


IMPOSSIBLE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "weight norm, old": (lambda: normed(True), "weight_v", eligible.WEIGHT_NORM),
    "weight norm": (lambda: normed(False), "parametrizations.weight.original1", eligible.WEIGHT_NORM),
    "spectral norm, old": (
        lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
        "weight_orig",
        eligible.PARAMETRISED,
    ),
    "orthogonal": (
        lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
        "parametrizations.weight.original",
        eligible.PARAMETRISED,
    ),
    "parametrised": (parametrised, "parametrizations.weight.original", eligible.PARAMETRISED),
    "masked": (masked, "weight_orig", eligible.MASKED),
    "transposed": (Shared, "second.weight", eligible.SHARED),
    "overlapping": (views, "1.weight", eligible.SHARED),
    "buffer": (buffered, "weight", eligible.SHARED),
    "expanded": (expanded, "weight", eligible.SHARED),
    "frozen": (lambda: nn.Linear(3, 4).requires_grad_(False), "weight", eligible.FROZEN),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_what_cannot_be_pruned_as_such_is_named_with_what_to_do(kind: str) -> None:
    make, name, reason = IMPOSSIBLE[kind]
    model = make()
    with pytest.raises(NoEligibleWeightsError, match=reason) as alone:
        Partition.from_model(model)
    assert alone.value.remedy
    both = nn.ModuleDict({"odd": model, "plain": nn.Linear(2, 2)})
    for options in ({}, {"target": "*"}):
        partition = Partition.from_model(both, **options)
        assert reasons(both, **options)[f"odd.{name}"] == reason
        assert "plain.weight" in [span.name for span in partition.parameters]
    with pytest.raises(NoEligibleWeightsError, match=reason) as named:
        Partition.from_model(both, target=[f"odd.{name}", "plain.weight"])
    assert named.value.argument == "target"
    assert named.value.remedy == eligible.REMEDIES[reason]


def absent() -> nn.Module:
    layer = nn.Linear(3, 4)
    layer.weight.data = torch.empty(0)
    return layer


def inferred() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(3, 4)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: nn.Linear(3, 4, device="meta"), "meta device"),
        (absent, "empty"),
        (inferred, "inference_mode"),
    ],
)
def test_values_that_are_not_there_are_refused(make: Callable[[], nn.Module], found: str) -> None:
    with pytest.raises(ArgumentError, match=rf"1\.weight .*{found}"):
        Partition.from_model(nn.Sequential(nn.Linear(3, 3), make()))


def test_a_scripted_network_has_the_weights_of_the_network_it_was_made_from() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 4), nn.LayerNorm((4, 4)), nn.ConvTranspose1d(4, 3, 2), nn.Linear(5, 2)
    )
    assert Partition.from_model(torch.jit.script(model)) == Partition.from_model(model)


def test_disjoint_views_of_one_storage_are_weights_like_others() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4))
    memory = torch.randn(24)
    for layer, part in zip(model, memory.split(12), strict=True):
        layer.weight = nn.Parameter(part.view(4, 3))
    assert Partition.from_model(model).n == 24


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(1, 2, 3))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    partition = Partition.from_model(quantised)
    assert [(e.name, e.shape, e.reason) for e in partition.left_out if e.reason == eligible.QUANTISED] == [
        ("0.weight", (4, 3), eligible.QUANTISED)
    ]


class LowRank(nn.Module):
    """A frozen layer with an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A = nn.Linear(4, 2, bias=False)
        self.lora_B = nn.Linear(2, 4, bias=False)


def test_beside_adapters_the_frozen_weights_are_pruned() -> None:
    partition = Partition.from_model(LowRank())
    assert [span.name for span in partition.parameters] == ["base.weight"]
    adapters = {e.name for e in partition.left_out if e.reason == eligible.ADAPTER}
    assert adapters == {"lora_A.weight", "lora_B.weight"}
    assert Partition.from_model(LowRank(), target="lora_*").n == 16


def test_names_are_those_of_the_network_inside_its_wrappers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        assert unwrapped(wrapped) is model
        partition = Partition.from_model(wrapped, target="0.*")
        assert partition.parameters[0].name == "0.weight"
        keep = partition.keep_by_parameter(torch.arange(partition.n) % 2 == 0)
        apply_masks(wrapped, keep)
        assert torch.equal(model[0].weight == 0.0, ~keep["0.weight"])
        assert torch.equal(partition.flatten(wrapped), partition.flatten(model))


def test_channels_of_transposed_layers_are_contiguous_and_come_back() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Linear(3, 2))
    partition = Partition.from_model(model, blocks="row")
    flat = partition.flatten(model)
    weight = model[0].weight.detach()
    for channel in range(3):
        block = partition.blocks[channel]
        assert torch.equal(flat[block.start : block.stop], weight[:, channel].flatten())
    parts = partition.split(flat)
    assert torch.equal(parts["0.weight"], weight)
    parts["0.weight"].zero_()
    assert bool((flat[:24] == 0.0).all())
    assert bool((flat[24:] != 0.0).all())


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [("0", r'use "0\.\*"'), ("0.wieght", r"did you mean 0\.weight"), ("weight", r"did you mean .*0\.weight")],
)
def test_a_pattern_without_a_match_says_what_it_could_mean(pattern: str, hint: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(UnmatchedPatternError, match=hint):
        Partition.from_model(model, ignore=[pattern])


def test_every_parameter_is_chosen_or_left_out() -> None:
    for make in (*(make for make, _ in ELIGIBLE.values()), Tokens, LowRank):
        model = make()
        names = names_by_parameter(model)
        chosen, left_out = eligible_parameters(model, names)
        assert len(chosen) + len(left_out) == len(names)
        assert all(entry.reason for entry in left_out)
