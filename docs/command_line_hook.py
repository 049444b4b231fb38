"""Describe every command and option on the page of the command line while the site is built."""

from __future__ import annotations

from typing import Any

import typer

from cbs_opt.cli import app

PLACE = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker by a section a command, in the order of ``cbs-opt --help``."""
    return markdown.replace(PLACE, _sections()) if PLACE in markdown else markdown


def _sections() -> str:
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="cbs-opt")
    names = group.list_commands(context)
    return "\n\n".join(_section(name, group.get_command(context, name), context) for name in names)


def _section(name: str, command: Any, parent: typer.Context) -> str:
    context = typer.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.collect_usage_pieces(context))
    options = command.get_params(context)
    records = [record for option in options if (record := option.get_help_record(context))]
    text = (command.help or "").split("\f")[0].strip()
    parts = [f"## {name}", text, f"    cbs-opt {name} {usage}"]
    if records:
        rows = [f"| `{_cell(option)}` | {_cell(help_text)} |" for option, help_text in records]
        parts.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
