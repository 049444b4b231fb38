"""What is said of a pruned network that looks broken, and of none that is healthy."""

from __future__ import annotations

import math

import pytest
import torch

from cbs_opt.network.evaluation import Evaluation
from cbs_opt.report.health import label_share, warnings_of


def said(
    before: float,
    after: float,
    *,
    accuracy: tuple[float, float] | None = None,
    predicted: float | None = None,
    guess: float | None = None,
) -> list[str]:
    sides = [
        Evaluation(loss=loss, accuracy=None if accuracy is None else accuracy[side], samples=400)
        for side, loss in enumerate((before, after))
    ]
    return list(warnings_of(*sides, predicted=predicted, guess=guess))


def test_a_loss_far_above_the_predicted_one_is_named_with_what_to_do() -> None:
    (text,) = said(0.05, 0.262, accuracy=(0.98, 0.93), predicted=0.019, guess=0.1)
    for word in ("0.212", "0.019", "stages", "lower sparsity", "more samples"):
        assert word in text
    (rising,) = said(1.0, 2.0, predicted=-0.1)
    assert "rose by 1" in rising


@pytest.mark.parametrize(
    ("before", "after", "predicted"),
    [
        (0.3, 0.29, 0.001),
        (0.3, 0.34, 0.002),
        (0.3, 1.0, 0.4),
        (0.1389, 0.2752, 0.04475),
        (1e-6, 0.01, 1e-6),
        (2.0, 2.4, 0.01),
    ],
)
def test_healthy_networks_are_left_in_peace(before: float, after: float, predicted: float) -> None:
    assert said(before, after, accuracy=(0.95, 0.9), predicted=predicted, guess=0.1) == []


def test_losses_of_any_scale_are_judged_by_their_own() -> None:
    for scale in (1e-6, 1.0, 1e6):
        assert said(scale, 1.1 * scale, predicted=0.01 * scale) == []
        assert len(said(scale, 2.0 * scale, predicted=0.01 * scale)) == 1


def test_a_guess_is_named_unless_the_network_never_did_better() -> None:
    (text,) = said(0.5, 2.3, accuracy=(0.9, 0.11), guess=0.1)
    assert "guess" in text
    assert said(2.3, 2.3, accuracy=(0.1, 0.1), guess=0.1) == []
    assert said(0.5, 0.9, accuracy=(0.9, 0.7), guess=0.1) == []


def test_a_loss_that_is_not_finite_is_named_alone() -> None:
    (text,) = said(0.5, math.nan, accuracy=(0.9, 0.1), predicted=0.1, guess=0.1)
    assert "broken" in text
    assert said(math.nan, math.nan) == []
    assert list(warnings_of(None, None, predicted=None, guess=None)) == []


def test_the_share_of_the_most_frequent_class() -> None:
    assert label_share([torch.tensor([0, 1, 1]), torch.tensor([1, 2])]) == 3 / 5
    assert label_share([torch.tensor([0, 0, -100, 1])]) == 2 / 3
    assert label_share([torch.rand(3)]) is None
    assert label_share([None]) is None
    assert label_share([torch.zeros(3, 2, dtype=torch.int64)]) is None
    assert label_share([]) is None


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_a_rise_of_another_order_than_the_prediction_is_told_in_any_unit(unit: float) -> None:
    before, after = (Evaluation(loss=unit * loss, accuracy=None, samples=480) for loss in (5.579, 5.989))
    (warning,) = warnings_of(before, after, predicted=unit * 6.7e-4, guess=None)
    assert f"{unit * 0.41:.2g}"[:3] in warning
    assert not list(warnings_of(before, after, predicted=unit * 0.1, guess=None))
    assert not list(warnings_of(before, after, predicted=None, guess=None))
