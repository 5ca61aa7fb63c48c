"""Directories that are whole or not there."""

import errno

import pytest

from mtp_jax.errors import UserError
from mtp_jax.runs import integrity


def test_a_directory_takes_its_place_by_a_rename(tmp_path, monkeypatch):
    """Where the rename fails nothing is left, neither the directory nor what was made of it.

    Breaks if files are copied to their place: a kill in the middle would leave half of them.
    """

    def no_space(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(integrity.os, "replace", no_space)
    with pytest.raises(UserError, match="nothing was left there"), integrity.whole_directory(tmp_path / "out") as made:
        (made / "weights").write_text("whole")
    assert list(tmp_path.iterdir()) == []
