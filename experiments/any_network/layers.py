"""Layers whose weights are adapted, parametrised, masked, tied, frozen, shared or quantised."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from experiments.any_network.case import CLASSES, SAMPLES, Case, Trial, classes, perceptron


class LowRank(nn.Module):
    """A frozen linear layer and a trainable update of rank 2 beside it, as people write it by hand."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both."""
        out: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return out


class Tied(nn.Module):
    """An autoencoder-like classifier that uses one weight twice, the second time transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(8, 12)
        self.decode = nn.Linear(12, 8, bias=False)
        self.decode.weight = nn.Parameter(self.encode.weight.data.t())
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.out(self.decode(torch.relu(self.encode(x))))
        return logits


class Paired(nn.Module):
    """`nn.Bilinear` of the input with itself, and a layer that the forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.Bilinear(8, 8, CLASSES)
        self.unused = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        logits: Tensor = self.pairs(x, x)
        return logits


class Own(nn.Module):
    """A network that holds its weights itself, without layers."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 12) / 3.0)
        self.out = nn.Parameter(torch.randn(12, CLASSES) / 3.0)
        self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        return torch.tanh(x @ self.matrix + self.shift) @ self.out


def _of(model: nn.Module) -> Trial:
    return Trial(model=model.eval(), data=_data())


def _normed(norm: nn.Module) -> Trial:
    return _of(nn.Sequential(nn.Linear(8, 12), norm, nn.ReLU(), nn.Linear(12, CLASSES)))


def _data() -> tuple[Tensor, Tensor]:
    return torch.randn(SAMPLES, 8), classes()


def _lora_by_hand() -> Trial:
    model = perceptron()
    model[0] = LowRank(model[0])
    return Trial(model=model, data=_data())


def _peft() -> Trial:
    from peft import LoraConfig, get_peft_model

    from experiments.any_network.language import bert_classifier

    trial = bert_classifier()
    config = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
    return Trial(model=get_peft_model(trial.model, config).eval(), data=trial.data)  # type: ignore[arg-type]


def _weight_norm(*, old: bool) -> Trial:
    model = perceptron()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        (torch.nn.utils.weight_norm if old else parametrizations.weight_norm)(model[0])
    return Trial(model=model, data=_data())


def _orthogonal() -> Trial:
    model = perceptron()
    parametrizations.orthogonal(model[0])
    return Trial(model=model, data=_data())


def _spectral(*, everywhere: bool) -> Trial:
    model = perceptron()
    for layer in (model[0], model[2]) if everywhere else (model[0],):
        parametrizations.spectral_norm(layer)
    return Trial(model=model.eval(), data=_data())


def _masked() -> Trial:
    model = perceptron()
    torch_prune.random_unstructured(model[0], "weight", amount=0.3)
    return Trial(model=model, data=_data())


def _tied() -> Trial:
    square = nn.Linear(8, 8)
    model = nn.Sequential(square, nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    model[2].weight = square.weight
    return Trial(model=model.eval(), data=_data())


def _overlapping() -> Trial:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    memory = torch.randn(12, 8) / 3.0
    model[0].weight = nn.Parameter(memory[:8])
    model[2].weight = nn.Parameter(memory[4:])
    return Trial(model=model.eval(), data=_data())


def _expanded() -> Trial:
    model = perceptron()
    model[0].weight = nn.Parameter(torch.randn(1, 8).expand(12, 8))
    return Trial(model=model, data=_data())


def _frozen(*, everywhere: bool) -> Trial:
    model = perceptron()
    (model if everywhere else model[0]).requires_grad_(False)
    return Trial(model=model, data=_data())


def _quantised(*layers: str) -> Trial:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(perceptron(), set(layers) or {nn.Linear})
    return Trial(model=model, data=_data())


CASES = (
    Case(network="Bilinear, beside an unused layer", batch="tensors", build=lambda: _of(Paired())),
    Case(network="weights without layers", batch="tensors", build=lambda: _of(Own())),
    Case(network="LayerNorm", batch="tensors", build=lambda: _normed(nn.LayerNorm(12))),
    Case(network="GroupNorm", batch="tensors", build=lambda: _normed(nn.GroupNorm(3, 12))),
    Case(
        network="batch normalisation without running statistics",
        batch="tensors",
        build=lambda: _normed(nn.BatchNorm1d(12, track_running_stats=False)),
        refused="running statistics",
    ),
    Case(network="LoRA (peft) on BERT", batch="dict", build=_peft, needs=("transformers", "peft")),
    Case(network="LoRA by hand", batch="tensors", build=_lora_by_hand),
    Case(network="weight norm, old hook", batch="tensors", build=lambda: _weight_norm(old=True)),
    Case(network="weight norm, parametrisation", batch="tensors", build=lambda: _weight_norm(old=False)),
    Case(network="orthogonal parametrisation", batch="tensors", build=_orthogonal),
    Case(network="spectral norm", batch="tensors", build=lambda: _spectral(everywhere=False)),
    Case(
        network="spectral norm on every layer",
        batch="tensors",
        build=lambda: _spectral(everywhere=True),
        refused="parametri",
    ),
    Case(network="masked by torch.nn.utils.prune", batch="tensors", build=_masked),
    Case(network="one weight in two layers", batch="tensors", build=_tied),
    Case(network="transposed view of another weight", batch="tensors", build=lambda: _of(Tied())),
    Case(network="overlapping views", batch="tensors", build=_overlapping),
    Case(network="expanded weight", batch="tensors", build=_expanded),
    Case(network="frozen layer", batch="tensors", build=lambda: _frozen(everywhere=False)),
    Case(
        network="frozen network",
        batch="tensors",
        build=lambda: _frozen(everywhere=True),
        refused="requires_grad",
    ),
    Case(network="quantised layer (dynamic int8)", batch="tensors", build=lambda: _quantised("0")),
    Case(
        network="quantised network (dynamic int8)",
        batch="tensors",
        build=_quantised,
        refused="quanti",
    ),
)
