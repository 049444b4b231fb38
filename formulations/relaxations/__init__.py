"""Continuous relaxations and the certified lower bounds they give."""

from formulations.relaxations.bounds import lower_bound
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.perspective import PerspectiveCertificate

__all__ = ["CappedSimplexCertificate", "PerspectiveCertificate", "lower_bound"]
