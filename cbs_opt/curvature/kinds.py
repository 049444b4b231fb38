"""Which Fisher matrix is sampled, and from how many samples: one record a kind."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from cbs_opt.system.checks import check_fields, flag, whole_number
from formulations.errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class _Fisher:
    """What every kind has: samples, and how many of them make one row."""

    kind: ClassVar[str]

    samples: int = 1000

    def __post_init__(self) -> None:
        for entry in fields(self):
            check: Any = flag if entry.name == "vectorize" else whole_number
            check_fields(self, "curvature.", check, entry.name)
        per_row: int = getattr(self, "per_row", 1)
        if per_row > self.samples:
            found = f"{per_row} of {self.samples} samples"
            raise ArgumentError("curvature.per_row", found, "average at most all samples into a row")


@dataclass(frozen=True, kw_only=True)
class _AnyLabels(_Fisher):
    per_row: int = 1
    vectorize: bool = True


class EmpiricalFisher(_AnyLabels):
    """Gradients at the labels of the data.

    Parameters
    ----------
    samples : int, default 1000
        Training samples to use.
    per_row : int, default 1
        Average that many samples into each row. A row is then the gradient of their mean loss, without
        a factor to make up for the smaller variance, as is usual in the pruning literature. An incomplete
        last row is dropped unless it is the only one.
    vectorize : bool, default True
        Differentiate many samples at once with `torch.func`, where it can follow the network; where it
        cannot, samples are taken one by one anyway. False takes one backward pass a row from the start,
        with less memory.

    Notes
    -----
    Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation for natural gradient
    descent", NeurIPS 2019. Averaged rows: Singh, Alistarh, "WoodFisher", NeurIPS 2020.
    """

    kind: ClassVar[str] = "empirical_fisher"


@dataclass(frozen=True, kw_only=True)
class ExactFisher(_Fisher):
    """One row ``sqrt(p_c) grad log p_c`` a sample and class: the Gauss-Newton matrix of cross-entropy.

    Parameters
    ----------
    samples : int, default 1000
        Training samples to use; each gives as many rows as there are classes.
    """

    kind: ClassVar[str] = "exact_fisher"
    per_row: ClassVar[int] = 1
    vectorize: ClassVar[bool] = True


class MonteCarloFisher(_AnyLabels):
    """Gradients at labels drawn from the network's own distribution.

    Parameters
    ----------
    samples, per_row, vectorize
        As in `EmpiricalFisher`.
    """

    kind: ClassVar[str] = "monte_carlo_fisher"


@dataclass(frozen=True, kw_only=True)
class SketchedFisher(_Fisher):
    """Gauss-Newton rows of several samples added up with random signs, one backward pass a row.

    For cross-entropy, of classes, positions or tokens, squared error and binary cross-entropy with logits.

    Parameters
    ----------
    samples : int, default 1000
        Training samples to use.
    per_row : int, default 1
        Samples added up in each row. All of them count: in expectation the model is the Gauss-Newton matrix
        of the loss, which for classifiers is the exact Fisher.
    """

    kind: ClassVar[str] = "sketched_fisher"
    vectorize: ClassVar[bool] = True

    per_row: int = 1


Fisher = EmpiricalFisher | ExactFisher | MonteCarloFisher | SketchedFisher
"""The kinds of gradient rows that `prune` computes."""
FISHERS: dict[str, type[Fisher]] = {
    record.kind: record for record in (EmpiricalFisher, ExactFisher, MonteCarloFisher, SketchedFisher)
}
"""The kinds by name."""
