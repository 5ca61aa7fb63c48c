"""Strict JSON has no NaN and no infinity."""

import math

import numpy as np

from mtp_jax.runs.strict_json import strict


def test_numbers_that_are_not_finite_are_none():
    """strict(value) = value with None for NaN and infinities, at every depth; arrays and tuples are lists.

    Breaks without `isfinite`, or without any one of the three kinds of containers.
    """
    value = {"a": [math.nan, 1.5, (math.inf, 2)], "b": np.array([[-np.inf, 3.0]]), "c": np.float32("nan"), "d": "x"}
    assert strict(value) == {"a": [None, 1.5, [None, 2]], "b": [[None, 3.0]], "c": None, "d": "x"}
