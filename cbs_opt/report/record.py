"""What a pruning run did: counts, predicted and actual losses, times."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cbs_opt.network.eligible import LeftOut, by_reason
from cbs_opt.network.evaluation import Evaluation
from cbs_opt.recipe.files import request_from_plain, request_to_plain, to_toml
from cbs_opt.recipe.records import Request
from cbs_opt.report.numbers import MISSING, gap_text, percent_text
from cbs_opt.report.parts import BlockSummary, CertifiedSum, LayerSummary, StageRecord
from cbs_opt.system.plain import plain, rebuilt
from formulations.errors import InstanceFormatError
from formulations.solution import BlockSolution

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "cbs-opt report"
VERSION = 5
READ = (2, 3, 4, VERSION)
"""Versions that are read: 2 has no `left_out`, `notes` and `warnings`, 3 no `recalibrated`, 4 no `moved`."""
GIVEN_ROWS = {"kind": "given"}
"""Curvature of a recipe whose rows were computed before the run."""
FRAME = ("layer", "shape", "dtype", "n", "n_prune", "sparsity", "left_out")
"""What `to_frame` has of every parameter."""
SHOWN = 5
"""Names that a summary or a note lists at most."""
SHOWN_LAYERS = 20
"""Layers that a notebook shows at most."""
APART = ("masks", "certificates", "request")
"""Fields of a report that have files or a format of their own."""


class ReportFormatError(InstanceFormatError):
    """A file or mapping is not a report of ours, or is damaged."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneReport:
    """The record of one `prune` call.

    Losses are mean losses a sample. Predicted increases come from the quadratic model of the loss
    at the trained weights, summed over blocks.

    Parameters
    ----------
    method, kind, program : str
        Name of the selection method, its kind ("saliency", "search", "exact", "bound" or "solver"), and the
        program it solved.
    update, update_scale : bool and float, optional
        Whether the kept weights were updated, and the step length; None without an update.
    curvature : str
        Which Fisher matrix the rows sample.
    partition, budget : str or int, str or mapping
        How the weights were cut into blocks, and the pruned count was spread over them.
    requested_sparsity : float
        What was asked for.
    recalibrated : bool
        Whether batch-norm statistics of the network were estimated anew on the way, and taken.
    moved : tuple of str
        Names of the parameters that moved with the kept weights and could not be pruned: biases, scales and
        shifts of norms.
    pattern : str
        Such as "2:4", where so many of every m consecutive inputs of an output were to stay; else empty.
    n, n_prune : int
        Weights that might be pruned, and those that were.
    left_out : tuple of LeftOut
        The other parameters of the network, each with its name, shape and reason.
    notes : tuple of str
        What was changed so that the run fits the machine, or left out as too costly, in sentences.
    choices : tuple of str
        What the recipe was chosen by, in sentences, where it was called by name.
    warnings : tuple of str
        What looks wrong with the pruned network, and what to do about it, in sentences.
    layers, blocks, stages : tuple of LayerSummary, BlockSummary, StageRecord
        Every layer, every block, and every step of a run in stages.
    predicted_selection_loss, predicted_loss_increase : float, optional
        Predicted loss increase before the update, and of the network as written back.
    train_before, train_after, before, after : Evaluation, optional
        On the samples that the curvature was taken from, and on the evaluation data, where given.
    seconds, peak_memory_bytes : dict of str to float, and int, optional
        Wall-clock time by phase, and peak resident memory of the process.
    samples, rows : int
        Samples read for the curvature, and gradient rows made of them.
    damping, layer_inputs : float
        Added to the diagonal of the Fisher matrix, and weight of the layer-input term; 0 without one.
    seed : int
    masks : dict of str to Tensor
        Boolean `keep` (True = kept) by parameter name. Not part of the JSON.
    request : Request, optional
        What the run was asked for, with every default made concrete; saved as ``recipe.toml``. None of a
        report that was read, if its rows were computed before the run.
    versions : dict of str to str
        Versions of Python and of the libraries that took part.
    certified, certificates : CertifiedSum, optional, and tuple of BlockSolution
        Where `prune` was asked to certify: the bounds of all blocks added up, and the chosen set of every
        block with its bound and the evidence. The latter are not part of the JSON.
    """

    method: str
    kind: str
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
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    request: Request | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    certified: CertifiedSum | None = None
    certificates: tuple[BlockSolution, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pattern: str = ""
    recalibrated: bool = False
    moved: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Achieved share of zeros among the weights that might be pruned."""
        return self.n_prune / self.n if self.n else 0.0

    @property
    def network_sparsity(self) -> float:
        """Share of pruned weights among all weights of the network, those that were left out among them."""
        whole = self.n + sum(entry.n for entry in self.left_out)
        return self.n_prune / whole if whole else 0.0

    @property
    def label(self) -> str:
        """Short name of the run for legends: method, program, layer-input term, update, fine-tuning.

        The program is named where the method looks at it, and is not "selection".
        """
        marks = ["joint"] if self.program == "joint" and self.kind != "saliency" else []
        marks += ["layer inputs"] if self.layer_inputs else []
        name = f"{self.method} ({', '.join(marks)})" if marks else self.method
        name += " + update" if self.update else ""
        return f"{name} + fine-tuning" if any(record.rate_kind for record in self.stages) else name

    @property
    def recipe(self) -> str:
        """What was chosen, by what, and the recipe that came of it as TOML that runs again."""
        lines = [f"# {choice}" for choice in self.choices]
        if self.request is not None:
            lines.append(to_toml(request_to_plain(self.request)))
        return "\n".join(lines)

    @property
    def evaluations(self) -> tuple[Evaluation | None, Evaluation | None]:
        """Before and after: on the evaluation data where there is some, else on the curvature's samples."""
        if self.after is not None:
            return self.before, self.after
        return self.train_before, self.train_after

    @property
    def loss_before_update(self) -> float | None:
        """Predicted loss increase before the update; None without an update."""
        return self.predicted_selection_loss if self.update else None

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
        answers = [block.locally_optimal for block in self.blocks if block.locally_optimal is not None]
        return all(answers) if answers else None

    def __repr__(self) -> str:
        """Return method, counts and sparsity in one line."""
        return f"PruneReport({self.summary().splitlines()[0]})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the summary, and the sparsity of the layers, some of them if many."""
        frame = self.to_frame()
        columns = [name for name in ("shape", "n", "n_prune", "sparsity", "gap") if name in frame]
        formats: dict[str, Any] = {"sparsity": percent_text, "gap": gap_text}
        layers = frame.loc[frame["left_out"] == "", columns].dropna(axis=1, how="all")
        table = layers.to_html(max_rows=SHOWN_LAYERS, formatters=formats, na_rep=MISSING)
        return f"<pre>{html.escape(self.summary())}</pre>{table}"

    def to_frame(self) -> pd.DataFrame:
        """Return one row a parameter, indexed by name; `attrs` has the totals of those that might be pruned.

        Columns are ``shape``, ``dtype``, ``n``, ``n_prune``, ``n_keep``, ``sparsity`` and ``left_out``, the
        reason why a parameter was not to be pruned, empty for the others, which come first. Of a certified
        run also ``objective``, ``bound`` and ``gap``, sums over the blocks of the layer; NaN where blocks
        span several layers.
        """
        import pandas as pd

        rows = [
            (layer.name, layer.shape, layer.dtype, layer.n, layer.n_prune, layer.sparsity, "")
            for layer in self.layers
        ]
        rows += [(entry.name, entry.shape, "", entry.n, 0, 0.0, entry.reason) for entry in self.left_out]
        frame = pd.DataFrame(rows, columns=FRAME).set_index("layer")
        frame["shape"] = ["x".join(map(str, shape)) for shape in frame["shape"]]
        frame.insert(4, "n_keep", frame["n"] - frame["n_prune"])
        frame.attrs.update(n=self.n, n_prune=self.n_prune, sparsity=self.sparsity)
        if self.certified is not None:
            sums = [self._sum_within(name) for name in frame.index]
            for name in ("objective", "bound", "gap"):
                frame[name] = np.array([getattr(total, name, None) for total in sums], dtype=float)
            frame.attrs["certified"] = self.certified
        return frame

    def stages_frame(self) -> pd.DataFrame:
        """Return one row a step of a run in stages, with the fields of `StageRecord`."""
        import pandas as pd

        return pd.DataFrame(map(vars, self.stages), columns=[f.name for f in fields(StageRecord)])

    def summary(self) -> str:
        """Return a few lines for a terminal."""
        inputs = f", layer inputs {self.layer_inputs:g}" if self.layer_inputs else ""
        lines = [
            f"{self.label}: {self.n_prune} of {self.n} weights pruned, "
            f"{f'pattern {self.pattern}, ' if self.pattern else ''}sparsity {self.sparsity:.4f}"
            f"{self._of_network()}",
            f"{self.curvature}, {self._sampled()}, damping {self.damping:g}"
            f"{inputs}; partition {self.partition} ({len(self.blocks)} blocks)",
        ]
        if self.predicted_loss_increase is not None:
            line = f"loss increase: predicted {self.predicted_loss_increase:.4g}"
            if self.loss_before_update is not None:
                line += f" ({self.loss_before_update:.4g} before the update)"
            if self.actual_loss_increase is not None:
                line += f", actual {self.actual_loss_increase:.4g}"
            lines.append(line)
        if self.moved:
            lines.append(f"moved with the kept weights: {listed(self.moved)}")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.certified is not None:
            lines += self.certified.lines()
        if self.train_before is not None and self.train_after is not None:
            lines.append(f"training data: {_change(self.train_before, self.train_after)}")
        if self.before is not None and self.after is not None:
            lines.append(f"evaluation data: {_change(self.before, self.after)}")
        if self.seconds:
            phases = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds.items())
            lines.append(f"{self.total_seconds:.2f} s ({phases})")
        return "\n  ".join(lines)

    def _sampled(self) -> str:
        """Return how many rows there are, and samples."""
        if self.stages:
            return f"{self.rows} rows a stage, {self.samples} samples differentiated in all"
        return f"{self.rows} rows of {self.samples} samples"

    def _of_network(self) -> str:
        """Return the sparsity of the whole network, and what was left out of it, by reason."""
        if not self.left_out:
            return ""
        parts = []
        for reason, entries in by_reason(self.left_out).items():
            noun = "parameter" if len(entries) == 1 else "parameters"
            parts.append(f"{reason}: {len(entries)} {noun}, {sum(entry.n for entry in entries):,} weights")
        return f" ({self.network_sparsity:.4f} of the whole network)\n  left out: {'; '.join(parts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `json` can write; everything but the masks and the certificates."""
        body = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in APART}
        request = None if self.request is None else plain(request_to_plain(self.request))
        return {"format": FORMAT, "version": VERSION, **body, "request": request}

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        *,
        masks: Mapping[str, Tensor] | None = None,
        certificates: tuple[BlockSolution, ...] = (),
    ) -> PruneReport:
        """Return the report of which `to_dict` gave `data`.

        Raises `ReportFormatError` if `data` is not what `to_dict` gives, or of another version.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ReportFormatError("data", f'no "format": "{FORMAT}"', "pass what PruneReport.to_dict gave")
        if data.get("version") not in READ:
            version = f"version {data.get('version')!r} of the report format"
            remedy = (
                f"this release reads {READ[0]} to {VERSION}: prune again, or read it with its own release"
            )
            raise ReportFormatError("data", version, remedy)
        body = {name: value for name, value in data.items() if name not in ("format", "version", "request")}
        try:
            report: PruneReport = rebuilt(cls, body)
            request = _request(data.get("request"))
        except (TypeError, ValueError, AttributeError) as error:
            raise ReportFormatError("data", f"damaged report ({error})", "write the report again") from error
        return replace(report, masks=masks or {}, certificates=certificates, request=request)

    def _sum_within(self, layer: str) -> CertifiedSum | None:
        """Return the sum over the blocks that lie within a layer, None if there is none."""
        blocks = [b for b in self.blocks if b.name == layer or b.name.startswith(f"{layer}[")]
        return CertifiedSum.of(self.program, blocks) if blocks else None


def listed(names: Sequence[str]) -> str:
    """Return names in a line, the first ones and how many more where they are many."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def _request(document: Mapping[str, Any] | None) -> Request | None:
    """Return a request from its plain values, None if its rows are not on file."""
    if document is None or any(r.get("curvature") == GIVEN_ROWS for r in document.get("recipe", ())):
        return None
    return request_from_plain(document)


def _change(before: Evaluation, after: Evaluation) -> str:
    text = f"loss {before.loss:.4f} -> {after.loss:.4f}"
    if before.accuracy is not None and after.accuracy is not None:
        text += f", accuracy {before.accuracy:.2%} -> {after.accuracy:.2%}"
    return f"{text} ({after.samples} samples)"
