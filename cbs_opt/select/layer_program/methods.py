"""The methods for layers by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from cbs_opt.select.layer_program.alternating import ALPS, Alternating, by_alps
from cbs_opt.select.layer_program.exchanges import DEFAULT, Exchanges, by_exchanges
from cbs_opt.select.layer_program.one_swaps import by_greedy_obs
from cbs_opt.select.layer_program.program import LayerProgram, LayerSolution
from cbs_opt.select.layer_program.scores import by_magnitude, by_wanda
from cbs_opt.select.layer_program.sparsegpt import by_sparsegpt
from cbs_opt.system.checks import one_of
from formulations.errors import UnknownOptionError

LayerMethod = Callable[[LayerProgram], LayerSolution]
Options = Alternating | Exchanges | None

METHODS: Mapping[str, Callable[..., LayerSolution]] = {
    "magnitude": by_magnitude,
    "wanda": by_wanda,
    "sparsegpt": by_sparsegpt,
    "alps": by_alps,
    "greedy_obs": by_greedy_obs,
    "exchanges": by_exchanges,
}
OPTIONS: Mapping[str, Options] = {"alps": ALPS, "exchanges": DEFAULT}
"""The methods that have options, with what these are by default."""


def layer_method(name: str, options: Options = None) -> LayerMethod:
    """Return a method with its options.

    Raises `ArgumentError` for a name that is not in `METHODS`, and `UnknownOptionError` for options of
    another method.
    """
    method = METHODS[one_of("method", name, METHODS)]
    if options is None:
        return method
    wanted = type(OPTIONS[name]) if name in OPTIONS else None
    if wanted is None or not isinstance(options, wanted):
        remedy = f"pass {wanted.__name__}(...)" if wanted else "leave options out"
        raise UnknownOptionError("options", f"a {type(options).__name__} for {name}", remedy)
    return partial(method, options=options)
