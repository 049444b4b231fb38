"""Print what `prune` makes of every kind of network and batch, or bring the page with that table up to date.

python -m experiments.any_network
python -m experiments.any_network --page docs/guides/networks.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from experiments.any_network.outcome import CASES, run
from experiments.any_network.page import table
from experiments.studies_page import between_marks
from formulations.files import write_atomically

MARK = "networks"


def main(
    page: Annotated[Path | None, typer.Option(help="Put the table between the marks of this page.")] = None,
) -> None:
    """Prune every kind of network by the defaults, and make a table of the results."""
    text = table(map(run, CASES))
    if page is None:
        typer.echo(text)
    else:
        write_atomically(page, between_marks(page.read_text(encoding="utf-8"), MARK, text).encode())


if __name__ == "__main__":
    typer.run(main)
