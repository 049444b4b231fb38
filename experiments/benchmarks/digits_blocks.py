"""Blocks to time exact methods on: real ones from a digits network, synthetic correlated ones."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass

import numpy as np

from formulations import BlockProblem
from formulations.problem import FloatArray

HIDDEN = 128
TRAINED_ON = 1500


@dataclass(frozen=True, kw_only=True)
class HiddenLayer:
    """What the gradients of the middle layer of the network are made of.

    Attributes
    ----------
    inputs : (TRAINED_ON, HIDDEN) float64 array
        Activations that enter the layer.
    deltas : (TRAINED_ON, HIDDEN) float64 array
        Derivative of each sample's cross-entropy by the layer's pre-activations.
    weights : (HIDDEN, HIDDEN) float64 array
        One row an output neuron.
    """

    inputs: FloatArray
    deltas: FloatArray
    weights: FloatArray


@functools.lru_cache(maxsize=2)
def trained_layer(epochs: int = 60) -> HiddenLayer:
    """Train 64-128-128-10 on scikit-learn's digits; fewer `epochs` leave a larger Fisher."""
    from sklearn.datasets import load_digits
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    images, labels = load_digits(return_X_y=True)
    images = images[:TRAINED_ON] / 16.0
    labels = labels[:TRAINED_ON]
    network = MLPClassifier((HIDDEN, HIDDEN), alpha=1e-4, max_iter=epochs, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(images, labels)
    first = np.maximum(images @ network.coefs_[0] + network.intercepts_[0], 0.0)
    second = np.maximum(first @ network.coefs_[1] + network.intercepts_[1], 0.0)
    logits = second @ network.coefs_[2] + network.intercepts_[2]
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    probabilities[np.arange(TRAINED_ON), labels] -= 1.0
    deltas = (probabilities @ network.coefs_[2].T) * (second > 0.0)
    return HiddenLayer(inputs=first, deltas=deltas, weights=network.coefs_[1].T.copy())


def digits_block(
    n: int, damping: float, n_prune: int, *, samples: int = 1000, seed: int = 0, epochs: int = 60
) -> BlockProblem:
    """Return the incoming weights of consecutive hidden neurons, from the one of median Fisher trace on.

    Parameters
    ----------
    n : int
        Number of weights, at most ``HIDDEN ** 2``.
    damping : float
    n_prune : int
    samples : int, default 1000
        Per-sample gradients in the Fisher matrix.
    seed : int, default 0
        Chooses the samples and, as an offset from the median, the first neuron.
    epochs : int, default 60
        Training of the network.
    """
    layer = trained_layer(epochs)
    chosen = np.random.default_rng(seed).permutation(TRAINED_ON)[:samples]
    order = np.argsort((layer.deltas**2).mean(axis=0))
    first = int(order[(HIDDEN // 2 + seed) % HIDDEN])
    neurons = (first + np.arange(-(-n // HIDDEN))) % HIDDEN
    gradients = (layer.deltas[chosen][:, neurons, None] * layer.inputs[chosen][:, None, :]).reshape(
        samples, -1
    )
    return BlockProblem(
        weights=layer.weights[neurons].ravel()[:n],
        rows=gradients[:, :n] / np.sqrt(samples),
        damping=damping,
        n_prune=n_prune,
        name=f"digits n={n} damping={damping:g} k={n_prune}",
    )


def synthetic_block(
    n: int, rho: float, n_prune: int, *, samples: int = 1000, seed: int = 0, correlation: float = 0.9
) -> BlockProblem:
    """Correlated Gaussian rows of full rank with uneven columns and samples.

    Parameters
    ----------
    n : int
    rho : float
        Damping as a share of the mean Fisher diagonal.
    n_prune : int
    samples, seed, correlation
        Rows; random seed; share of the variance in ``n / 4`` common factors.
    """
    generator = np.random.default_rng(1000 + seed)
    factors = max(2, n // 4)
    loadings = generator.normal(size=(factors, n))
    common = generator.normal(size=(samples, factors)) @ loadings / np.sqrt(factors)
    own = generator.normal(size=(samples, n))
    gradients = np.sqrt(correlation) * common + np.sqrt(1.0 - correlation) * own
    gradients *= np.exp(0.7 * generator.normal(size=n))[None, :]
    gradients *= np.exp(0.5 * generator.normal(size=samples))[:, None]
    rows = gradients / np.sqrt(samples)
    return BlockProblem(
        weights=generator.normal(size=n) * 0.1,
        rows=rows,
        damping=rho * float((rows**2).sum(axis=0).mean()),
        n_prune=n_prune,
        name=f"synthetic n={n} rho={rho:g} k={n_prune}",
    )
