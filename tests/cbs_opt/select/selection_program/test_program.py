"""The matrix-free selection program against its dense matrix."""

from __future__ import annotations

import pytest
import torch

from cbs_opt.select.selection_program.program import SelectionProgram
from formulations import loss
from tests.cbs_opt.fisher import KINDS, dense_form, dense_objective, fisher_block, random_set

close = torch.testing.assert_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(kind: str, dtype: torch.dtype) -> None:
    block = fisher_block(kind, 30, 7, dtype=dtype)
    program = SelectionProgram(block)
    matrix, linear = dense_form(block)
    y = random_set(30, 13).double()
    image = program.image(y)
    rounding = 1e-12 if dtype == torch.float64 else 1e-5
    close(program.linear(), linear)
    close(program.diagonal(), matrix.diagonal())
    close(program.product(image, y), matrix @ y, rtol=rounding, atol=rounding)
    index = torch.tensor([4, 0, 29, 11])
    close(program.product_at(index, image, y), (matrix @ y)[index])
    close(program.gram(index), matrix[index][:, index])
    close(program.gram(index, precise=False), matrix[index][:, index], rtol=1e-4, atol=1e-5)
    close(
        program.columns(index) @ y[index],
        program.image(torch.zeros(30).double().index_add(0, index, y[index])),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_prune", [0, 1, 13, 30])
def test_objective_is_that_of_formulations(kind: str, n_prune: int) -> None:
    block = fisher_block(kind, 30, 7)
    pruned = random_set(30, n_prune)
    found = SelectionProgram(block).objective(~pruned)
    assert found == pytest.approx(
        loss.selection_loss(block.to_problem(n_prune), (~pruned).numpy()), rel=1e-10
    )
    assert found == pytest.approx(dense_objective(block, pruned), rel=1e-10, abs=1e-14)
