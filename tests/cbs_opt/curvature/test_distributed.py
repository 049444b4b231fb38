"""Rows sharded over two processes are the rows of one; blocks are reduced where they are solved."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from cbs_opt import Partition, fisher_blocks, gradient_rows, solve_blocks
from cbs_opt.curvature.distributed import owners, sharded_rows
from cbs_opt.errors import EmptyDataError
from cbs_opt.network.partition import BlockSpan
from formulations.errors import ArgumentError
from tests.cbs_opt.distributed_worker import CASES, DAMPING, inputs
from tests.cbs_opt.small_network import data, network

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What the two processes of one group found."""
    folder = tmp_path_factory.mktemp("group")
    module = "tests.cbs_opt.distributed_worker"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_hold_the_rows_of_one(case, ranks):
    for found in ranks:
        for name in ("rows", "gradient", "product", "blocks"):
            assert found[f"{case}.{name}"] < 1e-12, name
        assert found[f"{case}.total"] == 0
    held = [int(found[f"{case}.held"]) for found in ranks]
    if case in ("short_data", "one_row"):
        assert min(held) == 0
    else:
        assert max(held) - min(held) <= (3 if case == "exact" else 1)


@pytest.mark.slow
def test_blocks_solved_where_they_are_reduced_give_the_sets_of_one_process(ranks):
    model = network(dtype=torch.float64)
    blocks = fisher_blocks(
        model, data(dtype=torch.float64), loss_fn=cross_entropy, partition="row", samples=40, damping=DAMPING,
        progress=False,
    )  # fmt: skip
    problems = [block.to_problem(block.n // 2) for block in blocks]
    solutions = solve_blocks(problems, "branch_and_bound", program="joint", seed=0)
    expected = torch.cat([torch.tensor(~solution.keep) for solution in solutions])
    for found in ranks:
        assert torch.equal(found["solved.pruned"], expected)


@pytest.mark.slow
def test_a_failure_of_one_process_ends_the_call_in_both(ranks):
    for found in ranks:
        assert found["failures.peer"] == 1
        assert found["failures.empty"] == 1


def test_largest_blocks_go_first_to_the_rank_with_least():
    edges = [0, 5, 6, 16, 18, 27]
    spans = [BlockSpan(name=str(start), start=start, stop=stop) for start, stop in itertools.pairwise(edges)]
    assert owners(spans, 1) == [0] * 5
    assert owners(spans, 2) == [1, 0, 0, 0, 1]  # 10 and 1, 2; 9 and 5
    assert owners(spans, 9).count(owners(spans, 9)[2]) == 1


@pytest.mark.parametrize("case", CASES)
def test_shares_one_after_the_other_are_the_rows_of_the_whole_run(case):
    model = network(dtype=torch.float64)
    partition = Partition.from_model(model)
    options = {**CASES[case], "progress": False}
    given = inputs(case)
    whole = gradient_rows(model, given, cross_entropy, partition, **options)
    per_row = options.get("samples_per_row", 1)
    cut = per_row * (min(options["samples"], 60) // per_row // 3)
    edges = [0, *([cut] if cut else []), options["samples"]]
    parts = [
        gradient_rows(model, given, cross_entropy, partition, share=range(start, stop), **options)
        for start, stop in itertools.pairwise(edges)
    ]
    exact = whole.curvature == "exact_fisher"
    sizes = [part.samples if exact else part.rows.shape[0] for part in parts]
    scaled = [part.rows * (size / sum(sizes)) ** 0.5 for part, size in zip(parts, sizes, strict=True)]
    torch.testing.assert_close(torch.cat(scaled), whole.rows, rtol=1e-12, atol=1e-14)
    mean = sum(part.gradient * part.samples for part in parts) / whole.samples
    torch.testing.assert_close(mean, whole.gradient, rtol=1e-12, atol=1e-14)


def test_without_a_group_the_remedy_is_named():
    model = network()
    with pytest.raises(ArgumentError, match="init_process_group"):
        sharded_rows(model, data(), cross_entropy, Partition.from_model(model))


@pytest.mark.parametrize("share", [range(0, 0), range(3, 8), range(0, 41), range(0, 10, 2), range(-4, 4)])
def test_a_share_that_cuts_rows_or_leaves_the_run_is_refused(share):
    model = network()
    with pytest.raises(ArgumentError, match="share"):
        gradient_rows(
            model,
            data(),
            cross_entropy,
            Partition.from_model(model),
            samples=40,
            samples_per_row=4,
            share=share,
        )


def test_a_share_past_the_end_of_the_data_is_named():
    model = network()
    with pytest.raises(EmptyDataError, match="60 samples, none of 70 to 80"):
        gradient_rows(
            model, data(60), cross_entropy, Partition.from_model(model), samples=100, share=range(70, 80)
        )
