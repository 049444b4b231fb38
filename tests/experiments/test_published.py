"""Published figures: complete, plausible, and found by sparsity however it is written."""

from __future__ import annotations

import pytest

from experiments.networks import NETWORKS
from experiments.published import ACCURACY, DENSE, MAGNITUDE_MEASURED, METHODS, published_accuracy


def test_every_cell_has_every_method_and_is_a_percentage() -> None:
    assert set(DENSE) == set(NETWORKS)
    for table in ACCURACY.values():
        for cell in table.values():
            assert tuple(cell) == METHODS
            assert all(10 <= figure <= 100 for figure in cell.values())


@pytest.mark.parametrize("network", ACCURACY)
def test_magnitude_falls_with_sparsity(network: str) -> None:
    figures = [cell["magnitude"] for _, cell in sorted(ACCURACY[network].items())]
    assert figures == sorted(figures, reverse=True)


def test_measured_magnitude_agrees_with_the_published_one_on_mlpnet() -> None:
    for sparsity, measured in MAGNITUDE_MEASURED["mlpnet_mnist"].items():
        assert published_accuracy("mlpnet_mnist", "magnitude", sparsity) == pytest.approx(measured, abs=0.01)


def test_lookup_forgives_rounding_and_answers_none_where_nothing_is_published() -> None:
    assert published_accuracy("mlpnet_mnist", "cbs", 1 - 0.1) == 93.14
    assert published_accuracy("mlpnet_mnist", "cbs", 0.91) is None
    assert published_accuracy("mlpnet_mnist", "nothing", 0.9) is None
    assert published_accuracy("resnet20a_cifar10", "cbs", 0.9) is None
