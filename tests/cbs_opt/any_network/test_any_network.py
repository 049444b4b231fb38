"""Every kind of network is pruned by the defaults, or refused by name; the page says which."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cbs_opt.network.evaluation import evaluate
from cbs_opt.report.record import PruneReport
from experiments.any_network.case import Case, Trial
from experiments.any_network.outcome import CASES, SPARSITY, Outcome, run, tensors
from experiments.any_network.page import HEAD, row
from formulations.errors import CbsError

PAGE = (Path(__file__).parents[3] / "docs/guides/networks.md").read_text()
TABLE = PAGE.partition("<!-- networks -->")[2].partition("<!-- end of networks -->")[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ")][2:]
WRAPPERS = ("_orig_mod.", "module.")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_network_is_pruned_or_refused_by_name(case: Case) -> None:
    for package in case.needs:
        pytest.importorskip(package)
    untouched = case.trial().model
    outcome = run(case)
    if case.refused is None:
        assert isinstance(outcome.result, PruneReport), outcome.result
        is_pruned(outcome, outcome.result)
    else:
        assert isinstance(outcome.result, CbsError)
        is_explained(outcome.result, case.refused)
        assert_same(tensors(outcome.trial), outcome.before)
    has_nothing_left_on_it(outcome.trial.model, untouched)
    assert row(outcome) in ROWS


def test_the_page_has_every_case_once() -> None:
    assert f"| {' | '.join(HEAD)} |" in PAGE
    shown = [tuple(line.strip("| ").split(" | ")[:2]) for line in ROWS]
    assert shown == [(case.network, case.batch) for case in CASES]
    assert len(set(shown)) == len(shown)


def is_pruned(outcome: Outcome, report: PruneReport) -> None:
    """As many zeros as asked, where the forward pass looks; all else as it was or named; true losses."""
    trial = outcome.trial
    assert report.n_prune == round(SPARSITY * report.n)
    losses = measured(trial)
    zeros = 0
    for name, keep in report.masks.items():
        weight = in_use(trial.model, name)
        assert not weight[~keep].any(), name
        zeros += int((~keep).sum())
    assert zeros == report.n_prune
    pruned = {parameter.data_ptr() for parameter in map(lambda n: stored(trial.model, n), report.masks)}
    now = trial.model.state_dict()
    kept = {name for name in outcome.before if now[name].data_ptr() not in pruned}
    if report.recalibrated:
        kept -= {name for name in kept if name.endswith(("running_mean", "running_var"))}
    moved = {stored(trial.model, name).data_ptr() for name in report.moved}
    assert all(stored(trial.model, name).ndim < 2 for name in report.moved)
    kept = {name for name in kept if now[name].data_ptr() not in moved}
    assert len(kept) < len(outcome.before)
    after = tensors(trial)
    assert all(torch.isfinite(tensor).all() for tensor in after.values() if tensor.is_floating_point())
    assert_same({name: after[name] for name in kept}, {name: outcome.before[name] for name in kept})
    assert report.train_after is not None
    tolerance = 2e-2 if next(trial.model.parameters()).element_size() < 4 else 1e-4
    assert losses == pytest.approx(report.train_after.loss, rel=tolerance)
    if can_be_copied(outcome.case):
        assert_same(tensors(Trial(model=copy.deepcopy(trial.model), data=None)), after)


def is_explained(error: CbsError, words: str) -> None:
    """The message has the words, an argument and a remedy, and can be read."""
    message = str(error)
    assert words in message
    assert ": " in message
    assert "; " in message
    assert len(message) < 700
    assert "vectorize" not in message


def has_nothing_left_on_it(model: nn.Module, like: nn.Module) -> None:
    """Hooks, modes, gradients and parameters are those of a network that was never pruned."""
    for (name, module), (_, other) in zip(model.named_modules(), like.named_modules(), strict=True):
        assert type(module).__qualname__ == type(other).__qualname__, name
        assert module.training == other.training, name
        assert len(module._forward_hooks) == len(other._forward_hooks), name
        assert len(module._forward_pre_hooks) == len(other._forward_pre_hooks), name
        assert module._parameters.keys() == other._parameters.keys(), name
        assert module._buffers.keys() == other._buffers.keys(), name
    for (name, parameter), (_, other) in zip(model.named_parameters(), like.named_parameters(), strict=True):
        assert type(parameter) is type(other), name
        assert parameter.requires_grad == other.requires_grad, name
        assert parameter.grad is None, name


def measured(trial: Trial) -> float:
    """Return the loss of the network as it is, after a look at what it returns."""
    loss_fn = trial.options.get("loss_fn")
    if isinstance(trial.model, torch.jit.ScriptModule):
        # It has no hooks.
        return evaluate(trial.model, trial.data, loss_fn).loss
    seen: list[Any] = []
    handle = trial.model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        loss = evaluate(trial.model, trial.data, loss_fn).loss
    finally:
        handle.remove()
    # Earlier calls may have tried what the loss makes of labels that are ignored.
    outputs = leaves(seen[-1:])
    assert outputs
    for tensor in outputs:
        assert torch.isfinite(tensor).all()
    return loss


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() else []
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [leaf for part in tree for leaf in leaves(part)] if isinstance(tree, list | tuple) else []


def stored(model: nn.Module, name: str) -> Tensor:
    """Return the parameter of that name in a network or in what it wraps."""
    for inner in WRAPPERS:
        model = getattr(model, inner.rstrip("."), model)
    return dict(model.named_parameters(remove_duplicate=False))[name]


def in_use(model: nn.Module, name: str) -> Tensor:
    """Return what the forward pass uses where the parameter `name` is kept."""
    for inner in WRAPPERS:
        model = getattr(model, inner.rstrip("."), model)
    path, _, leaf = name.rpartition(".")
    weight = getattr(dict(model.named_modules(remove_duplicate=False))[path], leaf.removesuffix("_orig"))
    assert isinstance(weight, Tensor)
    return weight


def can_be_copied(case: Case) -> bool:
    """Whether torch itself can copy such a network: not where a hook leaves a weight with a graph."""
    try:
        copy.deepcopy(case.trial().model)
    except (RuntimeError, TypeError):
        return False
    return True


def assert_same(after: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    """Every tensor has the same bits."""
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        if not tensor.is_meta:
            same = torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (tensor, after[name])))
            assert same, name
