"""Measures of gradient flow: g and H g are those of explicit derivatives, and mean what they should."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import experiments.comparators.gradient_flow as module
from experiments.comparators.gradient_flow import MEASURES, chosen, flow, importance, losses, run
from experiments.comparators.subjects import accuracy, weight_counts
from experiments.ledger import Ledger
from experiments.rivals_training import Training
from tests.experiments.comparators.tiny import tiny_network, tiny_subject
from tests.experiments.tiny_data import write_mnist


def smooth() -> tuple[nn.Module, Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        x = torch.randn(11, 4, dtype=torch.float64)
    return model, x, torch.arange(11) % 3


NAMES = ("0.weight", "2.weight")


def explicit() -> tuple[Tensor, Tensor, Tensor]:
    """Return w, g and the whole Hessian, by functions of the flat vector of weights."""
    model, x, y = smooth()
    shapes = [model.get_parameter(name).shape for name in NAMES]
    flat = torch.cat([model.get_parameter(name).detach().flatten() for name in NAMES])

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        weights = {name: part.view(s) for name, part, s in zip(NAMES, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), y)

    gradient = torch.func.grad(loss)
    return flat, gradient(flat).detach(), torch.func.jacrev(gradient)(flat).detach()


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in NAMES])


def test_the_gradient_and_its_product_with_the_hessian_are_those_of_the_whole_hessian() -> None:
    model, x, y = smooth()
    gradients, products = flow(model, NAMES, x, y)
    _, gradient, hessian = explicit()
    torch.testing.assert_close(joined(gradients), gradient)
    torch.testing.assert_close(joined(products), hessian @ gradient)


def test_measures_are_first_order_changes_when_a_weight_shrinks() -> None:
    weight, gradient, hessian = explicit()
    model, x, y = smooth()
    product, shrink = hessian @ gradient, 1e-5

    def seen() -> tuple[float, float]:
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in NAMES])
        return float(loss.detach()), float(torch.stack([g.square().sum() for g in gradients]).sum())

    loss, norm = seen()
    rows, columns = model.get_parameter("0.weight").shape
    by_loss = importance("loss", weight, gradient, product)
    signed = importance("grasp", weight, gradient, product)
    for place in range(rows * columns):
        entry = model.get_parameter("0.weight").detach().view(-1)[place : place + 1]
        kept = entry.clone()
        entry *= 1.0 - shrink
        other_loss, other_norm = seen()
        entry.copy_(kept)
        assert abs(other_loss - loss) / shrink == pytest.approx(float(by_loss[place]), abs=1e-5)
        assert (norm - other_norm) / (2.0 * shrink) == pytest.approx(float(signed[place]), abs=1e-5)
    assert importance("gradient_norm", weight, gradient, product).equal(signed.abs())
    assert importance("magnitude", weight, gradient, product).equal(weight.abs())


def test_the_lowest_go_to_an_exact_count_and_signed_grasp_raises_the_gradient() -> None:
    subject = tiny_subject()
    x, y = subject.data.train_x, subject.data.train_y
    norms = {}
    for measure in MEASURES:
        network = tiny_network()
        keep = chosen(network, measure, 0.3, x, y)
        total = sum(mask.numel() for mask in keep.values())
        assert total - sum(int(mask.sum()) for mask in keep.values()) == round(0.3 * total)
        with torch.no_grad():
            for name, mask in keep.items():
                network.model.get_parameter(name).mul_(mask)
        norms[measure] = losses(network, x, y)[1]
    assert norms["grasp"] > max(norms["magnitude"], norms["loss"])


@pytest.mark.parametrize("moment", [0.0, 1.0])
def test_a_network_is_pruned_once_at_its_moment_and_trained_on(moment: float) -> None:
    subject = tiny_subject()
    count = len(subject.data.train_x)
    training = Training(rate=0.05, samples=8 * count, batch_size=15)
    says = run(subject, "magnitude", 0.5, moment, training)
    total, kept = weight_counts(subject.network)
    assert kept == total - round(0.5 * total) == sum(says["kept_by_layer"].values())
    assert says["samples"] == 8 * count
    assert accuracy(subject.network, subject.data) > 80.0
    assert 0.0 <= says["accuracy_soon"] <= 100.0
    untrained = losses(tiny_network(), subject.data.train_x, subject.data.train_y)[0]
    assert (says["loss_before"] == pytest.approx(untrained)) == (moment == 0.0)
    assert not subject.network.model.training


def test_the_command_measures_each_cell_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path, train=60, test=10)
    command = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--no-verify"]
    command += ["--sparsity", "0.9", "--moments", "0", "0.5"]
    assert module.main(command) == 0
    monkeypatch.setattr(module, "measure_cell", None)
    assert module.main(command) == 0
    results = Ledger(tmp_path / "out" / "gradient_flow.jsonl").results()
    assert len(results) == 2 * len(MEASURES)
    assert all(entry["kept"] == entry["n"] - round(0.9 * entry["n"]) for entry in results)
