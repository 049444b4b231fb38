"""Files that are either the old ones or complete new ones, whatever happens in between."""

from __future__ import annotations

import secrets
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the contents of `path` in one step; if that fails, the old file stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
