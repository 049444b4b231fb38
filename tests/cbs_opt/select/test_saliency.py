"""Saliencies against their definitions: what removing one weight costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cbs_opt.hessian import products
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.select import saliency
from formulations import loss
from formulations.errors import ArgumentError, NotPositiveDefiniteError
from tests.cbs_opt.fisher import KINDS, data_of, dense_hessian, fisher_block

close = torch.testing.assert_close
DAMPED = [kind for kind in KINDS if kind != "undamped"]


def without_gradient(block: FisherBlock) -> FisherBlock:
    return replace(block, gradient=None)


@pytest.mark.parametrize("kind", DAMPED)
@pytest.mark.parametrize("m", [5, 40])
def test_obd_and_obs_are_the_loss_of_removing_one_weight(kind: str, m: int) -> None:
    block = without_gradient(fisher_block(kind, 24, m))
    problem = block.to_problem(1)
    alone = ~np.eye(24, dtype=np.bool_)
    expected = {
        "obd": [loss.selection_loss(problem, keep) for keep in alone],
        "obs": [loss.joint_loss(problem, keep) for keep in alone],
    }
    for name, values in expected.items():
        close(
            saliency.SALIENCIES[name](block), torch.tensor(values, dtype=torch.float64), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["gradient", "zeros", "hessian"])
def test_gradient_scores(kind: str, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 24, 9, dtype=dtype)
    w, hessian = block.weights.double(), dense_hessian(block)
    assert block.gradient is not None
    g = block.gradient.double()
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    close(saliency.loss_preservation(block), (g * w).abs())
    close(saliency.gradient_norm(block), (w * (hessian @ g)).abs(), rtol=rounding, atol=rounding)
    close(saliency.magnitude(block), w.abs())


@pytest.mark.parametrize("name", ["loss_preservation", "gradient_norm"])
def test_gradient_scores_need_a_gradient(name: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        saliency.SALIENCIES[name](fisher_block("flat", 8, 4))
    assert caught.value.argument == "gradient"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_inverse_diagonal(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int) -> None:
    monkeypatch.setattr(products, "COLUMN_CHUNK", chunk)
    for kind in DAMPED:
        for m in (6, 60):
            block = fisher_block(kind, 30, m, dtype=dtype)
            expected = torch.linalg.inv(dense_hessian(block)).diagonal()
            close(block.inverse_diagonal(), expected, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("m", [3, 12])
def test_a_singular_hessian_is_named(m: int) -> None:
    block = fisher_block("undamped", 8, m)
    rows = data_of(block)
    rows[:, 0] = rows[:, 1]
    rows[:, 2] = 0.0
    with pytest.raises(NotPositiveDefiniteError) as caught:
        saliency.obs(block)
    assert caught.value.argument == "damping"


def test_the_lowest_go_exactly_by_the_count_and_the_first_of_ties() -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0, torch.inf])
    for n_prune in range(7):
        pruned = ~saliency.without_lowest(scores, n_prune)
        assert int(pruned.sum()) == n_prune
        if 0 < n_prune < 6:
            assert scores[pruned].max() <= scores[~pruned].min()
    assert saliency.without_lowest(scores, 2).tolist() == [True, False, False, True, True, True]
