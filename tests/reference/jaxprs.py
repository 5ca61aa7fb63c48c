"""Walks over everything that a traced function computes."""


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
