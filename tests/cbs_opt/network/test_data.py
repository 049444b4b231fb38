"""Reading data and evaluating a network on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from cbs_opt.errors import BatchFormatError, DataLoaderError, EmptyDataError, LabelRangeError
from cbs_opt.network.data import iterate, regroup
from cbs_opt.network.evaluation import evaluate
from formulations.errors import ArgumentError


def numbered(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(3.0 * count).view(count, 3), torch.arange(count)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 10),
    st.integers(1, 10),
    st.one_of(st.none(), st.integers(1, 40)),
)
def test_batches_keep_order_and_size(sizes, batch_size, group, limit):
    x, y = numbered(sum(sizes))
    loader = list(zip(x.split(sizes), y.split(sizes), strict=True))
    wanted = y[:limit]
    for data in (loader, (x, y)):
        batches = list(iterate(data, batch_size=batch_size, max_samples=limit))
        assert all(0 < batch.size <= batch_size for batch in batches)
        assert torch.equal(torch.cat([batch.labels for batch in batches]), wanted)
        groups = list(regroup(batches, group))
        assert [g.size for g in groups[:-1]] == [group] * (len(groups) - 1)
        assert 0 < groups[-1].size <= group
        assert torch.equal(torch.cat([g.labels for g in groups]), wanted)
        assert torch.equal(torch.cat([g.inputs for g in groups]), x[: len(wanted)])


def test_reading_stops_where_it_may():
    def endless():
        while True:
            yield numbered(4)

    assert sum(batch.size for batch in iterate(endless(), batch_size=3, max_samples=10)) == 10


def test_evaluation_is_that_of_the_whole_set_and_leaves_the_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
    model[2].eval()
    x, y = torch.randn(31, 3), torch.randint(3, (31,))
    statistics = model[1].running_mean.clone()
    for data in ((x, y), DataLoader(TensorDataset(x, y), batch_size=7)):
        found = evaluate(model, data, cross_entropy, batch_size=4)
        assert [module.training for module in model] == [True, True, False, True]
        assert torch.equal(model[1].running_mean, statistics)
        output = model.eval()(x)
        assert found.loss == pytest.approx(cross_entropy(output, y).item(), rel=1e-5)
        assert found.accuracy == pytest.approx((output.argmax(1) == y).float().mean().item())
        assert found.samples == 31
        model.train()
        model[2].eval()
    assert evaluate(model, (x, y), cross_entropy, max_samples=5).samples == 5


def test_regression_has_no_accuracy():
    found = evaluate(nn.Linear(3, 2), (torch.randn(6, 3), torch.randn(6, 2)), mse_loss)
    assert found.accuracy is None


def test_data_errors_name_the_argument():
    model, (x, _) = nn.Linear(3, 2), numbered(4)
    y = torch.tensor([0, 1, 0, 1])

    def breaking():
        yield x, y
        raise RuntimeError("worker died")

    with pytest.raises(DataLoaderError, match=r"^evaluate: raised RuntimeError at batch 1: worker died"):
        evaluate(model, breaking(), cross_entropy, argument="evaluate")
    with pytest.raises(DataLoaderError, match="not iterable"):
        evaluate(model, 7, cross_entropy)
    with pytest.raises(
        EmptyDataError, match=r"^data: nothing is left in a tuple_iterator.*a list of its batches"
    ):
        evaluate(model, iter(()), cross_entropy)
    with pytest.raises(LabelRangeError, match="labels from 0 to 2 for 2 outputs"):
        evaluate(model, (x, y + (y == 1)), cross_entropy)
    with pytest.raises(ArgumentError, match="loss_fn: returned float"):
        evaluate(model, (x, y), lambda output, labels: 0.0)
    with pytest.raises(EmptyDataError, match=r"^data: no sample"):
        evaluate(model, [], cross_entropy)


@pytest.mark.parametrize(
    "batch",
    [
        "images",
        7,
        {},
        (),
        {"x": None},
        {"x": torch.ones(2), "text": ["a", "b"]},
        {"x": torch.ones(2), "labels": torch.ones(3)},
        (torch.ones(2, 3), torch.tensor(1)),
        (np.array(["a", "b"]), torch.ones(2)),
        ([[1.0, 2.0], [3.0]], torch.ones(2)),
        (torch.ones(2, 3).to_sparse(), torch.ones(2)),
        (torch.ones(2, 3), torch.zeros(3)),
        ((torch.ones(2, 3), torch.ones(1)), torch.zeros(2)),
        (("a", "b"), torch.zeros(2)),
    ],
)
def test_malformed_batches(batch):
    with pytest.raises(BatchFormatError, match=r"batch 0: .*; it is .*; pass pairs \(x, y\)"):
        list(iterate([batch], batch_size=4))


def test_batches_that_cannot_be_joined():
    ragged = [(torch.ones(2, 3), torch.zeros(2)), (torch.ones(2, 5), torch.zeros(2))]
    assert len(list(iterate(ragged, batch_size=4))) == 2
    with pytest.raises(BatchFormatError, match="different shapes"):
        list(regroup(iterate(ragged, batch_size=4), 3))
