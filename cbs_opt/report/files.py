"""A report as a folder: written with its masks, certificates, tables and page, and read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cbs_opt.certify.files import CERTIFICATES, load_certificates, save_certificates
from cbs_opt.network.masks import load_masks, save_masks
from cbs_opt.recipe.files import save_request
from cbs_opt.report.record import PruneReport, ReportFormatError
from formulations.errors import ArgumentError
from formulations.files import read_sealed, sealed_json, write_atomically

REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
RECIPE_FILE = "recipe.toml"
LAYERS_CSV = "layers.csv"
MASKS_FILE = "masks.safetensors"


def save_report(report: PruneReport, folder: str | os.PathLike[str]) -> Path:
    """Write report.json, layers.csv, report.html and, if any, recipe.toml, masks and certificates.

    The folder is made if missing, and returned. A report already there is replaced, each file at once;
    report.json comes last, so that where it is present the rest is complete. Raises `ArgumentError` if
    `folder` is a file; `OSError` if the disk refuses.
    """
    # matplotlib and jinja2 are loaded when the first page is drawn.
    from cbs_opt.report.html import write_comparison

    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ArgumentError("folder", f"{target} is a file", "pass a folder, or a name not yet used")
    target.mkdir(parents=True, exist_ok=True)
    for name in (REPORT_JSON, MASKS_FILE, RECIPE_FILE):
        (target / name).unlink(missing_ok=True)
    if report.masks:
        save_masks(target / MASKS_FILE, report.masks, metadata={"method": report.method})
    if report.request is not None:
        save_request(report.request, target / RECIPE_FILE)
    fingerprints = [block.fingerprint for block in report.blocks]
    save_certificates(fingerprints, report.certificates, target / CERTIFICATES)
    write_atomically(target / LAYERS_CSV, report.to_frame().to_csv(lineterminator="\n").encode())
    write_comparison([report], target / REPORT_HTML)
    write_atomically(target / REPORT_JSON, sealed_json(report.to_dict()))
    return target


def load_report(folder: str | os.PathLike[str]) -> PruneReport:
    """Read what `save_report` wrote.

    Raises `ReportFormatError` if there is no report, it is damaged, or of another version; `MaskFileError`
    or `InstanceFormatError` if the mask file or a certificate is damaged.
    """
    source = Path(folder)
    data = read_json(source / REPORT_JSON)
    masks = load_masks(source / MASKS_FILE) if (source / MASKS_FILE).exists() else {}
    return PruneReport.from_dict(data, masks=masks, certificates=load_certificates(source / CERTIFICATES))


def read_json(path: Path) -> Any:
    """Return the JSON object in a file with a checksum; raise `ReportFormatError` if it is not as written."""
    try:
        return read_sealed(path.read_bytes())
    except FileNotFoundError as error:
        raise ReportFormatError("folder", f"no {path.name} in {path.parent}", "pass a saved run") from error
    except (OSError, ValueError) as error:
        raise ReportFormatError("folder", f"{path} is damaged ({error})", "write the report again") from error
