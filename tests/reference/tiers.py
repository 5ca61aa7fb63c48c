"""Which cases of a parametrised test run by default, and which in the grid."""

import pytest


def sampled(cases, *default):
    """The cases as parameters: those in `default` always run, the others with `pytest -m grid`.

    Args:
      cases: the parameters of a test, as `pytest.mark.parametrize` takes them.
      default: the smallest choice of them that can break the equation.
    """
    cases = list(cases)
    unknown = [case for case in default if case not in cases]
    if unknown or not default:
        raise ValueError(f"{unknown or 'nothing'} is to run by default; choose among {cases}")
    return [case if case in default else _in_grid(case) for case in cases]


def _in_grid(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.grid)
