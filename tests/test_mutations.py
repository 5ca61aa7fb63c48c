"""The list of broken lines in `mutations.py` keeps step with the code."""

import ast
import pathlib

import mutations
import pytest

TESTS = pathlib.Path(__file__).parent
ALL = (*mutations.NAMED, *mutations.OTHERS)


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_the_list_keeps_step(mutation):
    """A mutation changes its file, which still parses, and names tests that exist.

    Without it a line that was moved would be broken nowhere, and every test would seem to notice nothing.
    """
    text = (mutations.ROOT / "mtp_jax" / mutation.file).read_text(encoding="utf-8")
    broken = mutations.broken(mutation, text)
    assert ast.dump(ast.parse(broken)) != ast.dump(ast.parse(text))
    assert [name for name in mutation.tests.split() if not (TESTS / name).exists()] == []


def test_names_are_unique():
    """A name on the command line means one mutation."""
    names = [mutation.name for mutation in ALL]
    assert len(names) == len(set(names))
