"""Kept weights that move on the divergence: it falls on samples set aside, masks hold, runs go on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cbs_opt as cbs
from cbs_opt.layers import sequential
from cbs_opt.layers.divergence import Divergence, stage_passes, stage_sparsity
from cbs_opt.layers.sequential import prune_layers
from formulations.errors import ArgumentError
from tests.cbs_opt.layers.networks import LENGTH, Masked, Network, padded_tokens, tokens

QUICK = Divergence(passes=3, rate=3e-3, step_tokens=4 * LENGTH)


def recipe(divergence: Divergence = QUICK, **others: Any) -> cbs.LayerRecipe:
    return cbs.LayerRecipe(method="wanda", divergence=divergence, **others)


def divergence_of(network: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        p, q = (net(x).flatten(0, -2).double().log_softmax(-1) for net in (Network(), network))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("stages", [1, 3])
def test_the_divergence_falls_where_it_was_not_differentiated_and_masks_hold(
    sparsity: float | str, stages: int
) -> None:
    network = Network()
    options = Divergence(passes=6, rate=3e-3, stages=stages, step_tokens=4 * LENGTH)
    report = prune_layers(network, tokens(), sparsity=sparsity, recipe=recipe(options))
    assert report.zeros == 0.5
    assert len(report.moved) == stages
    for name, keep in report.masks.items():
        assert torch.equal(network.get_parameter(name) == 0.0, ~keep)
    last = report.moved[-1]
    assert last.after < last.before
    assert last.after == min(last.passes)
    assert last.after == pytest.approx(divergence_of(network, tokens()[21:]), rel=1e-3)
    assert last.held == 3 * LENGTH
    assert report.differentiated == 6 * 21 * LENGTH
    assert f"to {last.after:.4f} a token" in str(report)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_what_does_not_help_is_not_taken() -> None:
    network, plain = Network(), Network()
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe(Divergence(passes=1, rate=10.0)))
    prune_layers(plain, tokens(), sparsity=0.5, recipe=cbs.LayerRecipe(method="wanda"))
    assert report.moved[0].passes[0] > report.moved[0].before == report.moved[0].after
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), plain.parameters(), strict=True))


def test_what_is_not_pruned_stays_and_may_be_frozen() -> None:
    network, dense = Network(), Network()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("layers.1" in name)
    report = prune_layers(network, tokens(), sparsity=0.5, recipe=recipe(budget="network"))
    assert report.moved[0].after < report.moved[0].before
    assert len(report.masks) == 3
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == ("layers.1" in name)
        assert (name in report.masks) != torch.equal(parameter, dense.get_parameter(name))


@pytest.mark.parametrize("killed_at", range(2))
def test_a_killed_run_goes_on_to_the_same_bits(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Divergence(passes=2, rate=3e-3, stages=2, step_tokens=4 * LENGTH)
    whole = Network()
    expected = prune_layers(whole, tokens(), sparsity=0.5, recipe=recipe(options))
    move, calls = sequential.move, itertools.count()

    def killed(*arguments: Any) -> Any:
        if next(calls) == killed_at:
            raise KeyboardInterrupt
        return move(*arguments)

    monkeypatch.setattr(sequential, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_layers(Network(), tokens(), sparsity=0.5, recipe=recipe(options), run_dir=tmp_path)
    again = Network()
    report = prune_layers(again, tokens(), sparsity=0.5, recipe=recipe(options), run_dir=tmp_path)
    assert report.moved == expected.moved
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_loader_that_fills_one_tensor_again_and_again_is_read_once() -> None:
    def loader() -> Iterator[Tensor]:
        buffer = torch.empty(4, LENGTH, dtype=torch.int64)
        for part in tokens().split(4):
            yield buffer.copy_(part)

    one, two = Network(), Network()
    prune_layers(one, loader(), sparsity=0.5, recipe=recipe())
    prune_layers(two, tokens(), sparsity=0.5, recipe=recipe())
    assert all(torch.allclose(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_padded_tokens_do_not_count() -> None:
    x, mask = padded_tokens()
    padded, cut = Masked(), Masked()
    reports = [
        prune_layers(padded, [{"tokens": x, "attention_mask": mask}], sparsity=0.5, recipe=recipe()),
        prune_layers(cut, [{"tokens": x[:, :4]}], sparsity=0.5, recipe=recipe()),
    ]
    assert reports[0].differentiated == reports[1].differentiated == 3 * 21 * 4
    assert reports[0].moved[0].before == pytest.approx(reports[1].moved[0].before, rel=1e-4)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, "2:4", "4:8", "1:4"])
def test_stages_share_the_passes_and_lead_to_the_target(sparsity: float | str, stages: int) -> None:
    options = Divergence(passes=5, stages=stages)
    assert sum(stage_passes(options, stage) for stage in range(stages)) == 5
    steps = [stage_sparsity(sparsity, options, stage) for stage in range(stages)]
    assert steps[-1] == sparsity
    kept = [int(step.split(":")[0]) if isinstance(step, str) else 1.0 - step for step in steps]
    assert kept == sorted(kept, reverse=True)
    assert isinstance(sparsity, float) or {str(step).split(":")[1] for step in steps} == {sparsity[2:]}


def test_bad_input_names_the_remedy() -> None:
    with pytest.raises(ArgumentError, match="at least two samples"):
        prune_layers(Network(), tokens(1), sparsity=0.5, recipe=recipe())
    with pytest.raises(ArgumentError, match="at least one pass a stage"):
        Divergence(passes=1, stages=2)
    with pytest.raises(ArgumentError, match=r"recipe\.divergence"):
        cbs.LayerRecipe(divergence=3)  # type: ignore[arg-type]

    class Headless(Network):
        def forward(self, tokens: Tensor) -> Tensor:
            return super().forward(tokens).argmax(-1)

    for wanted in (recipe(), cbs.LayerRecipe(budget="network")):
        network = Headless()
        with pytest.raises(ArgumentError, match="no scores of classes"):
            prune_layers(network, tokens(), sparsity=0.5, recipe=wanted)
