"""Names that are not UTF-8 are refused in one line before anything is done."""

import os

import pytest
from reference.tiny import write_text

from mtp_jax.cli import run as mtp
from mtp_jax.data.tokenize import load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import whole_directory

BAD = os.fsdecode(b"run_\xff")


def test_a_workdir_that_is_not_utf_8(tmp_path, monkeypatch, capsys):
    """`mtp train` says it and makes no directory. Breaks without `check_name` in `open_run`."""
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text", files=4)
    (tmp_path / "c.py").write_text(
        f"from reference.tiny import tiny_config\nconfig = tiny_config({str(tmp_path / 'text')!r})"
    )
    assert mtp(["train", "c.py", "--workdir", BAD]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "mtp: error: the name of --workdir run_\\xff is not UTF-8; use another name"
    assert not (tmp_path / BAD).exists()


def test_directories_that_are_written(tmp_path):
    """An import or export is refused before it begins. Breaks without `check_name` in `whole_directory`."""
    with pytest.raises(UserError, match="is not UTF-8"), whole_directory(tmp_path / BAD):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer(tmp_path):
    """Breaks without `check_name` in `load_tokenizer`."""
    with pytest.raises(UserError, match=r"the name of the tokenizer .*run_\\xff is not UTF-8"):
        load_tokenizer(tmp_path / BAD)
