"""The loss of a data set against direct autograd: its value, gradient and rows, however the data are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt.curvature.fisher import Journal, gradient_rows, mean_gradient
from cbs_opt.curvature.kinds import EmpiricalFisher, ExactFisher, Fisher, MonteCarloFisher, SketchedFisher
from cbs_opt.curvature.rows import Rows
from cbs_opt.errors import EmptyDataError, LabelRangeError, LossError, RandomOutputError
from cbs_opt.network.data import Batch
from cbs_opt.network.evaluation import evaluate
from cbs_opt.network.objective import Objective
from cbs_opt.network.partition import Partition
from cbs_opt.system.resources import Resources
from formulations.errors import ArgumentError, UnsupportedProblemError

SAMPLES, CLASSES, TOKENS = 12, 3, 5
WEIGHT = torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
CUTS = ([5, 4, 3], [1] * SAMPLES, [12], [2, 9, 1])

weighted = partial(cross_entropy, weight=WEIGHT)


def linear(outputs: int = CLASSES) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, outputs).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


class Tagger(nn.Module):
    """Classes of every token: (B, T, 4) to (B, C, T), or as a network of Hugging Face has them."""

    def __init__(self, *, own: bool = False, shift: int = 0) -> None:
        super().__init__()
        self.linear, self.own, self.shift = linear(), own, shift

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.linear(x).transpose(1, 2)
        if not self.own:
            return logits
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[..., : TOKENS - self.shift], labels[:, self.shift :])
        return {"loss": loss, "logits": logits}


def plain_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def token_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(SAMPLES, TOKENS, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (SAMPLES, TOKENS), generator=generator)
    return x, y.masked_fill(torch.rand(SAMPLES, TOKENS, generator=generator) < 0.4, -100)


def some_ignored(label: int = -100) -> tuple[Tensor, Tensor]:
    x, y = plain_data()
    return x, torch.where(torch.arange(SAMPLES) % 5 == 1, label, y)


def as_mapping() -> dict[str, Tensor]:
    x, y = token_data()
    return {"x": x, "labels": y}


def ones(labels: Tensor) -> Tensor:
    return torch.ones(SAMPLES, dtype=torch.float64)


def counted(labels: Tensor) -> Tensor:
    return (labels != -100).double().reshape(SAMPLES, -1).sum(1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A loss with its data, and by hand how much every sample counts."""

    loss: Any
    kind: str
    data: Callable[[], Any] = plain_data
    model: Callable[[], nn.Module] = linear
    count: Callable[[Tensor], Tensor] = ones


CASES = {
    "mean": Case(loss=cross_entropy, kind="labels"),
    "default": Case(loss=None, kind="labels"),
    "focal": Case(loss=lambda o, y: (cross_entropy(o, y, reduction="none") ** 2).mean(), kind="mean"),
    "sum": Case(loss=nn.CrossEntropyLoss(reduction="sum"), kind="sum"),
    "weights of a module": Case(
        loss=nn.CrossEntropyLoss(weight=WEIGHT), kind="labels", count=lambda y: WEIGHT[y]
    ),
    "weights of a partial": Case(loss=weighted, kind="labels", count=lambda y: WEIGHT[y]),
    "weights within": Case(loss=lambda o, y: weighted(o, y), kind="outputs", count=lambda y: WEIGHT[y]),
    "weights and smoothing": Case(
        loss=nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), kind="labels", count=lambda y: WEIGHT[y]
    ),
    "weights that do not normalise": Case(
        loss=nn.MultiMarginLoss(weight=WEIGHT), kind="mean", data=plain_data
    ),
    "ignored": Case(loss=cross_entropy, kind="labels", data=some_ignored, count=counted),
    "ignored within": Case(
        loss=lambda o, y: weighted(o, y),
        kind="outputs",
        data=some_ignored,
        count=lambda y: WEIGHT[y.clamp_min(0)] * (y >= 0),
    ),
    "another label ignored": Case(
        loss=nn.CrossEntropyLoss(ignore_index=-1),
        kind="labels",
        data=lambda: some_ignored(-1),
        count=lambda y: (y != -1).double(),
    ),
    "tokens": Case(loss=None, kind="labels", data=token_data, model=Tagger, count=counted),
    "means of tokens": Case(
        loss=lambda o, y: torch.stack([cross_entropy(a, b) for a, b in zip(o.mT, y, strict=True)]).mean(),
        kind="mean",
        data=token_data,
        model=Tagger,
    ),
    "loss of the network": Case(
        loss=None, kind="labels", data=as_mapping, model=partial(Tagger, own=True), count=counted
    ),
    "loss of the network, shifted": Case(
        loss=None,
        kind="labels",
        data=as_mapping,
        model=partial(Tagger, own=True, shift=1),
        count=lambda y: counted(y[:, 1:]),
    ),
    "logits in a mapping, weights within": Case(
        loss=lambda o, y: cross_entropy(o["logits"], y, weight=WEIGHT),
        kind="outputs",
        data=token_data,
        model=partial(Tagger, own=True),
        count=lambda y: (WEIGHT[y.clamp_min(0)] * (y >= 0)).sum(1),
    ),
}


def samples_of(case: Case) -> list[tuple[Any, Tensor]]:
    """Every sample as a batch of one, with the labels."""
    data = case.data()
    if isinstance(data, dict):
        rows = [{key: value[i : i + 1] for key, value in data.items()} for i in range(SAMPLES)]
        return [(row, row["labels"]) for row in rows]
    x, y = data
    return [(x[i : i + 1], y[i : i + 1]) for i in range(SAMPLES)]


def cut(case: Case, sizes: list[int]) -> list[Any]:
    data = case.data()
    if isinstance(data, dict):
        pieces = [value.split(sizes) for value in data.values()]
        return [dict(zip(data, parts, strict=True)) for parts in zip(*pieces, strict=True)]
    return list(zip(*(tensor.split(sizes) for tensor in data), strict=True))


def loss_of(case: Case, model: nn.Module, inputs: Any, labels: Tensor) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    if case.loss is not None:
        return case.loss(output, labels)
    return output["loss"] if isinstance(output, dict) else cross_entropy(output, labels)


def flat_gradient(model: nn.Module, partition: Partition, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(partition.tensors(model).values()))
    return torch.cat([part.flatten() for part in found])


def expected(case: Case, model: nn.Module, partition: Partition) -> tuple[float, Tensor, Tensor]:
    """Loss, gradient and Fisher matrix of the whole data set, by plain autograd."""
    data = case.data()
    labels = data["labels"] if isinstance(data, dict) else data[1]
    whole = loss_of(case, model, data if isinstance(data, dict) else data[0], labels)
    whole = whole / SAMPLES if case.kind == "sum" else whole
    count = case.count(labels)
    fisher = torch.zeros(partition.n, partition.n, dtype=torch.float64)
    for weight, (inputs, label) in zip(count, samples_of(case), strict=True):
        if weight > 0:
            row = flat_gradient(model, partition, loss_of(case, model, inputs, label))
            fisher += weight / count.sum() * torch.outer(row, row)
    return float(whole.detach()), flat_gradient(model, partition, whole), fisher


def rows_of(case: Case, data: Any, curvature: Fisher | None = None, **options: Any) -> tuple[Rows, Objective]:
    model = case.model()
    objective = Objective.of(case.loss)
    found = gradient_rows(
        model,
        data,
        objective,
        Partition.from_model(model, blocks="global"),
        curvature=EmpiricalFisher(samples=SAMPLES) if curvature is None else curvature,
        progress=False,
        **options,
    )
    return found, objective


@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_rows_are_those_of_the_whole_data_set(name: str, sizes: list[int]) -> None:
    case = CASES[name]
    model = case.model()
    partition = Partition.from_model(model, blocks="global")
    loss, gradient, fisher = expected(case, model, partition)
    found, objective = rows_of(case, cut(case, sizes))
    assert objective.kind == case.kind
    torch.testing.assert_close(found.gradient, gradient)
    torch.testing.assert_close(found.rows.T @ found.rows, fisher)
    assert evaluate(model, cut(case, sizes), objective).loss == pytest.approx(loss, rel=1e-12)
    mean, used = mean_gradient(
        model, cut(case, sizes), objective, partition, samples=SAMPLES, batch_size=5, progress=False
    )
    torch.testing.assert_close(mean, gradient)
    assert used == SAMPLES


@pytest.mark.parametrize("name", ["ignored", "weights of a module", "tokens", "sum"])
def test_averaged_rows_weigh_by_their_samples(name: str) -> None:
    case = CASES[name]
    model = case.model()
    partition = Partition.from_model(model, blocks="global")
    _, gradient, _ = expected(case, model, partition)
    data = case.data()
    count = case.count(data[1])
    fisher = torch.zeros(partition.n, partition.n, dtype=torch.float64)
    for start in range(0, SAMPLES, 4):
        group = slice(start, start + 4)
        loss = loss_of(case, model, data[0][group], data[1][group])
        row = flat_gradient(model, partition, loss / 4 if case.kind == "sum" else loss)
        fisher += count[group].sum() / count.sum() * torch.outer(row, row)
    for memory in (1, 1 << 28):
        options = {"resources": Resources(chunk_memory=memory)}
        found, _ = rows_of(case, [data], EmpiricalFisher(samples=SAMPLES, per_row=4), **options)
        torch.testing.assert_close(found.rows.T @ found.rows, fisher)
        torch.testing.assert_close(found.gradient, gradient)


@pytest.mark.parametrize("kind", [ExactFisher, MonteCarloFisher, SketchedFisher])
def test_model_rows_weigh_samples_as_the_loss_does(kind: type[Fisher]) -> None:
    """Ignored samples are as if they were not there; a weight of two is as good as the sample twice."""
    x, y = some_ignored()
    case, there = CASES["ignored"], y >= 0
    options = {"resources": Resources(chunk_memory=1)}
    found, _ = rows_of(case, [(x, y)], kind(samples=SAMPLES), **options)
    _, gradient, _ = expected(case, case.model(), Partition.from_model(case.model(), blocks="global"))
    torch.testing.assert_close(found.gradient, gradient)
    assert bool(found.rows.isfinite().all())
    zero = (found.rows == 0).all(dim=1).reshape(SAMPLES, -1).all(dim=1)
    assert torch.equal(zero, ~there)
    if kind is not ExactFisher:
        return
    least, _ = rows_of(case, [(x[there], y[there])], kind(samples=SAMPLES))
    torch.testing.assert_close(found.rows.T @ found.rows, least.rows.T @ least.rows)
    twice = torch.where(y == 1, 2.0, 1.0)[there]
    doubled = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64))
    index = torch.arange(int(there.sum())).repeat_interleave(twice.long())
    heavy = Case(loss=doubled, kind="labels")
    one, _ = rows_of(heavy, [(x[there], y[there])], kind(samples=SAMPLES))
    other, _ = rows_of(case, [(x[there][index], y[there][index])], kind(samples=2 * SAMPLES))
    torch.testing.assert_close(one.rows.T @ one.rows, other.rows.T @ other.rows)


def contrast(output: Tensor, labels: Any) -> Tensor:
    return cross_entropy(output @ output.T, torch.arange(len(output)))


def test_a_loss_of_whole_batches_has_a_row_a_batch(caplog: pytest.LogCaptureFixture) -> None:
    x, _ = plain_data()
    model = linear()
    partition = Partition.from_model(model, blocks="global")
    batches = [(part,) for part in x.split(5)]
    losses = [contrast(model(part), None) for (part,) in batches]
    expected = torch.stack([flat_gradient(model, partition, loss) for loss in losses])
    objective = Objective.of(contrast)
    found = gradient_rows(
        model,
        DataLoader(TensorDataset(x), batch_size=5),
        objective,
        partition,
        curvature=EmpiricalFisher(samples=SAMPLES),
        resources=Resources(chunk_memory=1),
        progress=False,
    )
    torch.testing.assert_close(found.rows * 3**0.5, expected)
    torch.testing.assert_close(found.gradient, expected.mean(0))
    mean, _ = mean_gradient(
        model, batches, objective, partition, samples=SAMPLES, batch_size=2, progress=False
    )
    torch.testing.assert_close(mean, expected.mean(0))
    assert evaluate(model, batches, objective, batch_size=2).loss == pytest.approx(
        float(torch.stack(losses).detach().mean())
    )
    assert caplog.text.count("whole batches") == 1
    assert "samples make one" not in caplog.text
    with pytest.raises(UnsupportedProblemError, match="exact_fisher"):
        gradient_rows(model, batches, contrast, partition, curvature=ExactFisher(), progress=False)


@pytest.mark.parametrize("samples", [40, 70])
def test_data_that_are_not_cut_make_batches_for_such_a_loss(
    samples: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As for the root of a mean square, which is no mean over samples."""
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(samples, CLASSES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = linear()
    partition = Partition.from_model(model, blocks="global")

    def root(output: Tensor, labels: Tensor) -> Tensor:
        return mse_loss(output, labels).sqrt()

    losses = [root(model(a), b) for a, b in zip(x.split(32), y.split(32), strict=True)]
    for data in ((x, y), TensorDataset(x, y)):
        assert evaluate(model, data, root).loss == pytest.approx(float(torch.stack(losses).detach().mean()))
        found = gradient_rows(
            model, data, root, partition, curvature=EmpiricalFisher(samples=samples), progress=False
        )
        assert found.shape[0] == len(losses)
    assert "whole batches, so every gradient row is that of a batch; the data are not cut" in caplog.text


class Kept(Journal):
    """Rows and gradient as a folder would keep them, and how many samples they are of."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.gradient, self.samples, self.stop = torch.zeros(0), 0, 0

    def restore(self, gradient: Tensor) -> Iterator[Tensor]:
        if self.samples:
            gradient.copy_(self.gradient)
        yield from list(self.rows)

    def seen(self, part: Batch, samples: int) -> bool:
        return samples < self.samples

    def take(self, rows: Tensor) -> None:
        self.rows.append(rows.clone())

    def save(self, gradient: Tensor, samples: int, *, done: bool = False) -> None:
        self.gradient, self.samples = gradient.clone(), samples
        if samples == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", range(1, SAMPLES))
@pytest.mark.parametrize("name", ["ignored", "weights of a module", "ignored within"])
def test_rows_that_are_gone_on_with_are_the_same(name: str, stop: int) -> None:
    case = CASES[name]
    options = {"resources": Resources(chunk_memory=1)}
    whole, _ = rows_of(case, [case.data()], **options)
    journal = Kept()
    journal.stop = stop
    with pytest.raises(KeyboardInterrupt):
        rows_of(case, [case.data()], journal=journal, **options)
    journal.stop = 0
    again, _ = rows_of(case, [case.data()], journal=journal, **options)
    assert torch.equal(again.rows, whole.rows)
    assert torch.equal(again.gradient, whole.gradient)


def test_a_loss_may_write_to_the_output() -> None:
    def in_place(output: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(output.mul_(2.0), labels)

    x, y = plain_data()
    found, objective = rows_of(Case(loss=in_place, kind="labels"), [(x, y)])
    other, _ = rows_of(Case(loss=lambda o, y: cross_entropy(2 * o, y), kind="labels"), [(x, y)])
    torch.testing.assert_close(found.rows, other.rows)
    assert objective.kind == "labels"
    doubled = cross_entropy(2 * linear()(x), y)
    assert evaluate(linear(), (x, y), objective).loss == pytest.approx(float(doubled.detach()))


def test_a_loss_that_is_a_plain_mean_has_the_bits_of_one() -> None:
    x, y = plain_data()
    found, _ = rows_of(CASES["mean"], [(x, y)])
    other, objective = rows_of(Case(loss=lambda o, y: cross_entropy(o, y), kind="labels"), [(x, y)])
    assert torch.equal(found.rows, other.rows)
    assert torch.equal(found.gradient, other.gradient)
    model = linear()
    assert evaluate(model, [(x, y)], objective).loss == float(cross_entropy(model(x), y).detach())


def test_samples_that_are_ignored_do_not_count() -> None:
    x, y = some_ignored()
    found = evaluate(linear(), (x, y), batch_size=1)
    there = y >= 0
    assert found.samples == int(there.sum())
    right = linear()(x).argmax(1) == y
    assert found.accuracy == pytest.approx(float(right[there].double().mean()))
    with pytest.raises(EmptyDataError, match="all ignored"):
        evaluate(linear(), (x, torch.full_like(y, -100)))
    with pytest.raises(EmptyDataError, match="all ignored"):
        rows_of(CASES["ignored"], [(x, torch.full_like(y, -100))])
    with pytest.raises(LabelRangeError, match="-100"):
        evaluate(linear(), (x, y), nn.MultiMarginLoss())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_coarse_numbers_do_not_hide_what_a_loss_is(dtype: torch.dtype) -> None:
    x, y = plain_data()
    for loss, kind in ((cross_entropy, "labels"), (nn.CrossEntropyLoss(reduction="sum"), "sum")):
        objective = Objective.of(loss)
        evaluate(linear().to(dtype), (x.to(dtype), y), objective)
        assert objective.kind == kind


class Language(nn.Module):
    """Logits of the next token (B, T, V); each sees itself and those before it, or all."""

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.embedding, self.linear, self.causal = nn.Embedding(11, 4), nn.Linear(4, 11), causal

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        hidden = self.embedding(input_ids)
        seen = hidden.cumsum(1) if self.causal else hidden + hidden.sum(1, keepdim=True)
        return SimpleNamespace(logits=self.linear(seen))


def test_a_causal_network_without_labels_predicts_the_next_token(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    ids = torch.randint(11, (6, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [3], [5], [7], [2], [6]])).long()
    model = Language(causal=True).eval()
    data = {"input_ids": ids, "attention_mask": mask}
    labels = ids.masked_fill(mask == 0, -100)
    wanted = cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    partition = Partition.from_model(model, blocks="global")
    gradient = flat_gradient(model, partition, wanted)
    for memory in (1, 1 << 28):
        objective = Objective()
        found = gradient_rows(
            model,
            data,
            objective,
            partition,
            curvature=EmpiricalFisher(samples=6),
            resources=Resources(chunk_memory=memory),
            progress=False,
        )
        torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-6)
        assert evaluate(model, data, objective, batch_size=2).loss == pytest.approx(
            float(wanted.detach()), rel=1e-5
        )
    assert "next token" in caplog.text
    with pytest.raises(ArgumentError, match="loss_fn: not given, and none follows from output"):
        evaluate(Language(causal=False).eval(), data)


@pytest.mark.parametrize(
    ("outputs", "labels", "loss"),
    [
        ((6, 3), torch.tensor([[0], [1], [2], [0], [1], [1]]), lambda o, y: cross_entropy(o, y[:, 0])),
        (
            (6, 3),
            torch.tensor([0, 1, 2, 0, 1, 1], dtype=torch.int32),
            lambda o, y: cross_entropy(o, y.long()),
        ),
        ((6, 3), torch.softmax(torch.arange(18.0).view(6, 3).sin(), 1), cross_entropy),
        ((6, 3, 4), torch.arange(24).view(6, 4) % 3, cross_entropy),
        (
            (6, 4, 3),
            torch.arange(24).view(6, 4) % 3,
            lambda o, y: cross_entropy(o.flatten(0, 1), y.flatten()),
        ),
    ],
)
def test_cross_entropy_is_found_by_the_shapes(outputs: Any, labels: Tensor, loss: Any) -> None:
    x = torch.randn(outputs, generator=torch.Generator().manual_seed(0))
    found = evaluate(nn.Identity(), (x, labels))
    assert found.loss == pytest.approx(float(loss(x, labels)), rel=1e-5)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [((6, 3), torch.ones(6, 3)), ((6, 1), torch.zeros(6, dtype=torch.int64)), ((6, 3), torch.ones(6))],
)
def test_where_no_loss_follows_one_is_asked_for(outputs: Any, labels: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"^loss_fn: not given.*output float32 .*; pass loss_fn"):
        evaluate(nn.Identity(), (torch.randn(outputs), labels))


class Wrapped(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x))


@pytest.mark.parametrize(
    ("wrap", "labels", "loss", "message"),
    [
        (lambda o: {"logits": o}, None, cross_entropy, r"take the tensor it needs: .*output\.logits"),
        (lambda o: (o, o), None, cross_entropy, r"take the tensor it needs: .*output\[0\]"),
        (lambda o: o, torch.zeros(6, 1).long(), cross_entropy, r"y\.squeeze\(1\)"),
        (lambda o: o, None, lambda o, y: cross_entropy(o.detach(), y), "without detaching"),
        (lambda o: o, None, lambda o, y: torch.ones(()), "cannot be differentiated"),
        (lambda o: o, None, lambda o, y: o, r"returned shape \(4, 3\); return the mean loss"),
        (lambda o: o, None, lambda o, y: 1.0, "returned float; return the mean loss"),
        (lambda o: o, None, lambda o: o, "raised TypeError"),
    ],
)
def test_a_loss_that_does_not_fit_is_told_what_it_gets(
    wrap: Any, labels: Any, loss: Any, message: str
) -> None:
    x, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(LossError, match=f"^loss_fn: .*{message}"):
        evaluate(Wrapped(wrap), (x, y if labels is None else labels), loss)


@pytest.mark.parametrize("module", [nn.RReLU().train(), Wrapped(lambda o: nn.functional.dropout(o, 0.5))])
def test_chance_in_a_network_is_found_out(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), module)
    data = (torch.randn(6, 4), torch.zeros(6).long())
    with pytest.raises(RandomOutputError, match="another output when the network is run again"):
        gradient_rows(model, data, None, Partition.from_model(model), progress=False)


def test_numbers_are_converted_where_the_network_needs_it() -> None:
    x, y = plain_data()
    model = linear().float()
    for labels, loss in ((y, cross_entropy), (torch.randn(SAMPLES, 3).double(), mse_loss)):
        found = evaluate(model, (x.numpy(), labels.numpy()), loss)
        right = labels if labels.dtype == torch.int64 else labels.float()
        assert found.loss == pytest.approx(float(loss(model(x.float()), right).detach()), rel=1e-6)


class Convolutions(nn.Module):
    """Reads what its convolution returns as it lies in memory, if `view`."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.convolution, self.head, self.view = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, CLASSES), view

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x).relu()
        head: Tensor = self.head(y.view(len(y), -1) if self.view else y.flatten(1))
        return head


@pytest.mark.parametrize(
    ("model", "dtype", "reordered"),
    [
        (Convolutions(view=False), torch.float32, True),
        (Convolutions(view=True), torch.float32, False),
        (Convolutions(view=False).double(), torch.float64, False),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)), torch.float32, False),
    ],
)
def test_images_have_their_channels_last_where_the_network_convolves_them_so(
    model: nn.Module, dtype: torch.dtype, reordered: bool
) -> None:
    x, (_, y) = torch.randn(SAMPLES, 3, 8, 8, dtype=dtype), plain_data()
    objective = Objective(cross_entropy)
    loss = evaluate(model, (x, y), objective).loss
    found = objective.prepared(Batch(inputs=x, labels=y)).inputs
    assert isinstance(found, Tensor)
    assert found.equal(x)
    assert found.is_contiguous(memory_format=torch.channels_last) == reordered
    assert loss == pytest.approx(float(cross_entropy(model(x), y).detach()), rel=1e-6)
    rows = gradient_rows(model, (x, y), cross_entropy, Partition.from_model(model), progress=False)
    assert torch.isfinite(rows.rows).all()
