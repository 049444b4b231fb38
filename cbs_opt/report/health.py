"""What looks wrong with a pruned network, from its losses before and after and what the model foretold."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from cbs_opt.network.evaluation import Evaluation

TIERS = ((5.0, 0.25, 0.05), (50.0, 0.02, 0.02))
"""From which increase the model of the loss was not to be trusted, either way: in units of the predicted one,
in shares of the loss before, and, for classifiers, whose losses may be as good as 0, in nats."""
DEVIATIONS = 2.0
"""Standard deviations above the accuracy of a guess up to which a network does no better."""
ADVICE = "prune in stages (stages=4), less (a lower sparsity), or with more samples in the curvature"


def label_share(labels: Iterable[Any]) -> float | None:
    """Return the share of the most frequent class among batches of labels; None if they are no classes.

    Negative labels are none: losses ignore them.
    """
    counts: Counter[int] = Counter()
    for batch in labels:
        if not isinstance(batch, Tensor) or batch.ndim != 1 or batch.is_floating_point():
            return None
        counts.update(label for label in batch.tolist() if label >= 0)
    return max(counts.values()) / counts.total() if counts else None


def warnings_of(
    before: Evaluation | None, after: Evaluation | None, *, predicted: float | None, guess: float | None
) -> Iterator[str]:
    """Yield what looks wrong, in sentences that say what to do.

    `before`, `after`: on the same samples. `predicted`: loss increase by the quadratic model, None without
    one. `guess`: accuracy of always naming the most frequent class, None where there are no classes.
    """
    if before is None or after is None:
        return
    if math.isfinite(before.loss) and not math.isfinite(after.loss):
        yield f"the loss went from {before.loss:.4g} to {after.loss}: the network is broken; {ADVICE}"
        return
    if guess is not None and before.accuracy is not None and after.accuracy is not None:
        level = guess + DEVIATIONS * math.sqrt(guess * (1.0 - guess) / after.samples)
        if after.accuracy <= level < before.accuracy:
            yield f"the network does no better than a guess, accuracy {after.accuracy:.1%}; {ADVICE}"
    rise = after.loss - before.loss
    if predicted is None:
        return
    for factor, share, nats in TIERS:
        least = max(share * abs(before.loss), nats if before.accuracy is not None else 0.0)
        if rise > least and rise > factor * max(predicted, 0.0):
            yield f"the loss rose by {rise:.4g} where {predicted:.4g} was predicted; {ADVICE}"
            return
