"""What every HTML page is made of: templates, and pictures as data addresses, so that one file is all."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image as a data address, with what it shows in words."""

    source: str
    caption: str


def embedded(figure: Figure, caption: str) -> Picture:
    """Return a figure as SVG within the page."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(content.getvalue()).decode("ascii")
    return Picture(source=f"data:image/svg+xml;base64,{encoded}", caption=caption)


def render(template: str, *, package: str = "cbs_opt.report", **values: object) -> str:
    """Return a page from a template of `package` or of the report; a value that it misses is an error."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("cbs_opt.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)
