"""`prune` under the joint program: every partition, both engines, the budget's saliency, interrupts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cbs_opt.curvature.fisher import fisher_blocks
from cbs_opt.curvature.kinds import EmpiricalFisher
from cbs_opt.pruning import prune
from cbs_opt.recipe.records import Weights, absolute
from cbs_opt.recipe.select import GreedyOBS, SwapSearch
from cbs_opt.report.record import PruneReport
from cbs_opt.select.joint_program import search as joint_search
from cbs_opt.select.joint_program import selectors as joint_selection
from cbs_opt.select.joint_program.channel_program import joint_saliency
from cbs_opt.select.methods import available_methods, find_method
from cbs_opt.select.saliency import magnitude
from tests.cbs_opt.fisher import fisher_block
from tests.cbs_opt.recipes import arguments
from tests.cbs_opt.small_network import assert_untouched, data, network, snapshot


def run(**options: Any) -> PruneReport:
    model = options.pop("model", None) or network(dtype=torch.float64)
    options = {
        "sparsity": 0.6,
        "curvature": EmpiricalFisher(samples=30),
        "damping": absolute(0.02),
        "layer_inputs": 0.0,
        "progress": False,
    } | options
    return prune(model, data(dtype=torch.float64), **arguments(**options))


@pytest.mark.parametrize("dense_limit", [0, 1_000])
@pytest.mark.parametrize("partition", ["global", "layer", "row", 9])
def test_no_other_method_predicts_a_lower_loss_on_any_block(partition: str | int, dense_limit: int) -> None:
    weights = Weights(blocks=partition, budget="global" if partition == "global" else "uniform")
    searched = run(weights=weights, select=SwapSearch(restarts=3, dense_limit=dense_limit))
    assert searched.n_prune == round(0.6 * searched.n)
    assert all(block.locally_optimal for block in searched.blocks)
    for method in ("magnitude", "obs", "iterative_hard_threshold", "greedy_obs"):
        select = GreedyOBS(dense_limit=dense_limit) if method == "greedy_obs" else method
        other = run(weights=weights, select=select)
        for mine, theirs in zip(searched.blocks, other.blocks, strict=True):
            assert mine.n_prune == theirs.n_prune
            assert mine.updated_loss is not None
            assert theirs.updated_loss is not None
            # Local optima of different basins may differ; the sum below may not.
            assert mine.updated_loss <= theirs.updated_loss * 1.2 + 1e-9
        assert searched.predicted_loss_increase is not None
        assert other.predicted_loss_increase is not None
        assert searched.predicted_loss_increase <= other.predicted_loss_increase * (1 + 1e-9)


def test_a_global_budget_is_spent_by_the_joint_saliency() -> None:
    report = run(weights=Weights(blocks="layer"))
    blocks = fisher_blocks(
        network(dtype=torch.float64),
        data(dtype=torch.float64),
        loss_fn=torch.nn.functional.cross_entropy,
        partition="layer",
        curvature=EmpiricalFisher(samples=30),
        damping=0.02,
        progress=False,
    )
    scores = [joint_saliency(replace(block, gradient=None)) for block in blocks]
    limit = torch.cat(scores).sort().values[report.n_prune - 1]
    assert [block.n_prune for block in report.blocks] == [int((score <= limit).sum()) for score in scores]


def test_an_interrupt_leaves_the_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(joint_search, "improving_pairs", interrupt)
    model = network(dtype=torch.float64)
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        run(model=model, select=SwapSearch(dense_limit=0))
    assert_untouched(model, before)


def test_methods_know_their_engines_and_scores() -> None:
    swap, other = find_method("swap_search", "joint"), find_method("swap_search", "selection")
    assert swap.selector("joint") is joint_selection.by_joint_swap_search
    assert other.selector("selection") is not swap.selector("joint")
    block = fisher_block("gradient", 20, 8)
    assert swap.score(block).equal(joint_saliency(block))
    assert other.score(block).equal(magnitude(block))
    assert {"start", "max_swaps", "restarts", "tolerance"} <= set(swap.options)
    for method in available_methods():
        assert all(callable(method.selector(program)) for program in method.programs)
