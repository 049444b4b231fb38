"""A diagonal split for every channel: ``C_c + damping I - D_c`` semidefinite is all that is needed.

The bound is concave in ``D`` with a supergradient that the relaxation gives; ``D_c`` follows the central path
of ``max slopes.D_c`` by Newton steps, as in `formulations.relaxations.diagonal_split`, but in LAPACK and in
single precision, channel by channel. What a certificate uses is factorised again in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.lapack import spotrf, spotri, spotrs

from formulations.problem import BlockProblem, FloatArray, IntArray
from formulations.relaxations.certified import column_norms, definiteness_margin
from formulations.relaxations.channel_system import Alike, alike, unit_matrix
from formulations.relaxations.diagonal_split import INTERIOR_SHARE
from formulations.solution import Stopped

SingleArray = NDArray[np.float32]

MOST_WORK = 2e12
"""Cubes of the orders of all channels, above which channels that differ by a factor share one split."""
LARGEST_ORDER = 4096
"""Order above which a channel's split is left as the damping gives it."""
SHORTEST = 1e-3
"""Step length below which a Newton step is given up."""
BACK_OFF = 0.9
"""Share of a step that was cut: off the boundary of the cone."""
LEAST_GAIN = 2e-3
"""Share of an even part of the gap that a step must promise, else its channel rests."""
REST = 2
"""Rounds that a channel rests."""
HALVINGS = 40
"""Steps back towards the start before a channel's split is what the damping gives."""


class ChannelSplits:
    """Diagonal splits of a block whose term is over channels.

    Parameters
    ----------
    problem : BlockProblem
        With channels.

    Attributes
    ----------
    value : (n,) float64 array
        The current split; feasible as far as single precision tells.
    """

    def __init__(self, problem: BlockProblem, *, apart: bool = False) -> None:
        """Begin with a share of the damping; channels that are `apart` never share a split."""
        assert problem.channels is not None
        self.problem, self.term = problem, problem.channels
        self.diagonal = self.term.diagonal() + problem.damping
        groups = alike(self.term)
        if apart or sum(len(group.channels) * group.place.shape[1] ** 3 for group in groups) <= MOST_WORK:
            groups = [one for group in groups for one in group.singly()]
        self.groups = groups
        self.start = self._start()
        self.value = self.start.copy()
        self._rest = np.zeros(len(groups), dtype=np.int64)

    @property
    def feasible(self) -> bool:
        """Whether there is a positive split."""
        return bool((self.start > 0.0).all())

    def improve(
        self, slopes: FloatArray, gaps: FloatArray, parts: IntArray, barrier: float, stopped: Stopped
    ) -> None:
        """Make a Newton step for every channel.

        Parameters
        ----------
        slopes : (n,) float64 array
            Supergradient of the bound in the split, non-negative.
        gaps : (p,) float64 array
            What is open in each part of the block, in units of the loss.
        parts : (p + 1,) int64 array
            Where the parts begin, and n; each holds whole channels.
        barrier : float
            Weight of the barrier, relative to an even part of the gap: at its centre the split is within
            ``2 barrier gap`` of the best one for these slopes.
        stopped : callable
            Asked between channels whether the time is over.
        """
        part_of = np.searchsorted(parts, [group.place[0, 0] for group in self.groups], side="right") - 1
        weights = barrier * gaps / np.diff(parts)
        wanted = LEAST_GAIN * gaps / np.maximum(np.bincount(part_of, minlength=gaps.size), 1)
        for number, (group, part) in enumerate(zip(self.groups, part_of, strict=True)):
            if self._rest[number]:
                self._rest[number] -= 1
            elif group.place.shape[1] <= LARGEST_ORDER:
                if stopped():
                    return
                gain = self._step(group, slopes, float(weights[part]))
                self._rest[number] = REST if gain < wanted[part] else 0

    def proved(self, split: FloatArray) -> FloatArray:
        """Return `split`, moved towards the start where a channel is not proved semidefinite in float64."""
        proved = split.copy()
        norms = column_norms(self.problem) ** 2
        for channel, span in enumerate(self.term.spans()):
            matrix = self.term.matrix(channel)
            order = np.diag_indices(len(matrix))
            # Twice what the certificate allows for.
            allowance = 2.0 * definiteness_margin(self.problem, len(matrix)) * norms[span]
            matrix[order] += self.problem.damping - allowance
            safe, wanted, share = self.start[span], split[span], 1.0
            for _ in range(HALVINGS):
                trial = matrix.copy()
                trial[order] -= proved[span]
                try:
                    cholesky(trial, lower=True, overwrite_a=True, check_finite=False)
                    break
                except LinAlgError:
                    share = 1.0 - 2.0 * (1.0 - share) if share < 1.0 else 1.0 - 1e-6
                    proved[span] = safe + max(share, 0.0) * (wanted - safe)
                    if share <= 0.0:
                        break
        return proved

    def _start(self) -> FloatArray:
        """Return an interior split: a share of the damping, or of the least eigenvalue without one."""
        floor = np.full(self.term.n, self.problem.damping)
        if self.problem.damping == 0.0:
            for group in alike(self.term):
                matrix = unit_matrix(self.term, group)
                root = np.sqrt(np.diagonal(matrix))
                lowest = 0.0
                if bool((root > 0.0).all()):
                    lowest = float(np.linalg.eigvalsh(matrix / root[:, None] / root)[0])
                floor[group.place] = max(lowest - 1e-12 * len(matrix), 0.0) * self.diagonal[group.place]
        return INTERIOR_SHARE * floor

    def _step(self, group: Alike, slopes: FloatArray, weight: float) -> float:
        """Make one Newton step on the split of a group; return what the bound gains in the first order."""
        scale = self.term.scale[group.channels]
        largest = int(np.argmax(scale))
        ratio = scale / scale[largest] if scale[largest] > 0.0 else np.ones(scale.size)
        place = group.place[largest]
        unit = self.diagonal[place]
        slope = ratio @ slopes[group.place] * unit
        root = np.sqrt(unit)
        matrix = (scale[largest] / root[:, None] / root) * unit_matrix(self.term, group)
        matrix[np.diag_indices(len(matrix))] += self.problem.damping / unit
        split = self.value[place] / unit
        better = _newton(matrix.astype(np.float32), split, slope / weight)
        if better is None:
            return 0.0
        self.value[group.place] = ratio[:, None] * (better * unit)
        return float(slope @ (better - split))


def _newton(matrix: SingleArray, split: FloatArray, slope: FloatArray) -> FloatArray | None:
    """Return a split after a damped Newton step on ``slope.D + log det(matrix - D) + sum log D``.

    None if single precision does not tell a direction, or no step stays inside the cone.
    """
    order = np.diag_indices(split.size)
    slack = matrix.copy(order="F")
    slack[order] -= split
    factor, failed = spotrf(slack, lower=1, clean=0)
    if failed:
        return None
    inverse, failed = spotri(factor, lower=1, overwrite_c=1)
    if failed:
        return None
    gradient = slope - np.diagonal(inverse) + 1.0 / split
    # Only the lower triangle is read.
    curvature = inverse * inverse
    curvature[order] = (curvature[order] + 1.0 / split**2) * (1.0 + 1e-5)
    factor, failed = spotrf(curvature, lower=1, clean=0, overwrite_a=1)
    if failed or not np.isfinite(gradient).all():
        return None
    direction, failed = spotrs(factor, gradient.astype(np.float32), lower=1)
    if failed or not np.isfinite(direction).all():
        return None
    length = 1.0
    while length > SHORTEST:
        candidate = split + length * direction
        if bool((candidate > 0.0).all()):
            slack = matrix.copy(order="F")
            slack[order] -= candidate
            if not spotrf(slack, lower=1, clean=0, overwrite_a=1)[1]:
                share = length if length == 1.0 else BACK_OFF * length
                return np.asarray(split + share * direction)
        length *= 0.5
    return None
