"""Gradient rows against plain autograd loops and the Gauss-Newton matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt.curvature.fisher import fisher_blocks, gradient_rows
from cbs_opt.curvature.kinds import FISHERS, EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher
from cbs_opt.errors import (
    DataLoaderError,
    EmptyDataError,
    LabelRangeError,
    NonFiniteGradientError,
    TrainingModeError,
)
from cbs_opt.network.partition import Partition
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError, UnsupportedProblemError

SAMPLES, CLASSES = 23, 4


class TiedNetwork(nn.Module):
    """Two linear layers that share one weight, between convolution, batch norm and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.first = nn.Linear(27, 27)
        self.second = nn.Linear(27, 27)
        self.second.weight = self.first.weight
        self.classifier = nn.Linear(27, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.classifier(torch.tanh(self.second(torch.tanh(self.first(hidden)))))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    model = TiedNetwork().double()
    model(torch.randn(64, 2, 5, 5, dtype=torch.float64))  # moves the running statistics off 0 and 1
    return model.eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def in_order(data: tuple[Tensor, Tensor], batch_size: int = 5) -> DataLoader:
    return DataLoader(TensorDataset(*data), batch_size=batch_size)


def loop_gradients(model: nn.Module, partition: Partition, scalars: list[Tensor]) -> Tensor:
    """One backward pass a scalar, written without torch.func."""
    parameters = list(partition.tensors(model).values())
    found = [torch.autograd.grad(scalar, parameters, retain_graph=True) for scalar in scalars]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in found])


def test_rows_are_the_gradients_of_single_samples(network, data):
    partition = Partition.from_model(network)
    x, y = data
    losses = [cross_entropy(network(x[i : i + 1]), y[i : i + 1]) for i in range(SAMPLES)]
    expected = loop_gradients(network, partition, losses)
    for vectorize in (True, False):
        found = gradient_rows(
            network,
            in_order(data),
            cross_entropy,
            partition,
            curvature=EmpiricalFisher(samples=SAMPLES, vectorize=vectorize),
        )
        torch.testing.assert_close(found.rows * SAMPLES**0.5, expected)
        torch.testing.assert_close(found.gradient, expected.mean(0))
        assert found.samples == SAMPLES


def test_rows_average_groups_of_samples_across_batches(network, data):
    partition = Partition.from_model(network)
    x, y = data
    losses = [cross_entropy(network(x[i : i + 4]), y[i : i + 4]) for i in range(0, 20, 4)]
    expected = loop_gradients(network, partition, losses)
    found = gradient_rows(
        network,
        in_order(data, 3),
        cross_entropy,
        partition,
        curvature=EmpiricalFisher(samples=SAMPLES, per_row=4),
    )
    assert found.samples == 20  # the incomplete sixth row is dropped
    torch.testing.assert_close(found.rows * 5**0.5, expected)
    torch.testing.assert_close(found.gradient, expected.mean(0))


def test_exact_fisher_is_the_gauss_newton_matrix(network, data):
    partition = Partition.from_model(network, target="classifier.weight")
    x, y = data
    expected = torch.zeros(partition.n, partition.n, dtype=torch.float64)
    for i in range(SAMPLES):
        logits = network(x[i : i + 1])[0]
        jacobian = loop_gradients(network, partition, list(logits))
        p = logits.softmax(0).detach()
        expected += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / SAMPLES
    found = gradient_rows(network, data, cross_entropy, partition, curvature=ExactFisher(samples=SAMPLES))
    assert found.rows.shape == (SAMPLES * CLASSES, partition.n)
    torch.testing.assert_close(found.rows.T @ found.rows, expected)
    mean = loop_gradients(network, partition, [cross_entropy(network(x), y)])[0]
    torch.testing.assert_close(found.gradient, mean)


def test_monte_carlo_fisher_tends_to_the_exact_one(network, data):
    partition = Partition.from_model(network, target="classifier.weight")
    repeated = (data[0].repeat(200, 1, 1, 1), data[1].repeat(200))
    exact = gradient_rows(network, data, cross_entropy, partition, curvature=ExactFisher(samples=SAMPLES))
    drawn = gradient_rows(
        network, repeated, cross_entropy, partition, curvature=MonteCarloFisher(samples=200 * SAMPLES)
    )
    wanted, found = exact.rows.T @ exact.rows, drawn.rows.T @ drawn.rows
    assert torch.linalg.norm(found - wanted) < 0.1 * torch.linalg.norm(wanted)
    torch.testing.assert_close(drawn.gradient, exact.gradient)


@pytest.mark.parametrize("curvature", ["empirical_fisher", "exact_fisher", "monte_carlo_fisher"])
def test_rows_do_not_depend_on_the_memory_limit(network, data, curvature):
    partition = Partition.from_model(network)
    limits = (1, 40_000, 100_000, 1 << 28)
    first, *others = [
        gradient_rows(
            network,
            data,
            cross_entropy,
            partition,
            curvature=FISHERS[curvature](samples=20),
            resources=Resources(chunk_memory=limit),
        )
        for limit in limits
    ]
    for other in others:
        torch.testing.assert_close(other.rows, first.rows)
        torch.testing.assert_close(other.gradient, first.gradient)


@pytest.mark.parametrize("kind", [EmpiricalFisher, MonteCarloFisher])
def test_averaged_rows_do_not_depend_on_the_memory_limit(network, data, kind):
    partition = Partition.from_model(network)
    tight, ample = (
        gradient_rows(
            network,
            data,
            cross_entropy,
            partition,
            curvature=kind(samples=20, per_row=10),
            resources=Resources(chunk_memory=limit),
        )
        for limit in (1, 1 << 28)
    )
    torch.testing.assert_close(tight.rows, ample.rows)
    torch.testing.assert_close(tight.gradient, ample.gradient)


class LargestTemporary(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, the rows apart."""

    def __init__(self, rows_bytes: int) -> None:
        super().__init__()
        self.rows_bytes, self.found = rows_bytes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, Tensor) and item.untyped_storage().nbytes() != self.rows_bytes:
                self.found = max(self.found, item.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("curvature", ["empirical_fisher", "exact_fisher"])
def test_temporaries_stay_below_the_memory_limit(network, data, curvature):
    partition = Partition.from_model(network)
    rows_bytes = 8 * partition.n * SAMPLES * (CLASSES if curvature == "exact_fisher" else 1)
    largest = []
    for limit in (60_000, 1 << 28):
        with LargestTemporary(rows_bytes) as seen:
            gradient_rows(
                network,
                in_order(data),
                cross_entropy,
                partition,
                curvature=FISHERS[curvature](samples=SAMPLES),
                resources=Resources(chunk_memory=limit),
            )
        largest.append(seen.found)
    assert largest[0] <= 60_000 // 2
    assert largest[1] > largest[0]


def test_a_seed_draws_the_samples_and_a_loader_keeps_its_order(network, data):
    partition = Partition.from_model(network)
    rows = [
        gradient_rows(
            network, data, cross_entropy, partition, curvature=EmpiricalFisher(samples=7), seed=s
        ).rows
        for s in (3, 3, 4)
    ]
    assert torch.equal(rows[0], rows[1])
    assert not torch.allclose(rows[0], rows[2])
    everything = gradient_rows(
        network, in_order(data), cross_entropy, partition, curvature=EmpiricalFisher(samples=SAMPLES)
    ).rows
    ordered = gradient_rows(
        network, in_order(data), cross_entropy, partition, curvature=EmpiricalFisher(samples=7)
    ).rows
    torch.testing.assert_close(ordered * 7**0.5, everything[:7] * SAMPLES**0.5)
    distances = torch.cdist(rows[0] * 7**0.5, everything * SAMPLES**0.5)
    assert len(set(distances.argmin(1).tolist())) == 7  # without replacement


def test_fewer_samples_than_asked_for_are_all_used_with_a_warning(network, data, caplog):
    partition = Partition.from_model(network)
    for source in (data, in_order(data)):
        caplog.clear()
        found = gradient_rows(
            network, source, cross_entropy, partition, curvature=EmpiricalFisher(samples=1000)
        )
        assert found.samples == SAMPLES
        assert found.rows.shape[0] == SAMPLES
        assert "23 samples used where 1000 were asked for" in caplog.text


def test_any_loss_and_structured_inputs():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 1), nn.Linear(2, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) + self.right(b)

    torch.manual_seed(0)
    model, a, b, y = Sum().eval(), torch.randn(6, 3), torch.randn(6, 2), torch.randn(6, 1)
    partition = Partition.from_model(model)
    residual = (model(a, b) - y).detach()
    expected = 2 * residual * torch.cat([a, b], dim=1)
    for inputs in ((a, b), {"a": a, "b": b}):
        found = gradient_rows(model, [(inputs, y)], mse_loss, partition, curvature=EmpiricalFisher(samples=6))
        torch.testing.assert_close(found.rows * 6**0.5, expected)


def test_the_network_is_left_as_it_was(network, data):
    partition = Partition.from_model(network)
    network.classifier.train()  # harmless: linear layers do not care
    before = copy.deepcopy(network.state_dict())
    marks = [torch.ones_like(p) for p in network.parameters()]
    for parameter, mark in zip(network.parameters(), marks, strict=True):
        parameter.grad = mark
    found = gradient_rows(network, data, cross_entropy, partition, curvature=ExactFisher(samples=5))
    assert not found.rows.requires_grad
    assert not found.gradient.requires_grad
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(p.grad is mark for p, mark in zip(network.parameters(), marks, strict=True))
    assert all(p.requires_grad for p in network.parameters())
    assert network.classifier.training
    assert not network.training


def test_rows_are_in_single_precision_at_least():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).to(torch.bfloat16).eval()
    data = (torch.randn(5, 4, dtype=torch.bfloat16), torch.tensor([0, 1, 2, 0, 1]))
    partition = Partition.from_model(model)
    found = gradient_rows(model, data, cross_entropy, partition, curvature=EmpiricalFisher(samples=5))
    assert found.rows.dtype == torch.float32


def test_fisher_blocks_are_views_with_the_weights_and_gradient(network, data):
    blocks = fisher_blocks(
        network,
        data,
        loss_fn=cross_entropy,
        partition="row",
        curvature=EmpiricalFisher(samples=9),
        damping=0.25,
    )
    partition = Partition.from_model(network)
    whole = gradient_rows(network, data, cross_entropy, partition, curvature=EmpiricalFisher(samples=9))
    assert torch.equal(torch.cat([block.weights for block in blocks]), partition.flatten(network))
    assert torch.equal(torch.cat([block.gradient for block in blocks]), whole.gradient)
    assert len({block.hessian.data.untyped_storage().data_ptr() for block in blocks}) == 1
    problem = blocks[4].to_problem(2)
    expected = whole.rows.T @ whole.rows
    span = Partition.from_model(network, blocks="row").blocks[4]
    part = slice(span.start, span.stop)
    dense = expected[part, part] + 0.25 * torch.eye(blocks[4].n)
    torch.testing.assert_close(torch.from_numpy(problem.dense_hessian()), dense)
    with pytest.raises(ArgumentError, match="damping"):
        fisher_blocks(network, data, loss_fn=cross_entropy, damping=-1.0)
    with pytest.raises(ArgumentError, match="beside a Partition"):
        fisher_blocks(network, data, loss_fn=cross_entropy, partition=partition, target="conv*")


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.1), nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)]
)
def test_training_mode_is_refused(layer):
    model = nn.Sequential(nn.Linear(4, 3), layer)
    data = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    with pytest.raises(TrainingModeError, match="1 "):
        gradient_rows(
            model, data, cross_entropy, Partition.from_model(model), curvature=EmpiricalFisher(samples=5)
        )


def test_harmless_training_mode_is_accepted():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.0), nn.LayerNorm(3)).train()
    data = (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))
    assert (
        gradient_rows(
            model, data, cross_entropy, Partition.from_model(model), curvature=EmpiricalFisher(samples=5)
        ).samples
        == 5
    )


def test_labels_out_of_range(network, data):
    partition = Partition.from_model(network)
    for wrong in (CLASSES, -1):
        labels = data[1].clone()
        labels[-1] = wrong
        for curvature in ("empirical_fisher", "exact_fisher"):
            with pytest.raises(LabelRangeError, match="4 outputs"):
                gradient_rows(
                    network, (data[0], labels), cross_entropy, partition, curvature=FISHERS[curvature]()
                )


def test_nan_gradients_name_row_and_parameter(network, data):
    x = data[0].clone()
    x[7] = float("nan")
    partition = Partition.from_model(network)
    with pytest.raises(NonFiniteGradientError, match=r"row 7 .*conv\.weight"):
        gradient_rows(
            network,
            in_order((x, data[1])),
            cross_entropy,
            partition,
            curvature=EmpiricalFisher(samples=SAMPLES),
        )


def test_data_errors(network, data):
    partition = Partition.from_model(network)

    def breaking():
        yield from list(in_order(data))[:2]
        raise OSError("disk gone")

    with pytest.raises(DataLoaderError, match=r"^data: raised OSError at batch 2: disk gone") as caught:
        gradient_rows(network, breaking(), cross_entropy, partition)
    assert isinstance(caught.value.__cause__, OSError)
    for empty in ([], (data[0][:0], data[1][:0])):
        with pytest.raises(EmptyDataError):
            gradient_rows(network, empty, cross_entropy, partition)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: EmpiricalFisher(samples=0), "curvature.samples"),
        (lambda: SketchedFisher(samples=True), "curvature.samples"),
        (lambda: EmpiricalFisher(samples=5, per_row=6), "curvature.per_row"),
        (lambda: MonteCarloFisher(vectorize=1), "curvature.vectorize"),
        (lambda: Resources(chunk_memory=0), "resources.chunk_memory"),
    ],
)
def test_records_refuse_what_makes_no_sense(make, argument):
    with pytest.raises(ArgumentError) as caught:
        make()
    assert caught.value.argument == argument


def test_unusable_options(network, data):
    partition = Partition.from_model(network)
    for wrong in ("hessian", "exact_fisher", None, EmpiricalFisher):
        with pytest.raises(ArgumentError, match=r"curvature: .* pass one of EmpiricalFisher"):
            gradient_rows(network, data, cross_entropy, partition, curvature=wrong)
    keep = torch.ones(partition.n, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="row_memory: given beside keep"):
        gradient_rows(
            network, data, cross_entropy, partition, keep=keep, resources=Resources(row_memory=1 << 20)
        )
    with pytest.raises(ArgumentError, match="loss_fn: returned shape"):
        gradient_rows(network, data, lambda o, y: cross_entropy(o, y, reduction="none"), partition)
    regression, pair = nn.Linear(3, 1), (torch.randn(4, 3), torch.randn(4, 1))
    with pytest.raises(UnsupportedProblemError, match="exact_fisher"):
        gradient_rows(regression, pair, mse_loss, Partition.from_model(regression), curvature=ExactFisher())
