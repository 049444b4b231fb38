"""Bytes as people write them."""

from __future__ import annotations

import re

UNITS: dict[str, int] = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": int(base**power)
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def readable(size: int) -> str:
    """``1536`` as "1.5 KiB"; exact below one KiB."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024.0:
            break
        amount, unit = amount / 1024.0, larger
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"


def parsed(text: str) -> int:
    """``"2GB"``, ``"500 MiB"`` or ``"1e9"`` as bytes.

    Raises
    ------
    ValueError
        If the text is no positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"{text!r} is no size; write such as 2GB or 500MiB")
    amount = float(match[1]) * float(UNITS[match[2]])
    if not 1.0 <= amount < 2.0**63:
        raise ValueError(f"{text!r} is no size of memory")
    return round(amount)
