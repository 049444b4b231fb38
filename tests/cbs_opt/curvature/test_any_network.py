"""Gradients of networks that torch.func cannot follow, and networks that are as before afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from cbs_opt.curvature.fisher import gradient_rows
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, Fisher, MonteCarloFisher, SketchedFisher
from cbs_opt.curvature.layer_inputs import input_moments
from cbs_opt.errors import ForwardError, LossError, NonFiniteGradientError, PerSampleGradientError
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.network.trial import write_back
from formulations.errors import ArgumentError

SAMPLES, CLASSES = 8, 3
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 2, 1])


class Made(nn.Module):
    """A network of some layers, whose forward pass is a function of it and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("trace", torch.zeros(4))
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Doubled(torch.autograd.Function):
    """In the old style, without `setup_context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return 2 * slopes[0]


class Unfinished(Doubled):
    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        raise RuntimeError("not written yet")


def branching(net: Any, x: Tensor) -> Tensor:
    return net.head(x) if x[0, 0] > 0 else -net.head(x)


def by_number(net: Any, x: Tensor) -> Tensor:
    return net.head(x) * (2.0 if x.abs().max().item() > 0 else 1.0)


def checkpointed(net: Any, x: Tensor, *, reentrant: bool = False) -> Tensor:
    hidden = checkpoint(lambda h: torch.tanh(net.body(h)), net.body(x), use_reentrant=reentrant)
    return net.head(hidden)


def counting(net: Any, x: Tensor) -> Tensor:
    net.count += 1
    return net.head(x)


def remembering(net: Any, x: Tensor) -> Tensor:
    net.trace = 0.9 * net.trace + 0.1 * x.mean(0)
    net.last = net.fresh = x
    net.seen.append(x)
    return net.head(x)


def recurrent(net: Any, x: Tensor) -> Tensor:
    return net.head(net.body(x)[0][:, -1])


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    return net.head(net.body(rows)[1][0][-1])


def squeezed(net: Any, x: Tensor) -> Tensor:
    return net.head(x).squeeze()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network with what it takes, and whether samples can be taken at once."""

    run: Callable[..., Any]
    body: Callable[[], nn.Module] | None = None
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (torch.randn(SAMPLES, 4),)
    outputs: int = CLASSES
    loops: bool = True


CASES = {
    "branching": Case(run=branching),
    "item": Case(run=by_number),
    "old function": Case(run=lambda net, x: net.head(Doubled.apply(x * net.head.weight.mean()))),
    "checkpoint": Case(run=checkpointed, body=lambda: nn.Linear(4, 4)),
    "counter": Case(run=counting),
    "memory": Case(run=remembering, loops=False),
    "GRU": Case(
        run=recurrent,
        body=lambda: nn.GRU(4, 4, batch_first=True),
        inputs=lambda: (torch.randn(SAMPLES, 5, 4),),
    ),
    "LSTM": Case(
        run=recurrent,
        body=lambda: nn.LSTM(4, 4, batch_first=True),
        inputs=lambda: (torch.randn(SAMPLES, 5, 4),),
        loops=False,
    ),
    "packed": Case(
        run=packed,
        body=lambda: nn.LSTM(4, 4, batch_first=True),
        inputs=lambda: (torch.randn(SAMPLES, 5, 4), torch.tensor([5, 1, 3, 2, 5, 4, 1, 2])),
    ),
    "squeeze": Case(run=squeezed, loops=False),
    "squeezed to numbers": Case(run=squeezed, outputs=1, loops=False),
}


def build(case: Case) -> tuple[Made, tuple[Tensor, ...], Tensor]:
    torch.manual_seed(0)
    body = {} if case.body is None else {"body": case.body()}
    model = Made(case.run, head=nn.Linear(4, case.outputs), **body).eval()
    labels = LABELS if case.outputs > 1 else torch.randn(SAMPLES)
    return model, case.inputs(), labels


def by_hand(case: Case, model: nn.Module, inputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Gradients of single samples by ordinary backward passes, (B, n)."""
    partition = Partition.from_model(model, blocks="global")
    rows = []
    for i in range(SAMPLES):
        output = model(*(x[i : i + 1] for x in inputs)).reshape(1, -1)
        loss = mse_loss(output[:, 0], labels[i : i + 1])
        if case.outputs > 1:
            loss = cross_entropy(output, labels[i : i + 1])
        found = torch.autograd.grad(loss, list(partition.tensors(model).values()))
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


def rows_of(model: nn.Module, data: Any, curvature: Fisher | None = None, loss: Any = None) -> Tensor:
    chosen = EmpiricalFisher(samples=SAMPLES) if curvature is None else curvature
    partition = Partition.from_model(model, blocks="global")
    return gradient_rows(model, data, loss, partition, curvature=chosen, progress=False).rows


@pytest.mark.parametrize("name", CASES)
def test_samples_are_differentiated_whatever_the_network_does(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES[name]
    model, inputs, labels = build(case)
    expected = by_hand(case, copy.deepcopy(model), inputs, labels)
    before = copy.deepcopy(model.state_dict())
    objective = Objective(None if case.outputs > 1 else mse_loss)
    for _ in range(2):
        found = rows_of(model, [(*inputs, labels)], loss=objective)
        torch.testing.assert_close(found * SAMPLES**0.5, expected)
    assert objective.vectorized != case.loops
    assert caplog.text.count("one by one") == case.loops
    whole = evaluate(model, [(*inputs, labels)], objective, batch_size=7)  # the last batch has one sample
    assert whole.samples == SAMPLES
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.last is None
    assert not hasattr(model, "fresh")
    assert model.seen == []
    copy.deepcopy(model)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("per_row", [1, 4])
def test_rows_at_other_weights_are_those_of_a_network_that_has_them(name: str, per_row: int) -> None:
    """In the backward pass too, where parts may run once more."""
    case = CASES[name]
    model, inputs, labels = build(case)
    partition = Partition.from_model(model, blocks="global")
    weights = 0.5 * partition.flatten(model)
    options: dict[str, Any] = {
        "curvature": EmpiricalFisher(samples=SAMPLES, per_row=per_row),
        "weights": weights,
        "progress": False,
    }
    loss = None if case.outputs > 1 else mse_loss
    found = gradient_rows(model, [(*inputs, labels)], loss, partition, **options)
    write_back(model, partition, weights)
    torch.testing.assert_close(found.rows, rows_of(model, [(*inputs, labels)], options["curvature"], loss))


@pytest.mark.parametrize("name", ["branching", "GRU", "counter"])
@pytest.mark.parametrize("kind", [ExactFisher, MonteCarloFisher, SketchedFisher, EmpiricalFisher])
def test_every_curvature_has_a_way_around(name: str, kind: type[Fisher]) -> None:
    """As often as not the network can be written so that torch.func follows: the rows are then the same."""
    model, inputs, labels = build(CASES[name])
    objective = Objective()
    objective.vectorized = False
    data = [(*inputs, labels)]
    looped = rows_of(model, data, kind(samples=SAMPLES), objective)
    by_itself = rows_of(model, data, kind(samples=SAMPLES))
    torch.testing.assert_close(looped, by_itself)
    plain, x = (
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).eval(),
        torch.randn(SAMPLES, 4),
    )
    again = Objective()
    again.vectorized = False
    torch.testing.assert_close(
        rows_of(plain, (x, labels), kind(samples=SAMPLES), again),
        rows_of(plain, (x, labels), kind(samples=SAMPLES)),
    )


@pytest.mark.parametrize("per_row", [1, 3])
def test_buffers_and_attributes_return_after_an_error(per_row: int) -> None:
    model, (x,), labels = build(CASES["memory"])
    before = copy.deepcopy(model.state_dict())
    x[5] = torch.nan
    curvature = EmpiricalFisher(samples=SAMPLES, per_row=per_row)
    with pytest.raises(NonFiniteGradientError, match=r"of sample 5, with NaN or infinite inputs"):
        rows_of(model, [(x, labels)], curvature)
    with pytest.raises(LossError):
        evaluate(model, [(x, labels)], lambda o, y: o)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.last is None
    assert model.seen == []
    copy.deepcopy(model)


def test_layer_inputs_leave_buffers_and_take_what_rows_take() -> None:
    model, (x,), labels = build(CASES["memory"])
    before = copy.deepcopy(model.state_dict())
    objective = Objective()
    data = (x.double().numpy(), labels.numpy())
    rows_of(model, data, loss=objective)
    partition = Partition.from_model(model)
    found = input_moments(model, data, partition, samples=SAMPLES, objective=objective)
    torch.testing.assert_close(found["head.weight"], (x.T @ x / SAMPLES).double())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ForwardError, match="float32"):
        input_moments(model, (x[:, :3], labels), partition)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_network_is_taken_one_by_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).eval(), torch.randn(SAMPLES, 4)
    scripted = torch.jit.script(model)
    assert evaluate(scripted, (x, LABELS)) == evaluate(model, (x, LABELS))
    curvature = EmpiricalFisher(samples=SAMPLES)
    one, other = (
        gradient_rows(
            network,
            (x, LABELS),
            None,
            Partition.from_model(network, target="0.weight"),
            curvature=curvature,
            progress=False,
        )
        for network in (scripted, model)
    )
    torch.testing.assert_close(one.rows, other.rows)


def test_a_hook_on_a_weight_does_not_change_its_gradient() -> None:
    model, x = nn.Linear(4, 3), torch.randn(SAMPLES, 4)
    curvature = EmpiricalFisher(samples=SAMPLES, per_row=4)
    before = rows_of(model, (x, LABELS), curvature)
    model.weight.register_hook(torch.zeros_like)
    assert torch.equal(rows_of(model, (x, LABELS), curvature), before)


def test_what_carries_a_graph_of_its_own_is_cut_off() -> None:
    torch.manual_seed(0)
    model, teacher, x = nn.Linear(4, 3), nn.Linear(3, 3), torch.randn(SAMPLES, 4)

    def distilled(output: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(output, teacher(torch.ones_like(output)))

    tied = (x * nn.Parameter(torch.ones(4)), LABELS)
    for per_row in (1, 2):
        curvature = EmpiricalFisher(samples=SAMPLES, per_row=per_row)
        found = rows_of(model, tied, curvature, distilled)
        assert not found.requires_grad
        assert found.isfinite().all()
    assert teacher.weight.grad is None
    assert torch.equal(rows_of(model, tied), rows_of(model, (x, LABELS)))


class Numbered(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.x[number], LABELS[number]


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(self.x, LABELS, strict=True))


class Named(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "pair": lambda x: (x, LABELS),
    "arrays": lambda x: (x.numpy(), LABELS.numpy()),
    "lists": lambda x: [(x.tolist(), LABELS.tolist())],
    "int32": lambda x: (x, LABELS.int()),
    "columns": lambda x: (x, LABELS.unsqueeze(1)),
    "scalar tensors": lambda x: [(x, list(LABELS))],
    "float64": lambda x: (x.double(), LABELS),
    "mapping": lambda x: {"x": x, "labels": LABELS},
    "mappings": lambda x: [{"x": x[:3], "labels": LABELS[:3]}, {"x": x[3:], "labels": LABELS[3:]}],
    "mapping and labels": lambda x: [({"x": x}, LABELS)],
    "loader": lambda x: DataLoader(TensorDataset(x, LABELS), batch_size=3),
    "dataset": Numbered,
    "tensor dataset": lambda x: TensorDataset(x, LABELS),
    "iterable dataset": Streamed,
    "generator": lambda x: (pair for pair in [(x[:5], LABELS[:5]), (x[5:], LABELS[5:])]),
    "inputs that require gradients": lambda x: (x.clone().requires_grad_(), LABELS),
}


@pytest.mark.parametrize("form", FORMS)
def test_data_may_have_any_form(form: str) -> None:
    torch.manual_seed(0)
    model, x = Named(nn.Linear(4, CLASSES)), torch.randn(SAMPLES, 4)
    expected = rows_of(model, (x, LABELS))
    found = rows_of(model, FORMS[form](x))
    torch.testing.assert_close(found.T @ found, expected.T @ expected)


def test_a_data_set_is_drawn_from_like_tensors() -> None:
    model, x = Named(nn.Linear(4, CLASSES)), torch.randn(SAMPLES, 4)
    curvature = EmpiricalFisher(samples=5)
    torch.testing.assert_close(rows_of(model, Numbered(x), curvature), rows_of(model, (x, LABELS), curvature))


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 3)


BAD: dict[str, tuple[Callable[[], tuple[nn.Module, Any, Any]], type[Exception], str]] = {
    "width": (
        lambda: (nn.Linear(5, 3), (torch.randn(8, 4), LABELS), None),
        ForwardError,
        r"network raised RuntimeError for float32 \(4, 4\): mat1 and mat2",
    ),
    "keyword": (
        lambda: (Named(nn.Linear(4, 3)), {"pixels": torch.randn(8, 4), "labels": LABELS}, None),
        ForwardError,
        r"raised TypeError for \{pixels: float32 \(4, 4\), labels: int64 \(4,\)\}.*unexpected keyword",
    ),
    "meta": (
        lambda: (nn.Linear(4, 3, device="meta"), (torch.randn(8, 4), LABELS), None),
        ArgumentError,
        "^model: weight is on the meta device.*load its weights",
    ),
    "lazy": (
        lambda: (
            nn.Sequential(nn.Linear(4, 3), nn.LazyBatchNorm1d()).eval(),
            (torch.randn(8, 4), LABELS),
            None,
        ),
        ArgumentError,
        "^model: 1.weight is lazy.*run one forward pass",
    ),
    "inference mode": (
        lambda: (made_in_inference_mode(), (torch.randn(8, 4), LABELS), None),
        ArgumentError,
        "^model: weight was made under torch.inference_mode",
    ),
    "no gradient": (
        lambda: (
            Made(torch.no_grad()(lambda net, x: net.head(x)), head=nn.Linear(4, 3)),
            (torch.randn(8, 4), LABELS),
            None,
        ),
        LossError,
        "the loss does not depend on the weights",
    ),
    "one output": (
        lambda: (nn.Linear(4, 1), (torch.randn(8, 4), LABELS * 0), cross_entropy),
        LossError,
        "every gradient is zero: the network has one output.*binary_cross_entropy_with_logits",
    ),
    "at the minimum": (
        lambda: (nn.Linear(4, 3, bias=False), (torch.zeros(8, 4), LABELS), cross_entropy),
        LossError,
        "every gradient is zero",
    ),
    "reentrant checkpoint": (
        lambda: (
            Made(partial(checkpointed, reentrant=True), head=nn.Linear(4, 3), body=nn.Linear(4, 4)),
            (torch.randn(8, 4), LABELS),
            None,
        ),
        PerSampleGradientError,
        "no backward pass .*use_reentrant=False",
    ),
    "no backward pass": (
        lambda: (
            Made(lambda net, x: Unfinished.apply(net.head(x)), head=nn.Linear(4, 3)),
            (torch.randn(8, 4), LABELS),
            None,
        ),
        PerSampleGradientError,
        "no backward pass .*not written yet",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("per_row", [1, 2])
def test_what_cannot_be_differentiated_is_named(name: str, per_row: int) -> None:
    make, error, message = BAD[name]
    model, data, loss = make()
    with pytest.raises(error, match=message):
        rows_of(model, data, EmpiricalFisher(samples=SAMPLES, per_row=per_row), loss)


def test_a_call_under_inference_mode_is_refused_and_its_data_are_taken() -> None:
    model = nn.Linear(4, 3)
    with torch.inference_mode():
        x = torch.randn(SAMPLES, 4) + 1
        with pytest.raises(ArgumentError, match=r"^model: called under torch\.inference_mode"):
            rows_of(model, (x, LABELS))
    assert rows_of(model, (x, LABELS)).isfinite().all()
    with torch.no_grad():
        assert rows_of(model, (x, LABELS)).isfinite().all()


def test_a_default_device_elsewhere_is_named() -> None:
    model, x = nn.Linear(4, 3), torch.randn(SAMPLES, 4)
    torch.set_default_device("meta")
    try:
        with pytest.raises(
            ArgumentError, match=r"^model: a network on cpu, but .*set_default_device says meta"
        ):
            rows_of(model, (x, LABELS))
    finally:
        torch.set_default_device("cpu")


def small_bert(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        **options,
    )
    return transformers.BertForSequenceClassification(config).eval()


def encoded() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = (torch.arange(6) < torch.tensor([6, 3, 4, 5, 6, 2, 3, 6]).unsqueeze(1)).long()
    return {"input_ids": torch.randint(20, (SAMPLES, 6)), "attention_mask": mask, "labels": LABELS}


def test_a_network_of_hugging_face_is_taken_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    model, batch = small_bert(num_labels=CLASSES), encoded()
    partition = Partition.from_model(model, blocks="global")
    loss = model(**batch).loss
    wanted = torch.autograd.grad(loss, list(partition.tensors(model).values()), allow_unused=True)
    parts = zip(partition.parameters, wanted, strict=True)
    expected = torch.cat(
        [torch.zeros(span.shape).flatten() if g is None else g.flatten() for span, g in parts]
    )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    halves = [{key: value[i : i + 4] for key, value in batch.items()} for i in (0, 4)]
    named = [(inputs, LABELS)]
    for data, given in (
        (batch, None),
        ([transformers.BatchEncoding(half) for half in halves], None),
        ([half | {"output_attentions": False, "inputs_embeds": None} for half in halves], None),
        (named, None),
        (named, lambda output, y: cross_entropy(output.logits, y)),
        (batch, lambda output, y: cross_entropy(output.logits, y)),
    ):
        chosen = EmpiricalFisher(samples=SAMPLES)
        found = gradient_rows(model, data, given, partition, curvature=chosen, progress=False)
        torch.testing.assert_close(found.gradient, expected, rtol=1e-4, atol=1e-6)
        measured = evaluate(model, data, given)
        assert measured.loss == pytest.approx(float(loss.detach()), rel=1e-5)
        assert measured.accuracy is not None
    with pytest.raises(LossError, match=r"SequenceClassifierOutput\{.*output\.logits"):
        evaluate(model, named, cross_entropy)
