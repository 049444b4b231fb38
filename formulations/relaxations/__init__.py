"""Continuous relaxations and the certified lower bounds they give."""

from formulations.relaxations.bounds import lower_bound
from formulations.relaxations.capped_simplex import CappedSimplexCertificate
from formulations.relaxations.certificate import Fixing, RelaxationCertificate
from formulations.relaxations.fisher_shape import FisherShape, fisher_shape
from formulations.relaxations.linear import LinearCertificate
from formulations.relaxations.perspective import PerspectiveCertificate
from formulations.relaxations.reduced_block import ReducedBlock, reduce_block
from formulations.relaxations.shared_hessian import lower_bounds

__all__ = [
    "CappedSimplexCertificate",
    "FisherShape",
    "Fixing",
    "LinearCertificate",
    "PerspectiveCertificate",
    "ReducedBlock",
    "RelaxationCertificate",
    "fisher_shape",
    "lower_bound",
    "lower_bounds",
    "reduce_block",
]
