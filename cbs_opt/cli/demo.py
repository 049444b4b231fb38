"""`cbs-opt demo`: the embedded example, from training to a page of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cbs_opt.cli.errors import Debug, reported
from cbs_opt.cli.tables import comparison_lines, show

Out = Annotated[Path, typer.Option(help="Directory for report.html; made if missing.")]
Sparsities = Annotated[
    list[float] | None, typer.Option("--sparsity", help="In [0, 1). Repeatable; five levels by default.")
]
Seed = Annotated[int, typer.Option(help="Seed of the training and of every run.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the rows of the table as JSON on stdout.")]


def run(
    out: Out = Path("cbs-opt-demo"),
    sparsity: Sparsities = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a small network on scikit-learn's digits, prune it several ways, compare.

    Prints test accuracy, the increase of the training loss as predicted and as measured, and times;
    writes report.html with pictures.
    """
    with reported(debug, {"sparsity": "--sparsity", "seed": "--seed"}.get):
        from tqdm import tqdm

        from cbs_opt.demo import CONTENDERS, SPARSITIES, compare_on_digits
        from cbs_opt.report.html import write_comparison
        from cbs_opt.report.tables import comparison_frame

        levels = tuple(sparsity or SPARSITIES)
        out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(levels) * len(CONTENDERS), desc="runs", disable=None) as bar:
            reports = compare_on_digits(seed=seed, sparsities=levels, on_report=lambda _: bar.update())
        page = out / "report.html"
        write_comparison(reports, page, title="A digits network, pruned")
        show(comparison_frame(reports).to_dict("records"), comparison_lines(reports), as_json)
        typer.echo(f"pictures and details: {page}", err=True)
