"""A report with what was certified: every block its bound, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cbs_opt.certify.certificates import CertifiedBlock, relative_gap
from cbs_opt.report.parts import BlockSummary, CertifiedSum
from cbs_opt.report.record import PruneReport


def with_certificates(report: PruneReport, certified: Sequence[CertifiedBlock]) -> PruneReport:
    """Return a report with a certified bound in every block summary, and their sum.

    Parameters
    ----------
    report : PruneReport
        Of the run that chose the sets.
    certified : sequence of CertifiedBlock
        In the order of ``report.blocks``, see `cbs_opt.certify.certificates.certify_blocks`.
    """
    blocks = tuple(_summary(*pair) for pair in zip(report.blocks, certified, strict=True))
    return replace(
        report,
        blocks=blocks,
        certified=CertifiedSum.of(report.program, blocks),
        certificates=tuple(block.solution for block in certified),
    )


def _summary(summary: BlockSummary, certified: CertifiedBlock) -> BlockSummary:
    solution, evidence = certified.solution, certified.solution.certificate
    return replace(
        summary,
        objective=solution.objective,
        bound=solution.bound,
        gap=relative_gap(solution.objective, solution.bound),
        certificate=None if evidence is None else evidence.kind,
        certificate_status=certified.status,
        certificate_seconds=solution.stats.seconds,
        rho=None if evidence is None else evidence.rho,
        effective_rank=None if evidence is None else evidence.effective_rank,
        n_fixed=None if evidence is None else evidence.n_fixed,
        fingerprint=certified.fingerprint,
    )
