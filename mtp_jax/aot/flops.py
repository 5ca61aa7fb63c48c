"""Floating-point operations of the matrix products in a traced program.

XLA's own count takes the body of a loop once; here it counts once per iteration. All operations that run are counted,
recomputation included. `mtp_jax.cost.flops` counts the operations that a model needs.
"""

import math
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr


class Counted(NamedTuple):
    """Operations of a program over all devices."""

    flops: float
    open_loops: int
    """Number of loops that contain products and have no fixed length. They count as one iteration."""


def count(jaxpr: ClosedJaxpr) -> Counted:
    """Counts the operations of the products in a traced program."""
    total = 0.0
    loops = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        kind = equation.primitive.name
        params = equation.params
        if kind == "dot_general":
            total += _product(equation)
            continue
        inner = [count(part) for part in _parts(params)]
        if kind == "cond":
            best = max(inner, key=lambda part: part.flops)
            total = total + best.flops
            loops = loops + best.open_loops
            continue
        flops = _times(kind, params) * sum(part.flops for part in inner)
        total = total + flops
        loops = loops + sum(part.open_loops for part in inner) + (kind == "while" and flops > 0)
    return Counted(total, loops)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _times(kind: str, params: dict[str, Any]) -> int:
    """How often the inner program of an equation runs, over all devices."""
    if kind == "scan":
        return params["length"]
    if kind == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    if kind == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _parts(params: dict[str, Any]) -> list[Any]:
    values = [x for value in params.values() for x in (value if isinstance(value, list | tuple) else [value])]
    return [x for x in values if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
