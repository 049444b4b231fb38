"""Partitions: which weights, in which order, cut how."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cbs_opt.errors import NoEligibleWeightsError, PartitionMismatchError, UnmatchedPatternError
from cbs_opt.hessian.block import FisherBlock
from cbs_opt.hessian.dense import DenseHessian
from cbs_opt.hessian.rows import RowsHessian
from cbs_opt.network.partition import BlockSpan, ParameterSpan, Partition
from formulations.errors import ArgumentError, NonFiniteError, ShapeError

RULES = ["global", "layer", "row", 1, 7, 10_000]


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 4))


def names(partition: Partition) -> list[str]:
    return [span.name for span in partition.parameters]


@pytest.mark.parametrize("rule", RULES)
def test_blocks_tile_the_flat_vector_within_parameters(rule):
    model = convolutional()
    partition = Partition.from_model(model, blocks=rule)
    assert partition.n == 54 + 108
    covered = [index for block in partition.blocks for index in range(block.start, block.stop)]
    assert covered == list(range(partition.n))
    assert len({block.name for block in partition.blocks}) == len(partition.blocks)
    for block in partition.blocks:
        spanned = [p for p in partition.parameters if p.start < block.stop and p.stop > block.start]
        assert len(spanned) == (2 if rule == "global" else 1)
        assert spanned[0].start <= block.start < block.stop <= spanned[-1].stop
        if isinstance(rule, int):
            assert block.stop - block.start <= rule


def test_row_blocks_are_output_channels():
    model = convolutional()
    partition = Partition.from_model(model, blocks="row")
    flat = partition.flatten(model)
    channels = [*model[0].weight, *model[3].weight]
    assert len(partition.blocks) == len(channels)
    for block, channel in zip(partition.blocks, channels, strict=True):
        assert torch.equal(flat[block.start : block.stop], channel.flatten())
    assert partition.blocks[3].name == "3.weight[0]"


def test_flatten_copies_and_split_returns_views():
    model = convolutional()
    partition = Partition.from_model(model)
    flat = partition.flatten(model)
    assert not flat.requires_grad
    parts = partition.split(flat)
    assert torch.equal(parts["0.weight"], model[0].weight)
    parts["3.weight"].zero_()
    assert torch.equal(flat[54:], torch.zeros(108))
    assert model[3].weight.abs().min() > 0


def test_flatten_promotes_mixed_dtypes():
    model = nn.Sequential(nn.Linear(3, 3).half(), nn.Linear(3, 2).double())
    flat = Partition.from_model(model).flatten(model)
    assert flat.dtype == torch.float64
    assert torch.equal(flat[:9].half().view(3, 3), model[0].weight)


def test_keep_by_parameter_takes_tensors_and_arrays():
    partition = Partition.from_model(convolutional())
    keep = np.arange(partition.n) % 3 == 0
    by_parameter = partition.keep_by_parameter(keep)
    assert {name: tuple(part.shape) for name, part in by_parameter.items()} == {
        "0.weight": (3, 2, 3, 3),
        "3.weight": (4, 27),
    }
    joined = torch.cat([part.flatten() for part in by_parameter.values()])
    assert torch.equal(joined, torch.from_numpy(keep))
    with pytest.raises(ArgumentError, match="booleans"):
        partition.keep_by_parameter(torch.ones(partition.n))
    with pytest.raises(ShapeError):
        partition.keep_by_parameter(keep[1:])


def test_tied_parameters_appear_once_and_answer_to_every_name():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "body": nn.Linear(3, 3)})
    model["head"].weight = model["embedding"].weight
    assert names(Partition.from_model(model)) == ["body.weight"]
    for target in ("*.weight", ["head.weight", "body.weight"]):
        partition = Partition.from_model(model, target=target)
        assert names(partition) == ["embedding.weight", "body.weight"]
        assert partition.parameters[0].aliases == ("head.weight",)
    assert names(Partition.from_model(model, ignore="head.*")) == ["body.weight"]


def test_globs_choose_and_name_what_they_miss():
    model = convolutional()
    assert names(Partition.from_model(model, target=["3.*", "0.weight"], ignore="3.bias")) == [
        "0.weight",
        "3.weight",
    ]
    with pytest.raises(UnmatchedPatternError, match=r"target: 'fc\*' matches.*0\.weight"):
        Partition.from_model(model, target="fc*")
    with pytest.raises(UnmatchedPatternError, match="ignore"):
        Partition.from_model(model, ignore=["0.weight", "fc*"])


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.LayerNorm(3), {}),
        (nn.ReLU(), {}),
        (nn.Linear(2, 2), {"ignore": "*"}),
        (nn.Linear(2, 2).requires_grad_(False), {}),
    ],
)
def test_nothing_to_prune(model, options):
    with pytest.raises(NoEligibleWeightsError):
        Partition.from_model(model, **options)


@pytest.mark.parametrize("rule", ["channel", 0, -3, True, 2.5, None])
def test_unknown_block_rules(rule):
    with pytest.raises(ArgumentError, match="blocks"):
        Partition.from_model(convolutional(), blocks=rule)


def test_flatten_refuses_other_networks_and_damaged_weights():
    model = convolutional()
    partition = Partition.from_model(model)
    with pytest.raises(PartitionMismatchError, match=r"0\.weight has shape"):
        partition.flatten(nn.Sequential(nn.Conv2d(2, 5, 3), nn.Identity(), nn.Identity(), nn.Linear(27, 4)))
    with pytest.raises(PartitionMismatchError, match="missing"):
        partition.flatten(nn.Sequential(nn.Conv2d(2, 3, 3)))
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"1 of 108 weights of 3\.weight"):
        partition.flatten(model)


def test_ranges_must_tile():
    span = ParameterSpan(name="a", shape=(4,), start=0, stop=4)
    for blocks in ([(0, 3)], [(0, 2), (3, 4)], [(0, 2), (1, 4)], [(0, 0), (0, 4)]):
        spans = tuple(BlockSpan(name=str(i), start=a, stop=b) for i, (a, b) in enumerate(blocks))
        with pytest.raises(ArgumentError, match="blocks"):
            Partition(parameters=(span,), blocks=spans)


def test_problem_of_a_block_shares_float64_and_converts_the_rest():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 3, generator=generator)
    for dtype in (torch.float32, torch.float64):
        weights, gradient = torch.randn(2, 3, generator=generator).to(dtype)
        kept = rows.to(dtype)
        block = FisherBlock(
            name="b", weights=weights, hessian=RowsHessian(kept), gradient=gradient, damping=0.5
        )
        problem = block.to_problem(2)
        assert (problem.n, problem.n_prune, problem.damping, problem.name) == (3, 2, 0.5, "b")
        np.testing.assert_array_equal(problem.rows, rows.double().numpy())
        np.testing.assert_array_equal(problem.gradient, gradient.double().numpy())
        shared = problem.rows.ctypes.data == kept.data_ptr()
        assert shared == (dtype == torch.float64)
    hessian = FisherBlock(name="b", weights=weights, hessian=DenseHessian((rows.T @ rows).double()))
    np.testing.assert_allclose(hessian.to_problem(1).dense_hessian(), (rows.T @ rows).double().numpy())


def test_a_block_needs_a_hessian_of_its_size():
    for rows in (torch.ones(2, 4), torch.ones(0, 2)):
        with pytest.raises(ShapeError, match="weights"):
            FisherBlock(name="b", weights=torch.ones(3), hessian=RowsHessian(rows))
    with pytest.raises(ShapeError, match="gradient"):
        FisherBlock(
            name="b", weights=torch.ones(3), hessian=DenseHessian(torch.eye(3)), gradient=torch.ones(2)
        )
    with pytest.raises(ShapeError, match="rows"):
        RowsHessian(torch.ones(3))
    with pytest.raises(ShapeError, match="hessian"):
        DenseHessian(torch.ones(3, 4))
