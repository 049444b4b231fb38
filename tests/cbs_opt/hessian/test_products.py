"""Products with rows keep float64 accuracy whatever the precision of the rows."""

from __future__ import annotations

import pytest
import torch

from cbs_opt.hessian import products
from formulations import loss
from formulations.errors import NotPositiveDefiniteError
from tests.cbs_opt.fisher import KINDS, data_of, dense_hessian, fisher_block

close = torch.testing.assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("height", [0, 1, 15, 16, 50])
def test_single_precision_rows_lose_nothing(dtype: torch.dtype, height: int) -> None:
    rows = torch.randn(height, 40, generator=torch.Generator().manual_seed(height)).to(dtype)
    x = torch.linspace(-1, 1, 40, dtype=torch.float64)
    exact = rows.double()
    close(products.image(rows, x), exact @ x, rtol=1e-13, atol=1e-13)
    close(products.column_squares(rows), exact.square().sum(dim=0), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("chunk", [3, 8192])
@pytest.mark.parametrize("index", [None, torch.tensor([7, 2, 11, 3]), torch.tensor([], dtype=torch.int64)])
def test_inner_gram(monkeypatch: pytest.MonkeyPatch, chunk: int, index: torch.Tensor | None) -> None:
    monkeypatch.setattr(products, "COLUMN_CHUNK", chunk)
    rows = data_of(fisher_block("flat", 20, 6, dtype=torch.float32))
    chosen = (rows if index is None else rows[:, index]).double()
    close(products.inner_gram(rows, index), chosen @ chosen.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_with_the_hessian(kind: str, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 30, 12, dtype=dtype)
    hessian = dense_hessian(block)
    x = torch.linspace(-2, 1, 30, dtype=torch.float64)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    close(block.product(x), hessian @ x, rtol=rounding, atol=rounding)
    close(block.diagonal(), hessian.diagonal(), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_step_loss_is_that_of_formulations(kind: str) -> None:
    block = fisher_block(kind, 30, 12, dtype=torch.float32)
    problem = block.to_problem(10)
    for step in (-block.weights.double(), torch.linspace(-2, 1, 30, dtype=torch.float64)):
        assert block.step_loss(step) == pytest.approx(loss.step_loss(problem, step.numpy()), rel=1e-12)


def test_factorise_names_the_block() -> None:
    with pytest.raises(NotPositiveDefiniteError, match="'undamped'") as caught:
        products.factorise(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), "undamped", 0.0)
    assert caught.value.argument == "damping"
