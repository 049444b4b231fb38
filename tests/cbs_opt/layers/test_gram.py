"""Gram matrices: exact sums, overflow, NaN by name, and shrinkage where tokens are few."""

from __future__ import annotations

import pytest
import torch

from cbs_opt.layers.gram import GramSum
from formulations.errors import NonFiniteError


def summed(x: torch.Tensor, pieces: int = 3) -> GramSum:
    total = GramSum(x.shape[1], torch.device("cpu"))
    for number, piece in enumerate(x.tensor_split(pieces)):
        total.add(piece, "layer", number)
    return total


def test_the_mean_is_that_of_all_tokens_however_they_are_cut() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gram, shrinkage = summed(x).mean()
    assert shrinkage == 0.0
    assert torch.allclose(gram, x.double().T @ x.double() / 50, rtol=1e-5)
    assert torch.allclose(summed(x, 7).mean()[0], gram, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_that_overflow_single_precision_are_made_in_double(dtype: torch.dtype) -> None:
    largest = 6e4 if dtype == torch.float16 else 3e19
    x = torch.full((4, 3), largest).to(dtype)
    gram, _ = summed(x).mean()
    assert torch.allclose(gram, x.double().T @ x.double() / 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_layer_and_the_batch_of_a_bad_input_are_named(value: float) -> None:
    total = GramSum(3, torch.device("cpu"))
    total.add(torch.ones(5, 3), "layers.4.up.weight", 0)
    x = torch.ones(5, 3)
    x[2, 1] = value
    with pytest.raises(
        NonFiniteError, match=r"layers\.4\.up\.weight are NaN or infinite at 1 of 5 .* batch 1"
    ):
        total.add(x, "layers.4.up.weight", 1)


def test_few_tokens_are_shrunk_towards_the_identity_and_come_nearer_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0.5, 1.5, 40).double()
    errors = []
    for shrinkage in (None, 0.0):
        x = torch.randn(20, 40, generator=generator.manual_seed(1)).double() * scales
        gram, share = summed(x).mean(shrinkage)
        assert (0.3 < share < 1.0) if shrinkage is None else share == 0.0
        assert float(gram.trace()) == pytest.approx(float(x.square().sum()) / 20)
        errors.append(float((gram - torch.diag(scales.square())).norm()))
    assert errors[0] < 0.6 * errors[1]


def test_a_share_that_was_asked_for_is_taken() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    plain, shrunk = summed(x).mean()[0], summed(x).mean(0.25)[0]
    expected = 0.75 * plain + 0.25 * plain.diagonal().mean() * torch.eye(4)
    assert torch.allclose(shrunk, expected)
