"""States of a frozen trunk, kept on disk while heads are trained on them: `train.keep_states`.

    states/00000.npy ...     results of `mtp.trunk_states`, [rows, T, 2 D] in each file, rows in order
    states/meta.json         what the states were made from

A file is either complete or absent. A run that was killed continues with the first absent file.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mtp_jax.config import Config
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.integrity import write_atomically
from mtp_jax.runs.workdir import STATES
from mtp_jax.trees import digest_of

ROWS = 64
"""Number of rows in a file."""


class RowsWithStates:
    """Packed rows. Each has the states of the trunk as `states` [T, 2 D]."""

    def __init__(self, rows: PackedRows, files: list[np.ndarray], dtype: np.dtype) -> None:
        self._rows = rows
        self._files = files
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """The row."""
        item = self._rows[row]
        return item | {"states": np.array(self._files[row // ROWS][row % ROWS]).view(self._dtype)}


def check_keeps_states(config: Config) -> None:
    """Refuses runs that cannot use states on disk.

    Raises:
      UserError: the run has several processes.
    """
    if jax.process_count() > 1:
        raise UserError("train.keep_states=True needs a single process, but there are several; set it to False")


def with_states(
    config: Config, params: Any, rows: PackedRows, digest: str, workdir: pathlib.Path, notify: Callable[[str], None]
) -> RowsWithStates:
    """The rows with their states. Computes the states that are not on disk.

    Args:
      config: the run's config.
      params: the run's parameters; only those of the trunk are read.
      rows: the training text.
      digest: digest of the text.
      workdir: the run's directory.
      notify: is called with lines of text about the progress.
    """
    folder = workdir / STATES
    made_from = _made_from(config, params, digest)
    if _read_meta(folder) != made_from:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / "meta.json", json.dumps(made_from))
    paths = [folder / f"{number:05d}.npy" for number in range(-(-len(rows) // ROWS))]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        size = len(rows) * config.data.seq_len * 2 * config.model.d_model * np.dtype(config.model.dtype).itemsize
        notify(f"running the model once over the {len(rows):,} rows of the text; states of {size / 1e6:,.0f} MB")
    run = jax.jit(functools.partial(mtp.trunk_states, config.arch))
    for done, number in enumerate(missing, start=1):
        made = _file_of(config, run, params, rows, number)
        with replacing(paths[number]) as temporary, open(temporary, "wb") as file:
            np.save(file, made.view(_stored(made.dtype)))
        notify(f"states: {done} of {len(missing)} files")
    return RowsWithStates(rows, [np.load(path, mmap_mode="r") for path in paths], np.dtype(config.model.dtype))


def _file_of(config: Config, run: Callable[..., jax.Array], params: Any, rows: PackedRows, number: int) -> np.ndarray:
    made = []
    chosen = range(number * ROWS, min((number + 1) * ROWS, len(rows)))
    for start in range(0, len(chosen), config.train.batch_size):
        items = [rows[row] for row in chosen[start : start + config.train.batch_size]]
        short = [(0, config.train.batch_size - len(items)), (0, 0)]
        batch = {name: np.pad(np.stack([item[name] for item in items]), short) for name in items[0]}
        made.append(np.asarray(run(params, batch["tokens"], batch["positions"], batch["segment_ids"]))[: len(items)])
    return np.concatenate(made)


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype to store in a file. numpy cannot store bfloat16, so integers of the same size replace it."""
    return dtype if dtype.isbuiltin else np.dtype(f"u{dtype.itemsize}")


def _made_from(config: Config, params: Any, digest: str) -> dict[str, Any]:
    return {
        "text": digest,
        "seq_len": config.data.seq_len,
        "tap": config.arch.tap,
        "tap_norm": config.heads.tap_norm,
        "dtype": config.model.dtype,
        "model": digest_of(mtp.trunk_params(params)),
    }


def _read_meta(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
