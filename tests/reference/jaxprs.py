"""Walks over everything that a traced function computes."""

import math


def equations(jaxpr):
    """Every equation of a jaxpr, those inside scans, calls and shard_maps included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def results(jaxpr):
    """Shape and dtype of every array that is computed."""
    for equation in equations(jaxpr):
        for variable in equation.outvars:
            if hasattr(variable.aval, "shape"):
                yield variable.aval


def product_flops(jaxpr):
    """Floating-point operations of all matrix products, bodies of scans as often as they run."""
    jaxpr, total = getattr(jaxpr, "jaxpr", jaxpr), 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        if equation.primitive.name == "cond":  # One branch runs, here those of one function on several platforms.
            total += max(product_flops(branch) for branch in equation.params["branches"])
            continue
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    total += times * product_flops(inner)
    return total
