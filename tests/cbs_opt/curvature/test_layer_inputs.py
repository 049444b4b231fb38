"""Second moments of layer inputs: w.A w is the mean squared response of the layer itself to weights w."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.data import DataLoader, TensorDataset

import cbs_opt as cbs
from cbs_opt.curvature import input_recorder
from cbs_opt.curvature.layer_inputs import input_moments, matched_term, with_layer_inputs
from cbs_opt.network.partition import Partition
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

SAMPLES = 12


def inputs(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SAMPLES, *shape, generator=generator)


def labels() -> Tensor:
    return torch.zeros(SAMPLES, dtype=torch.int64)


def moments_of(layer: nn.Module, x: Tensor, **options: Any) -> Tensor:
    model = nn.Sequential(layer).eval()
    return input_moments(model, (x, labels()), Partition.from_model(model), samples=SAMPLES, **options)[
        "0.weight"
    ]


def mean_squared_responses(layer: nn.Module, x: Tensor) -> Tensor:
    """Of every output channel, summed over positions, without the bias; (channels,) float64."""
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        y = layer(x).double()
    y = y.movedim(-1, 1) if isinstance(layer, nn.Linear) else y
    return y.flatten(2).square().sum(2).mean(0) if y.ndim > 2 else y.square().mean(0)


CONVOLUTIONS: tuple[dict[str, Any], ...] = (
    {"stride": 2, "padding": 1},
    {"padding": (2, 0), "dilation": (2, 1)},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "groups": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": 2, "padding_mode": "circular", "stride": (1, 2), "groups": 4},
)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_moments_of_a_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    layer = nn.Conv2d(4, 8, (3, 2) if options.get("padding_mode") is None else 3, **options)
    x = inputs(4, 7, 6)
    found = moments_of(layer, x).reshape(layer.groups, -1, layer.weight[0].numel())
    filters = layer.weight.detach().double().flatten(1).view(layer.groups, -1, found.shape[-1])
    quadratic = torch.einsum("gci,gij,gcj->gc", filters, found, filters).flatten()
    torch.testing.assert_close(quadratic, mean_squared_responses(layer, x), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("padding", [0, 2, "same"])
def test_moments_of_a_convolution_over_sequences(padding: int | str) -> None:
    torch.manual_seed(1)
    layer = nn.Conv1d(3, 5, 3, padding=padding, padding_mode="reflect")
    x = inputs(3, 9)
    filters = layer.weight.detach().double().flatten(1)
    quadratic = torch.einsum("ci,ij,cj->c", filters, moments_of(layer, x), filters)
    torch.testing.assert_close(quadratic, mean_squared_responses(layer, x), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_moments_of_a_linear_layer_sum_over_tokens(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    layer, x = nn.Linear(6, 4), inputs(*shape)
    filters = layer.weight.detach().double()
    quadratic = torch.einsum("ci,ij,cj->c", filters, moments_of(layer, x), filters)
    torch.testing.assert_close(quadratic, mean_squared_responses(layer, x), rtol=1e-5, atol=1e-9)


def test_moments_are_positive_semidefinite_symmetric_and_the_same_every_time() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1)
    first = moments_of(layer, inputs(4, 5, 5))
    assert torch.equal(first, moments_of(layer, inputs(4, 5, 5)))
    torch.testing.assert_close(first, first.T)
    assert float(torch.linalg.eigvalsh(first)[0]) > -1e-6 * float(first.diagonal().max())


def test_moments_grow_with_the_square_of_the_inputs() -> None:
    layer, x = nn.Linear(6, 4), inputs(6)
    torch.testing.assert_close(moments_of(layer, 4.0 * x), 16.0 * moments_of(layer, x))


def test_patches_in_small_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Conv2d(4, 6, 3, padding=1), inputs(4, 5, 5)
    whole = moments_of(layer, x)
    monkeypatch.setattr(input_recorder, "PATCH_NUMBERS", 1)
    torch.testing.assert_close(moments_of(layer, x), whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_moments_in_other_precisions(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(6, 4), inputs(5, 6)
    expected = moments_of(layer, x)
    found = moments_of(layer.to(dtype), x.to(dtype))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.diagonal().max()))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear over tokens": (lambda: nn.Linear(3, 2), (7, 3)),
    "convolution": (lambda: nn.Conv2d(2, 2, 2, stride=(1, 2), padding=1), (2, 5, 4)),
    "groups": (lambda: nn.Conv1d(4, 4, 2, groups=2, dilation=2), (4, 9)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=2), (2, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_over_drawn_positions_is_the_moment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = make(), inputs(*shape)
    exact = moments_of(layer, x)
    monkeypatch.setattr(input_recorder, "VECTORS", 4)
    model, data = nn.Sequential(layer).eval(), (x, labels())
    partition = Partition.from_model(model)
    found = [input_moments(model, data, partition, samples=SAMPLES, seed=s)["0.weight"] for s in range(150)]
    assert not found[0].equal(found[1])
    assert found[0].equal(moments_of(layer, x, seed=0))
    errors = torch.stack([(one - exact).norm() / exact.norm() for one in found])
    mean = torch.stack(found).mean(dim=0)
    assert float((mean - exact).norm() / exact.norm()) < 3.0 * float(errors.mean()) / len(found) ** 0.5


@pytest.mark.parametrize("shape", [(2000, 6), (6,)])
def test_vectors_are_enough_or_all(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(6, 4), inputs(*shape)
    found = moments_of(layer, x)
    monkeypatch.setattr(input_recorder, "VECTORS", 1 << 20)
    exact = moments_of(layer, x)
    assert found.equal(exact) == (shape == (6,))
    torch.testing.assert_close(found, exact, rtol=0.0, atol=0.25 * float(exact.diagonal().max()))


def test_data_of_unknown_length_give_as_many_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader says how many there are; of other batches every one counts as if it were the last."""
    layer, x = nn.Linear(6, 4), inputs(500, 6)
    model = nn.Sequential(layer).eval()
    partition = Partition.from_model(model)
    monkeypatch.setattr(input_recorder, "VECTORS", 20)
    drawn: list[int] = []
    draw = input_recorder.InputRecorder._drawn

    def counting(self: Any, count: int, of: int, device: torch.device) -> Tensor:
        drawn.append(count)
        return draw(self, count, of, device)

    monkeypatch.setattr(input_recorder.InputRecorder, "_drawn", counting)
    pairs = list(zip(x.split(4), labels().split(4), strict=True))
    loader = DataLoader(TensorDataset(x, labels()), batch_size=4)
    for data, counts in ((loader, [40, 40, 40]), (pairs, [120, 60, 40])):
        drawn.clear()
        input_moments(model, data, partition, samples=SAMPLES)
        assert drawn == counts


WINDOWS: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    ((5,), (3,), (2,), (1,)),
    ((5, 6), (3, 2), (1, 2), (2, 1)),
    ((4, 5, 3), (2, 1, 3), (1, 1, 1), (1, 2, 1)),
)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("shape", "kernel", "dilation", "stride"), WINDOWS)
def test_patches_at_places_are_those_of_the_whole(
    shape: tuple[int, ...],
    kernel: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    backwards: bool,
) -> None:
    x = inputs(4, *shape)
    windows = input_recorder._Windows(kernel=kernel, dilation=dilation, stride=stride, backwards=backwards)
    every = windows.all(x, 2)
    places = torch.randperm(every.shape[2], generator=torch.Generator().manual_seed(0))
    some = windows.some(x.movedim(1, -1), 2, places)
    chosen = every[:, :, places]
    torch.testing.assert_close(windows.by_channels(some.mT @ some), chosen @ chosen.mT)


def test_what_is_not_finite_is_seen_where_it_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_recorder, "VECTORS", 1)
    for layer, shape in ((nn.Linear(3, 2), (50, 3)), (nn.Conv1d(3, 2, 1), (3, 50))):
        for seed in range(3):
            x = inputs(*shape)
            x.view(-1)[71] = torch.nan
            with pytest.raises(NonFiniteError, match="inputs of"):
                moments_of(layer, x, seed=seed)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_moments_of_drawn_positions_neither_vanish_nor_overflow(size: float) -> None:
    layer, x = nn.Linear(6, 4), inputs(2000, 6)
    torch.testing.assert_close(
        moments_of(layer, size * x) / size**2, moments_of(layer, x), rtol=1e-4, atol=1e-2
    )


class Tied(nn.Module):
    """One matrix used by two layers, and one layer called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5, bias=False)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(input=self.second(self.first(x).relu()).relu())
        return y


def test_uses_of_tied_weights_are_added_up_and_unused_layers_left_out() -> None:
    torch.manual_seed(2)
    model, x = Tied().eval(), inputs(5)
    found = input_moments(model, (x, labels()), Partition.from_model(model), samples=SAMPLES)
    hidden = model.first(x).relu().detach()
    expected = (x.T @ x + hidden.T @ hidden).double() / SAMPLES
    torch.testing.assert_close(found["first.weight"], expected, rtol=1e-5, atol=1e-6)
    assert sorted(found) == ["first.weight", "head.weight"]


class Columns(nn.Module):
    """A layer of transformers, whose output channels are columns; found by its name."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


Columns.__name__, Columns.__module__ = "Conv1D", "transformers.pytorch_utils"


class Pair(nn.Module):
    """A bilinear layer of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x.flip(-1))
        return y


class Twice(nn.Module):
    """A matrix of its own, multiplied from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        left = torch.einsum("oi,bti->bto", self.mixing, x)
        return torch.cat([left, (self.mixing @ x.mT).mT], dim=-2)


LINEAR_IN_WEIGHTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear over tokens": (lambda: nn.Linear(4, 3, bias=False), (2, 3, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1), (4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding=1), (3, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=1), (2, 3, 4, 3)),
    "conv3d of groups": (lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 2, 1)), (2, 3, 4, 3)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding=1), (3, 4, 4)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, dilation=2), (3, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(3, 4, (3, 2), stride=(2, 3), padding=(2, 0), output_padding=(1, 0)),
        (3, 4, 3),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 1, 2)),
    "columns": (lambda: Columns(4, 3), (5, 3)),
    "bilinear": (Pair, (3,)),
    "a matrix of its own": (Twice, (4, 5)),
}


@pytest.mark.parametrize("kind", LINEAR_IN_WEIGHTS)
def test_the_term_is_the_curvature_of_the_squared_output(kind: str) -> None:
    """Half the squared output has a Hessian that is block-diagonal over channels: the moments."""
    make, shape = LINEAR_IN_WEIGHTS[kind]
    torch.manual_seed(1)
    model, x = make().eval(), inputs(*shape).double()
    model = model.double()
    partition = Partition.from_model(model)
    (span,) = partition.parameters
    jacobian = jacrev(lambda weight: functional_call(model, {span.name: weight}, (x,)))(
        model.get_parameter(span.name).detach()
    )
    flat = span.flat(jacobian).reshape(-1, partition.n)
    expected = flat.T @ flat / SAMPLES
    moment = input_moments(model, (x, labels()), partition, samples=SAMPLES)[span.name]
    groups = moment.reshape(-1, span.fan_in, span.fan_in)
    blocks = groups.repeat_interleave(span.channels // len(groups), dim=0)
    torch.testing.assert_close(torch.block_diag(*blocks), expected, rtol=1e-9, atol=1e-9)


class Attending(nn.Module):
    """Attention of a batch over itself, or over others."""

    def __init__(self, attention: nn.MultiheadAttention, case: str) -> None:
        super().__init__()
        self.attention, self.case = attention, case

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = 2.0 * x[:, 1:], 3.0 * x[:, 1:]
        return {"self": (x, x, x), "cross": (x, key, key), "apart": (x, key, value)}[self.case]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(*self.sides(x), need_weights=False)[0]
        return y


@pytest.mark.parametrize("case", ["self", "cross", "apart"])
def test_projections_of_attention_are_fed_queries_keys_and_values(case: str) -> None:
    torch.manual_seed(1)
    model = Attending(nn.MultiheadAttention(4, 2, batch_first=True), case).eval()
    x = inputs(3, 4)
    data = x, labels()
    partition = Partition.from_model(model)
    found = input_moments(model, data, partition, samples=SAMPLES)
    expected = [flat.T @ flat / SAMPLES for flat in (s.double().flatten(0, 1) for s in model.sides(x))]
    moment = found["attention.in_proj_weight"].reshape(-1, 4, 4)
    torch.testing.assert_close(moment.repeat_interleave(3 // len(moment), dim=0), torch.stack(expected))
    term = matched_term(found, partition, torch.ones(partition.n))
    assert (term.unseen, term.n) == ((), partition.n)
    squares = term.diagonal()[: 3 * 4 * 4].view(3, 4, 4)
    for part, own in zip(squares, expected, strict=True):
        torch.testing.assert_close(part[1], own.diagonal() / own.diagonal().mean())


def test_padded_batches_do_not_become_nested_tensors() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = True
            y: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])
            return y

    model = Padded().eval()
    partition = Partition.from_model(model)
    fast = torch.backends.mha.get_fastpath_enabled()
    found = input_moments(model, (inputs(4, 8), labels()), partition, samples=SAMPLES)
    assert sorted(found) == sorted(span.name for span in partition.parameters)
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_buffers_are_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            y: Tensor = self.layer(x)
            return y

    model = Counting().eval()
    input_moments(model, (inputs(4), labels()), Partition.from_model(model), samples=SAMPLES)
    assert float(model.calls) == 0.0


def test_padded_positions_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            y: Tensor = (self.layer(x) * attention_mask.unsqueeze(-1)).sum(1)
            return y

    x = inputs(5, 4)
    mask = (torch.arange(5) < torch.arange(SAMPLES).unsqueeze(1) % 5 + 1).long()
    model = Masked().eval()
    batch = {"x": x, "attention_mask": mask}
    moments = input_moments(model, (batch, labels()), Partition.from_model(model), samples=SAMPLES)
    kept = x[mask.bool()].double()
    torch.testing.assert_close(moments["layer.weight"], kept.T @ kept / SAMPLES)


def test_what_is_not_linear_in_its_weights_gets_a_multiple_of_the_identity() -> None:
    torch.manual_seed(0)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 2, batch_first=True)
            self.head = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.lstm(x)[0][:, -1])
            return y

    model = Recurrent().eval()
    partition = Partition.from_model(model, blocks="global")
    x = inputs(5, 3)
    moments = input_moments(model, (x, labels()), partition, samples=SAMPLES)
    assert list(moments) == ["head.weight"]
    squares = torch.arange(1.0, partition.n + 1.0, dtype=torch.float64)
    term = matched_term(moments, partition, squares, weight=2.0)
    assert term.unseen == ("lstm.weight_ih_l0", "lstm.weight_hh_l0")
    first = term.within(0, 3).dense()
    torch.testing.assert_close(first, 2.0 * squares[:3].mean() * torch.eye(3, dtype=torch.float64))


def test_channels_of_groups_take_the_moments_of_their_own_group() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(54, 4)).eval()
    partition = Partition.from_model(model, blocks="row")
    x = inputs(4, 5, 5)
    x[:, 2:] *= 3.0
    moments = input_moments(model, (x, labels()), partition, samples=SAMPLES)
    term = matched_term(moments, partition, torch.ones(partition.n))
    for number in range(6):
        own = moments["0.weight"][number // 3]
        expected = own / own.diagonal().mean()
        block = partition.blocks[number]
        torch.testing.assert_close(term.within(block.start, block.stop).dense(), expected)


def test_dead_inputs_leave_zero_rows_and_a_dead_channel_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        model[0].bias[2] = -1e3
    partition = Partition.from_model(model, blocks="global")
    x = inputs(6)
    x[:, 1] = 0.0
    data = x, torch.arange(SAMPLES) % 3
    rows = cbs.gradient_rows(
        model, data, nn.functional.cross_entropy, partition, curvature=cbs.EmpiricalFisher(samples=SAMPLES)
    )
    found = with_layer_inputs(rows, model, data, partition)
    assert found.channels is not None
    diagonal = found.channels.diagonal()
    assert bool(torch.isfinite(diagonal).all())
    first = diagonal[:30].view(5, 6)
    assert bool((first[2] == 0.0).all())
    assert bool((first[:, 1] == 0.0).all())
    assert bool((first[[0, 1, 3, 4]][:, [0, 2, 3, 4, 5]] > 0.0).all())


def test_moments_of_another_network_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    partition = Partition.from_model(model)
    with pytest.raises(ShapeError, match=r"0\.weight"):
        matched_term({"0.weight": torch.eye(5)}, partition, torch.ones(30))


def test_bad_arguments_are_named() -> None:
    layer = nn.Linear(6, 4)
    model = nn.Sequential(layer).eval()
    with pytest.raises(ArgumentError, match="samples"):
        input_moments(model, (inputs(6), labels()), Partition.from_model(model), samples=0)
    x = inputs(6)
    x[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"inputs of 0\.weight"):
        moments_of(layer, x)
    assert not layer._forward_pre_hooks


def test_autocast_does_not_round_the_sums() -> None:
    """Inputs may come in half precision, but their moments must stay positive semidefinite."""

    class Autocast(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output: Tensor = self.layer(x).float()
            return output

    x = inputs(40).bfloat16().float()
    layer = nn.Linear(40, 3)
    plain = moments_of(layer, x)
    model = Autocast(layer).eval()
    found = input_moments(model, (x, labels()), Partition.from_model(model), samples=SAMPLES)["layer.weight"]
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
