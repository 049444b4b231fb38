"""Test accuracies in per cent without retraining, as published, by network, method and sparsity.

Sources
-------
- `SOURCES["cbs"]`: the columns "magnitude", "woodfisher" and "cbs".
- `SOURCES["chita"]`: the columns "chita" and "chita_staged" ("CHITA++", about 15 stages with fresh
  gradients), and the same figures for the other three.

Protocols differ. The CBS paper prunes the 18 block convolutions of ResNet20; the CHITA paper also prunes
the first convolution and the classifier and re-estimates batch-norm statistics. The reference code of
CBS keeps up to 10 % more weights than it states at .95 and .98, so those two figures of MLPNet are
probably flattered. `MAGNITUDE_MEASURED` has magnitude pruning of the weights that this project prunes.
"""

from __future__ import annotations

from collections.abc import Mapping

SOURCES: Mapping[str, str] = {
    "cbs": 'Yu, Serra, Ramalingam, Zhe, "The Combinatorial Brain Surgeon: Pruning Weights That Cancel One '
    'Another in Neural Networks", ICML 2022',
    "chita": 'Benbaki, Chen, Meng, Hazimeh, Ponomareva, Zhao, Mazumder, "Fast as CHITA: Neural Network '
    'Pruning with Combinatorial Optimization", ICML 2023',
}

DENSE: Mapping[str, float] = {"mlpnet_mnist": 93.97, "resnet20_cifar10": 91.36, "resnet20a_cifar10": 91.73}
"""Accuracy before pruning, as published."""

_MLPNET = (
    # sparsity, magnitude, woodfisher, cbs, chita, chita_staged
    (0.50, 93.93, 94.02, 93.96, 93.97, 95.97),
    (0.60, 93.78, 93.82, 93.96, 93.94, 95.93),
    (0.70, 93.62, 93.77, 93.98, 93.80, 95.89),
    (0.80, 92.89, 93.57, 93.90, 93.59, 95.80),
    (0.90, 90.30, 91.69, 93.14, 92.46, 95.55),
    (0.95, 83.64, 85.54, 88.92, 88.09, 94.70),
    (0.98, 32.25, 38.26, 55.45, 46.25, 90.73),
)
_RESNET20 = (
    (0.30, 90.77, 91.37, 91.35, 91.37, 91.25),
    (0.40, 89.98, 91.15, 91.21, 91.19, 91.20),
    (0.50, 88.44, 90.23, 90.58, 90.60, 91.04),
    (0.60, 85.24, 87.96, 88.88, 89.22, 90.78),
    (0.70, 78.79, 81.05, 81.84, 84.12, 90.38),
    (0.80, 54.01, 62.63, 51.28, 57.90, 88.72),
    (0.90, 11.79, 11.49, 13.68, 15.60, 79.32),
)
METHODS = ("magnitude", "woodfisher", "cbs", "chita", "chita_staged")
"""Columns of `ACCURACY`."""

ACCURACY: Mapping[str, Mapping[float, Mapping[str, float]]] = {
    network: {sparsity: dict(zip(METHODS, figures, strict=True)) for sparsity, *figures in table}
    for network, table in (("mlpnet_mnist", _MLPNET), ("resnet20_cifar10", _RESNET20))
}
"""``ACCURACY[network][sparsity][method]``; nothing is published for `resnet20a_cifar10`."""

MAGNITUDE_MEASURED: Mapping[str, Mapping[float, float]] = {
    "mlpnet_mnist": {0.90: 90.30, 0.95: 83.64, 0.98: 32.25},
    "resnet20_cifar10": {0.70: 77.91, 0.80: 52.15, 0.90: 10.99},
}
"""Magnitude pruning of the weights this project prunes: the first thing to reproduce.

Measured before counts were exact: the kept count was truncated, so that two cells differ in one weight. At
``n_prune = round(sparsity * n)`` MLPNet at .9 gives 90.28 (and 90.30 with 29 125 weights pruned, not 29 124),
ResNet20 at .7 gives 77.93 (and 77.91 with 187 084, not 187 085). The others agree exactly.
"""


def published_accuracy(network: str, method: str, sparsity: float) -> float | None:
    """Return the published test accuracy in per cent, or None where there is none."""
    cell = ACCURACY.get(network, {}).get(round(sparsity, 6), {})
    return cell.get(method)
