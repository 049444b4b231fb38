"""Arguments of `prune` where fields of its recipe stand beside them, for short tests."""

from __future__ import annotations

from typing import Any

from cbs_opt.recipe.records import Recipe


def arguments(**options: Any) -> dict[str, Any]:
    """Return `options` with those that are fields of a recipe gathered in one."""
    names = [name for name in options if name in Recipe.__dataclass_fields__]
    fields = {name: options.pop(name) for name in names}
    return {"recipe": Recipe(**fields), **options} if fields else options
