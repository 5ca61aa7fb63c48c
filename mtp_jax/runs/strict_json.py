"""Values for strict JSON, which has no NaN and no infinity."""

import math
from typing import Any


def strict(value: Any) -> Any:
    """The value with None in place of every number that is not finite.

    Args:
      value: dicts, lists, tuples, arrays and plain values, nested. Tuples and arrays become lists.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
