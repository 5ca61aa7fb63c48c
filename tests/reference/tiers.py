"""Which cases of a parametrised test run by default, which in the grid, and which only with the slow ones."""

import pytest


def sampled(cases, *default, grid=None, others="grid"):
    """The cases as parameters: those in `default` run wherever the test does, the others with `pytest -m grid`.

    Args:
      cases: the parameters of a test, as `pytest.mark.parametrize` takes them.
      default: the smallest choice of them that can break the equation.
      grid: of the others, those that run in the grid, where the rest repeats what they and other tests guard; the rest
        is slow. None: all of them.
      others: the marker of the others. "slow" for a test that stands in the grid itself.
    """
    cases = list(cases)
    unknown = [case for case in (*default, *(grid or ())) if case not in cases]
    if unknown or not default:
        raise ValueError(f"{unknown or 'nothing'} is to run by default; choose among {cases}")
    marker = lambda case: others if grid is None or case in grid else "slow"  # noqa: E731
    return [case if case in default else _marked(case, marker(case)) for case in cases]


def _marked(case, marker):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=getattr(pytest.mark, marker))
