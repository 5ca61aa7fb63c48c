"""The metrics of a run: one JSON line per record, the same numbers for TensorBoard, and formulas for them.

`metrics.jsonl` is the record of the run; TensorBoard only shows it. A run that continues first drops the records after
its checkpoint, so that every step is recorded once.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import tensorboardX

from mtp_jax.errors import UserError
from mtp_jax.runs.strict_json import strict

METRICS = "metrics.jsonl"


class MetricsWriter:
    """A context manager that writes the scalars of a run. Only process 0 writes.

    Args:
      workdir: the run's directory.
      resume_step: the step of the checkpoint from which the run continues; records after it are dropped. None drops all
        records.
    """

    def __init__(self, workdir: pathlib.Path | str, *, resume_step: int | None) -> None:
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        last = -1 if resume_step is None else resume_step
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            kept = _drop_after(workdir / METRICS, last)
            self._before = {(record["step"], name) for record in kept if record["step"] == last for name in record}
            self._file = (workdir / METRICS).open("a", encoding="utf-8")
            self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=last + 1)
        except OSError as error:
            raise UserError(f"{workdir} cannot be written: {error.strerror}; use another --workdir") from error

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def has(self, step: int, name: str) -> bool:
        """Whether the record from before this start has a value of this name for this step. False on other processes
        than 0."""
        return self._file is not None and (step, name) in self._before

    def write(self, step: int, scalars: Mapping[str, float | Sequence[float]]) -> None:
        """Appends one record.

        Args:
          step: number of finished steps.
          scalars: numbers by name. A list becomes `name/0`, `name/1`, ... in TensorBoard. A number that is not finite,
            such as the mean over no tokens, is null in the file and left out of TensorBoard.
        """
        if self._file is None:
            return
        values = strict(dict(scalars))
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"writing {self._file.name} failed ({error.strerror}); make room and run it again"
            ) from error
        for name, value in values.items():
            parts = {f"{name}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {name: value}
            for label, number in parts.items():
                if number is not None:
                    self._board.add_scalar(label, number, step)

    def close(self) -> None:
        """Closes both files. A second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None


def read_metrics(workdir: pathlib.Path | str) -> list[dict[str, Any]]:
    """The records of a run, in the order in which they were written; an empty list if there is no file.

    A last line without a line break is left out: it was still being written.

    Raises:
      UserError: a line is not a record.
    """
    path = pathlib.Path(workdir) / METRICS
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        int(record["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{where} is no record of metrics: {line[:60]!r}; remove that line") from error
    return record


def _drop_after(path: pathlib.Path, last: int) -> list[dict[str, Any]]:
    kept = [record for record in read_metrics(path.parent) if record["step"] <= last]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def bits_per_byte(nll_sum_nats: float, num_bytes: int) -> float:
    """Bits per byte: a loss by which models with different tokenizers can be compared.

    bits per byte = (sum of -ln p(token)) / (ln 2 * bytes of those tokens)

    Both sums run over the predicted tokens. These are all tokens of a document but its first. If a special token was
    put in front of the text, the whole text is predicted, because that token has no bytes. Otherwise the bytes of the
    text's first token do not count. The end token is predicted, and has no bytes.

    Args:
      nll_sum_nats: sum of the negative log likelihoods of the predicted tokens, natural logarithm.
      num_bytes: number of UTF-8 bytes of those tokens.
    """
    if num_bytes < 1:
        raise UserError(f"bits_per_byte: num_bytes is {num_bytes}; the text must have at least one byte")
    return nll_sum_nats / (math.log(2) * num_bytes)


def distinct_ratio(token_lists: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of distinct n-grams: near 1 for text, near 0 for a model that repeats itself.

    |union over sequences of {x[i:i+n]}| / sum over sequences of max(len(x) - n + 1, 0).

    Args:
      token_lists: sequences of tokens. No n-gram spans two sequences. An n-gram that occurs in two sequences counts
        once as distinct.
      n: number of tokens of an n-gram.

    Returns:
      The share, or nan if every sequence is shorter than n.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
