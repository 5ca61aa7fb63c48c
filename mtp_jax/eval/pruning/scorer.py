"""Scores shortened chains with a model. The tokens before a deletion run once, and not once per candidate.

    base          q q q  a b c d  A A        the caches of this row are kept
    without c     q q q  a b d A A           differs from place 5 on: the row runs from b, at place 4, with those caches

A deleted token is gone: the tokens after it move to the left, and so do their positions. Rows of a step are put into
batches of a few fixed sizes, and run in chunks of one fixed length. So the number of compiled programs does not depend
on the length of a chain, except that the caches grow by powers of two.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets
from mtp_jax.decode.prompts import check_continues, check_vocabulary
from mtp_jax.decode.scoring import no_entries, score_chunk
from mtp_jax.errors import UserError
from mtp_jax.runs.programs import bounded

CHUNK = 16
"""Tokens of each row that run at once."""
ROWS = (16, 4, 1)
"""Sizes of a batch."""
CACHE_BYTES = 2**29
"""Most bytes of the caches of a batch, unless a single row needs more."""
LEAST_SLOTS = 64
LEAST_WANTED = 8
"""Smallest number of positions per row and chunk for which logits are made."""

Part = Literal["answer", "all"]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a deletion should leave high, in nats."""

    part: Part = "answer"
    """`answer`: log P(answer | question, chain). `all`: log P(chain, answer | question)."""
    mean: bool = False
    """Whether the sum over the chain is divided by the length of the shortened chain, and the sum over the answer by
    the length of the answer, before they are added."""

    def __post_init__(self) -> None:
        if self.part not in ("answer", "all"):
            raise UserError(f"Objective.part={self.part!r}; it must be 'answer' or 'all'")

    def value(self, chain_logprobs: Sequence[float], answer_logprobs: Sequence[float]) -> float:
        """J from the log-probabilities of the kept tokens and of the answer's tokens."""
        parts = (answer_logprobs,) if self.part == "answer" else (chain_logprobs, answer_logprobs)
        sums = [float(np.sum(one, dtype=np.float64)) for one in parts]
        counts = [max(len(one), 1) if self.mean else 1 for one in parts]
        return sum(total / count for total, count in zip(sums, counts, strict=True))


class Ids(NamedTuple):
    """A question, a chain of reasoning and an answer, as token ids."""

    prompt: list[int]
    """The question with the tokens around it; at least one token."""
    chain: list[int]
    answer: list[int]
    """The answer with the words in front of it."""


class _Base(NamedTuple):
    """A row that was run."""

    row: list[int]
    caches: Any
    logprob: np.ndarray
    """Log-probability of each of its tokens, [len(row)]; nan for tokens of the prompt."""


class ChainScorer:
    """The objective of shortened chains, under a model. It is a `greedy.ScoreBatch`.

    It keeps the caches of one row between calls. They change the time of a call and not its result.

    Args:
      lm: a loaded model; it may be one that only decodes.
      ids: the question, the chain and the answer.
      objective: what J is.

    Raises:
      UserError: the model cannot continue texts, a part has no token or ids outside the vocabulary, or all of it is
        longer than the model allows.
    """

    def __init__(self, lm: Any, ids: Ids, objective: Objective) -> None:
        check_continues(lm, "ChainScorer")
        check_ids(lm, ids)
        self._ids = Ids(*(list(part) for part in ids))
        self._objective = objective
        self._arch: Arch = lm.arch
        self._params = lm.decode_params
        longest = sum(map(len, ids)) + CHUNK  # the last chunk may end behind the row
        self._slots = buckets.power(longest, LEAST_SLOTS)
        row_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self._no_entries(abstract=True)))
        self._sizes = [size for size in ROWS if size == 1 or size * row_bytes <= CACHE_BYTES]
        self._base: _Base | None = None
        self.tokens = 0
        """Tokens that have run so far, padding included."""

    def __call__(self, keep_BT: np.ndarray) -> np.ndarray:
        """J of each mask of kept tokens, [B]."""
        keep_BT = np.asarray(keep_BT, bool)
        base = self._rebase(self._row(keep_BT.any(axis=0)))
        rows = [self._row(keep_T) for keep_T in keep_BT]
        same = [_common(row, base.row) for row in rows]
        found = dict(enumerate(base.logprob[:count] for count in same))
        left = sorted((b for b in range(len(rows)) if same[b] < len(rows[b])), key=lambda b: len(rows[b]) - same[b])
        for batch in self._batches(left):
            made = self._suffixes(base, [rows[b] for b in batch], [same[b] for b in batch])
            found |= {b: np.concatenate([found[b], more]) for b, more in zip(batch, made, strict=True)}
        return np.array([self._value(found[b], int(keep_BT[b].sum())) for b in range(len(rows))])

    def surprisal(self, keep_T: np.ndarray) -> np.ndarray:
        """-ln p of each kept token after the kept tokens before it, [T]; nan for deleted tokens."""
        keep_T = np.asarray(keep_T, bool)
        base = self._rebase(self._row(keep_T))
        start = len(self._ids.prompt)
        surprisal_T = np.full(len(keep_T), np.nan)
        surprisal_T[keep_T] = -base.logprob[start : start + int(keep_T.sum())]
        return surprisal_T

    def _row(self, keep_T: np.ndarray) -> list[int]:
        kept = [token for token, is_kept in zip(self._ids.chain, keep_T, strict=True) if is_kept]
        return [*self._ids.prompt, *kept, *self._ids.answer]

    def _value(self, logprob: np.ndarray, kept: int) -> float:
        start = len(self._ids.prompt)
        return self._objective.value(logprob[start : start + kept], logprob[start + kept :])

    def _rebase(self, row: list[int]) -> _Base:
        """Makes a row the base. What it shares with the old base does not run again."""
        old = self._base
        self._base = None  # its caches are donated below
        if old is None:
            prompt = self._ids.prompt
            caches, _ = self._run(self._no_entries(), [prompt], [0], [0])
            old = _Base(prompt, caches, np.full(len(prompt), np.nan))
        same = _common(row, old.row)
        caches, (more,) = self._run(old.caches, [row], [same - 1], [len(row) - same])
        self._base = _Base(row, caches, np.concatenate([old.logprob[:same], more]))
        return self._base

    def _suffixes(self, base: _Base, rows: list[list[int]], same: list[int]) -> list[np.ndarray]:
        """The log-probabilities of the tokens of each row after those that it shares with the base."""
        size = min(size for size in self._sizes if size >= len(rows))
        wanted = [len(row) - count for row, count in zip(rows, same, strict=True)]
        if self._objective.part == "answer":
            wanted = [min(count, len(self._ids.answer)) for count in wanted]
        starts = [count - 1 for count in same]
        fill = size - len(rows)
        caches = _spread(size, base.caches)
        made = self._run(caches, rows + rows[:1] * fill, starts + starts[:1] * fill, wanted + [0] * fill)[1]
        behind = [len(row) - count for row, count in zip(rows, same, strict=True)]
        return [np.concatenate([np.zeros(n - len(one)), one]) for n, one in zip(behind, made, strict=False)]

    def _run(
        self, caches: Any, rows: list[list[int]], starts: list[int], wanted: list[int]
    ) -> tuple[Any, list[np.ndarray]]:
        """Runs each row from a start on, in chunks, and scores its last `wanted` tokens.

        Returns:
          The caches, and the log-probabilities of the wanted tokens of each row.
        """
        inputs = [row[start:-1] for row, start in zip(rows, starts, strict=True)]
        chunks = -(-max(map(len, inputs)) // CHUNK)
        tokens_BT = buckets.padded_rows(inputs, len(rows), chunks * CHUNK)
        self.tokens += tokens_BT.size
        found: list[list[Any]] = [[] for _ in rows]
        for chunk in range(chunks):
            begin = chunk * CHUNK
            at_BX, target_BX, count_B = _wanted(rows, inputs, wanted, begin)
            # Rows that have ended run on behind their end; what they compute there is not used.
            start_B = np.minimum(np.array(starts, np.int32) + begin, self._slots - CHUNK).astype(np.int32)
            arrays = jax.device_put((tokens_BT[:, begin : begin + CHUNK], start_B, at_BX, target_BX))
            caches, logprob_BX, _ = score_chunk(self._arch, self._params, caches, *arrays)
            for row, logprob_X, count in zip(found, np.asarray(logprob_BX, np.float64), count_B, strict=True):
                row.append(logprob_X[:count])
        return caches, [np.concatenate([*row, np.zeros(0)]) for row in found]

    def _batches(self, rows: list[int]) -> list[list[int]]:
        """Rows in batches. Each has the largest size that at least three quarters of it can fill."""
        batches = []
        while rows:
            size = max(size for size in self._sizes if 3 * size <= 4 * len(rows) or size == 1)
            batches.append(rows[:size])
            rows = rows[size:]
        return batches

    def _no_entries(self, abstract: bool = False) -> Any:
        if abstract:
            return jax.eval_shape(lambda: no_entries(self._arch, 1, self._slots))
        return no_entries(self._arch, 1, self._slots)


def check_ids(lm: Any, ids: Ids) -> None:
    """Checks the parts of a chain against a model.

    Raises:
      UserError: see `ChainScorer`.
    """
    for name, part in ids._asdict().items():
        if not len(part):
            raise UserError(f"the {name} has no token; give at least one")
        check_vocabulary(lm, part, f"the {name}")
    longest = lm.arch.model.max_seq_len
    count = sum(map(len, ids))
    if count > longest + 1:
        raise UserError(
            f"question, chain and answer have {count} tokens, and at most model.max_seq_len + 1 = {longest + 1} can be "
            "scored; leave the record out"
        )


def _common(row: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens at the beginning of both rows that are the same."""
    pairs = zip(row, other, strict=False)
    return next((at for at, (one, two) in enumerate(pairs) if one != two), min(len(row), len(other)))


def _wanted(
    rows: list[list[int]], inputs: list[list[int]], wanted: list[int], begin: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row: the indices in a chunk that predict wanted tokens, these tokens, and their number."""
    by_row = []
    for row, given, count in zip(rows, inputs, wanted, strict=True):
        here = range(max(len(given) - count, begin), min(len(given), begin + CHUNK))
        by_row.append([(at - begin, row[len(row) - len(given) + at]) for at in here])
    most = max(map(len, by_row))
    X = min(buckets.power(most, LEAST_WANTED), CHUNK) if most else 0
    both_2BX = np.zeros((2, len(rows), X), np.int32)
    for b, pairs in enumerate(by_row):
        both_2BX[:, b, : len(pairs)] = np.array(pairs, np.int32).reshape(-1, 2).T
    return both_2BX[0], both_2BX[1], np.array([len(pairs) for pairs in by_row])


@bounded(statics=(0,))
def _spread(rows: int, caches: Any) -> Any:
    """The caches of one row, once per row of a batch."""
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), caches)
