"""The operations that a network is made of, as they are run: watched, and counted."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class OperationMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that leaves the compiler of PyTorch out.

    The others import it at their first operation, which takes longer than pruning a small network.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class OperationCounter(OperationMode):
    """Adds up the floating-point operations of products in `total`, while it is active as a context."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **given, out_val=result)
        return result
