"""What a pruning run did: counts, predicted and actual losses, times; as tables, text and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from cbs_opt.certify.certificates import CertifiedSum
from cbs_opt.certify.files import CERTIFICATES, load_certificates, save_certificates
from cbs_opt.network.evaluation import Evaluation
from cbs_opt.network.masks import load_masks, save_masks
from cbs_opt.recipe.records import Request
from cbs_opt.report import files as report_format
from cbs_opt.report import text as report_text
from cbs_opt.report.histogram import Histogram, shared_histograms
from cbs_opt.stages.state import StageRecord
from formulations.errors import ArgumentError
from formulations.files import sealed_json, write_atomically
from formulations.solution import BlockSolution

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
LAYERS_CSV = "layers.csv"
MASKS_FILE = "masks.safetensors"


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One parameter tensor before and after pruning.

    Parameters
    ----------
    name : str
        Name of the parameter.
    shape : tuple of int
        Its shape.
    n, n_prune : int
        Number of weights, and of those set to zero.
    weight_histogram_before, weight_histogram_after : Histogram, optional
        Both over the same bins; the second counts kept weights only.
    """

    name: str
    shape: tuple[int, ...]
    n: int
    n_prune: int
    weight_histogram_before: Histogram | None = None
    weight_histogram_after: Histogram | None = None

    @classmethod
    def from_weights(cls, name: str, before: Tensor, after: Tensor, keep: Tensor) -> LayerSummary:
        """Summarise a parameter from its values before and after and its boolean `keep`."""
        histogram_before, histogram_after = shared_histograms(before, after[keep])
        return cls(
            name=name,
            shape=tuple(before.shape),
            n=before.numel(),
            n_prune=before.numel() - int(keep.sum()),
            weight_histogram_before=histogram_before,
            weight_histogram_after=histogram_after,
        )

    @property
    def sparsity(self) -> float:
        """Share of the weights that are pruned."""
        return self.n_prune / self.n if self.n else 0.0


@dataclass(frozen=True, kw_only=True)
class BlockSummary:
    """One block: its losses as the quadratic model predicts them, and how the search went.

    Parameters
    ----------
    name : str
        Name of the block in its partition.
    n, n_prune : int
        Number of weights, and of those removed.
    selection_loss : float, optional
        Predicted loss increase with the kept weights as they were.
    updated_loss : float, optional
        Predicted loss increase after the update of the kept weights.
    initial_loss : float, optional
        Selection loss of the set that the search started from.
    iterations : int
        Steps of the search; 0 for methods that do not search.
    locally_optimal : bool, optional
        True if no single swap improves the set, False if the search ended before it knew; None for
        methods that do not search.
    seconds : float
        Time spent on this block; blocks solved as a batch share theirs evenly.
    bound : float, optional
        Proved lower bound on the objective of the program; None unless proved.
    gap : float, optional
        ``(objective - bound) / max(|objective|, 1e-12)``.
    status : str, default ""
        How the search ended.
    objective : float, optional
        Value of the chosen set under the program of the run, in float64; what `gap` refers to.
    certificate : str, optional
        The relaxation that proves `bound`, such as "perspective".
    certificate_status : str, default ""
        How the certification ended; "" if none was asked for.
    certificate_seconds : float, optional
        Time it took.
    rho : float, optional
        Damping over the mean diagonal of the block's Fisher matrix ``F``.
    effective_rank : float, optional
        ``tr(F)^2 / tr(F^2)``. Gaps fall with `rho` and with ``n / effective_rank``.
    n_fixed : int, optional
        Weights proved to have the same fate in every set as good as the best one known.
    fingerprint : str, default ""
        Of the float64 `BlockProblem` that was certified.
    """

    name: str
    n: int
    n_prune: int
    selection_loss: float | None
    updated_loss: float | None
    initial_loss: float | None
    iterations: int
    locally_optimal: bool | None
    seconds: float
    bound: float | None = None
    gap: float | None = None
    status: str = ""
    objective: float | None = None
    certificate: str | None = None
    certificate_status: str = ""
    certificate_seconds: float | None = None
    rho: float | None = None
    effective_rank: float | None = None
    n_fixed: int | None = None
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneReport:
    """The record of one `prune` call.

    Losses are mean losses a sample. Predicted increases come from the quadratic model of the loss
    at the trained weights, summed over blocks.

    Parameters
    ----------
    method, program : str
        Name of the selection method, and the program it solved.
    update : bool
        True if the kept weights were updated.
    curvature : str
        Which Fisher matrix the rows sample.
    partition : str or int
        How the weights were cut into blocks.
    budget : str or mapping
        How the pruned count was spread over blocks.
    requested_sparsity : float
        What was asked for.
    n, n_prune : int
        Weights that might be pruned, and those that were.
    layers : tuple of LayerSummary
    blocks : tuple of BlockSummary
    predicted_selection_loss : float, optional
        Predicted loss increase before the update.
    predicted_loss_increase : float, optional
        Predicted loss increase of the network as written back.
    train_before, train_after : Evaluation, optional
        On the samples that the curvature was taken from.
    before, after : Evaluation, optional
        On the evaluation data, where given.
    seconds : dict of str to float
        Wall-clock time by phase.
    peak_memory_bytes : int, optional
        Peak resident memory of the process.
    samples, rows : int
        Samples read for the curvature, and gradient rows made of them.
    damping : float
        Added to the diagonal of the Fisher matrix.
    layer_inputs : float
        Weight of the layer-input term; 0 without one.
    update_scale : float, optional
        Step length of the update; None without one.
    seed : int
    masks : dict of str to Tensor
        Boolean `keep` (True = kept) by parameter name. Not part of the JSON.
    request : Request, optional
        What the run was asked for, with every default made concrete; saved as ``recipe.toml``.
    kind : str
        Kind of the method: "saliency", "search", "exact", "bound" or "solver".
    versions : dict of str to str
        Versions of Python and of the libraries that took part.
    certified : CertifiedSum, optional
        The bounds of all blocks added up, where `prune` was asked to certify.
    certificates : tuple of BlockSolution
        The chosen set of every block with its bound and the evidence. Not part of the JSON.
    """

    method: str
    program: str
    update: bool
    curvature: str
    partition: str | int
    budget: str | Mapping[str, float]
    requested_sparsity: float
    n: int
    n_prune: int
    layers: tuple[LayerSummary, ...]
    blocks: tuple[BlockSummary, ...]
    predicted_selection_loss: float | None
    predicted_loss_increase: float | None
    train_before: Evaluation | None = None
    train_after: Evaluation | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    samples: int = 0
    rows: int = 0
    damping: float = 0.0
    layer_inputs: float = 0.0
    update_scale: float | None = None
    seed: int = 0
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    request: Request | None = field(default=None, repr=False)
    kind: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    certified: CertifiedSum | None = None
    certificates: tuple[BlockSolution, ...] = field(default=(), repr=False)
    stages: tuple[StageRecord, ...] = field(default=(), repr=False)

    @property
    def sparsity(self) -> float:
        """Achieved share of zeros among the weights that might be pruned."""
        return self.n_prune / self.n if self.n else 0.0

    @property
    def label(self) -> str:
        """Short name of the run for legends: method, program, layer-input term, update.

        The program is named where the method looks at it, and is not "selection".
        """
        searched = self.kind != "saliency"
        marks = ["joint"] if self.program == "joint" and searched else []
        marks += ["layer inputs"] if self.layer_inputs else []
        name = f"{self.method} ({', '.join(marks)})" if marks else self.method
        return f"{name} + update" if self.update else name

    @property
    def actual_loss_increase(self) -> float | None:
        """Measured increase on the curvature's own samples, to set against the prediction."""
        if self.train_before is None or self.train_after is None:
            return None
        return self.train_after.loss - self.train_before.loss

    @property
    def total_seconds(self) -> float:
        """Sum over phases."""
        return float(sum(self.seconds.values()))

    @property
    def locally_optimal(self) -> bool | None:
        """True if the search proved every block free of improving swaps; None if none searched."""
        known = [block.locally_optimal for block in self.blocks if block.locally_optimal is not None]
        return all(known) if known else None

    def to_frame(self) -> pd.DataFrame:
        """One row a layer, indexed by name; `attrs` holds the totals of the network.

        Of a certified run also ``objective``, ``bound`` and ``gap``, sums over the blocks of the layer;
        NaN where blocks span several layers.
        """
        return report_text.layers_frame(self)

    def blocks_frame(self) -> pd.DataFrame:
        """One row a block, indexed by name, with the fields of `BlockSummary`."""
        columns = [name for name in BlockSummary.__dataclass_fields__ if name != "name"]
        data = {name: [getattr(block, name) for block in self.blocks] for name in columns}
        return pd.DataFrame(data, index=pd.Index([block.name for block in self.blocks], name="block"))

    def stages_frame(self) -> pd.DataFrame:
        """One row a step of a run in stages, with the fields of `StageRecord`."""
        columns = list(StageRecord.__dataclass_fields__)
        return pd.DataFrame(
            {name: [getattr(record, name) for record in self.stages] for name in columns}, columns=columns
        )

    def summary(self) -> str:
        """A few lines for a terminal."""
        return "\n".join(report_text.summary_lines(self))

    def to_markdown(self) -> str:
        """Predicted losses and certified gaps as a Markdown table, one row a block."""
        return report_text.markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` can write; everything but the masks and the certificates."""
        return report_format.encode(self)

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        masks: Mapping[str, Tensor] | None = None,
        certificates: tuple[BlockSolution, ...] = (),
    ) -> PruneReport:
        """Inverse of `to_dict`.

        Raises
        ------
        ReportFormatError
            If `data` is not what `to_dict` gives.
        """
        files = {"masks": {} if masks is None else masks, "certificates": certificates}
        return report_format.decode(cls, data, files)

    def save(self, directory: str | Path) -> Path:
        """Write report.json, layers.csv, report.html and, if any, masks.safetensors and certificates.

        Parameters
        ----------
        directory : path
            Made if missing. A report already there is replaced, each file at once; report.json
            comes last, so that where it is present the rest is complete.

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        ArgumentError
            If `directory` is a file.
        OSError
            If the disk refuses.
        """
        from cbs_opt.report.html import write_comparison

        target = Path(directory)
        if target.exists() and not target.is_dir():
            raise ArgumentError(
                "directory", f"{target} is a file", "pass a directory, or a name not yet used"
            )
        target.mkdir(parents=True, exist_ok=True)
        (target / REPORT_JSON).unlink(missing_ok=True)
        if self.masks:
            save_masks(target / MASKS_FILE, self.masks, metadata={"method": self.method})
        else:
            (target / MASKS_FILE).unlink(missing_ok=True)
        save_certificates(self.blocks, self.certificates, target / CERTIFICATES)
        write_atomically(target / LAYERS_CSV, report_text.layers_csv(self).encode())
        write_comparison([self], target / REPORT_HTML)
        write_atomically(target / REPORT_JSON, sealed_json(self.to_dict()))
        return target

    @classmethod
    def load(cls, directory: str | Path) -> PruneReport:
        """Read what `save` wrote.

        Raises
        ------
        ReportFormatError
            If there is no report, or it is damaged.
        MaskFileError
            If the mask file is damaged.
        InstanceFormatError
            If a certificate is damaged.
        """
        source = Path(directory)
        data = report_format.read_json(source / REPORT_JSON)
        masks = load_masks(source / MASKS_FILE) if (source / MASKS_FILE).exists() else {}
        return cls.from_dict(data, masks=masks, certificates=load_certificates(source / CERTIFICATES))
