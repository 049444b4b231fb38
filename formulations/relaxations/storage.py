"""Certificates as plain header entries and arrays: what a solution file holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from formulations.relaxations.block_split import BlockSplitCertificate
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.relaxations.cluster_split import ClusterSplitCertificate
from formulations.relaxations.linear import LinearCertificate
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.solution import Certificate, Subject

CERTIFICATES: dict[str, tuple[type[Any], tuple[str, ...]]] = {
    "perspective": (PerspectiveCertificate, ("point", "split")),
    "block_perspective": (BlockSplitCertificate, ("point", "blocks")),
    "cluster_perspective": (ClusterSplitCertificate, ("point", "order", "blocks")),
    "capped_simplex": (CappedSimplexCertificate, ("point", "shift")),
    "mccormick": (LinearCertificate, ("above", "below", "degree")),
    "rlt": (LinearCertificate, ("above", "below", "degree")),
}
"""Certificates that a solution file can hold: class and array fields by kind."""
LONGEST_CHAIN = 64


def certificate_entries(
    certificate: Certificate | None,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Header entries (plain JSON) and arrays of a certificate, then of its basis, and so on.

    Both are empty for a certificate of a kind that files do not hold.
    """
    entries: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {}
    current = certificate
    while isinstance(current, RelaxationCertificate) and current.kind in CERTIFICATES:
        prefix = _prefix(len(entries))
        for name in CERTIFICATES[current.kind][1]:
            # Places in arrays are whole numbers, which float64 holds.
            arrays[prefix + name] = np.asarray(getattr(current, name), dtype=np.float64)
        fixing = current.fixing
        if fixing is not None:
            arrays[f"{prefix}keep"], arrays[f"{prefix}prune"] = fixing.keep, fixing.prune
        entries.append(
            {
                "kind": current.kind,
                "subject": None if current.subject is None else asdict(current.subject),
                "rho": current.rho,
                "effective_rank": current.effective_rank,
                "cutoff": None if fixing is None else fixing.cutoff,
            }
        )
        current = current.basis
    return entries, arrays


def restored_certificate(
    entries: Sequence[Mapping[str, Any]], arrays: Mapping[str, np.ndarray]
) -> RelaxationCertificate | None:
    """Return the certificate that `certificate_entries` described.

    Raises
    ------
    KeyError, TypeError, ValueError
        If entries and arrays do not describe one.
    """
    if len(entries) > LONGEST_CHAIN:
        raise ValueError(f"a chain of {len(entries)} certificates")
    certificate: RelaxationCertificate | None = None
    for place in reversed(range(len(entries))):
        entry, prefix = entries[place], _prefix(place)
        cls, names = CERTIFICATES[entry["kind"]]
        fixing = None
        if entry.get("cutoff") is not None:
            keep, prune = arrays[f"{prefix}keep"], arrays[f"{prefix}prune"]
            fixing = Fixing(keep=keep, prune=prune, cutoff=float(entry["cutoff"]))
        subject = entry.get("subject")
        named = {"relaxation": entry["kind"]} if cls is LinearCertificate else {}
        certificate = cls(
            **named,
            **{name: arrays[prefix + name] for name in names},
            subject=None if subject is None else Subject(**subject),
            rho=entry.get("rho"),
            effective_rank=entry.get("effective_rank"),
            fixing=fixing,
            basis=certificate,
        )
    return certificate


def _prefix(place: int) -> str:
    return "certificate_" if place == 0 else f"basis_{place}_"
