"""Scores of given texts: `score` gives the log-probability of a continuation after a prompt.

Pairs are run in batches of rows with the same padded length, which is a power of two or a whole number of chunks. A row
goes through the model in chunks, with caches, as a prompt does in decoding. Logits exist only at the positions that
predict a token of a continuation, and only for a piece of them at a time:

    prompt  continuation            positions 0 1 2 3 4 5, and what they predict
    a b c   d e f g                 inputs    a b c d e f
                                    scored        d e f g
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets, engine
from mtp_jax.decode.options import whole
from mtp_jax.decode.prompts import check_continues, check_vocabulary
from mtp_jax.decode.sampling import greedy, log_probability
from mtp_jax.errors import UserError
from mtp_jax.model import trunk
from mtp_jax.model.cache import whole_tiles
from mtp_jax.model.given import NewTokens
from mtp_jax.runs.programs import bounded

BATCH_TOKENS = 8192
"""Most tokens of a batch, padding included, unless a single row is longer."""
LOGIT_BYTES = 2**26
"""Bytes of the logits that exist at one time, if one position of every row needs no more."""
LEAST_SCORED = 16
"""Smallest number of positions per row and chunk for which logits are made."""


class Score(NamedTuple):
    """The score of a continuation."""

    logprob: float
    """Sum of the log-probabilities of its tokens, each after all tokens before it; natural logarithms."""
    is_greedy: bool
    """Whether every token is the most likely one, so that greedy decoding would write the continuation."""


class _Pair(NamedTuple):
    """A pair as token ids."""

    inputs: list[int]
    """All tokens but the last one."""
    targets: list[int]
    """The tokens of the continuation. The last inputs, as many as there are targets, predict them."""


def score(
    lm: Any,
    prompts: Sequence[str | Sequence[int]],
    continuations: Sequence[str | Sequence[int]],
    *,
    truncate: bool = False,
    batch_size: int | None = None,
) -> list[Score]:
    """Log-probabilities of continuations, each after its prompt.

    Texts are read as lm-evaluation-harness does: blanks at the end of a prompt move to the beginning of its
    continuation. The prompt's tokens are those of the prompt alone. The continuation's tokens are those of both texts
    together, without as many of the first as the prompt has. If the prompt is empty, the tokenizer's first token (bos)
    takes its place, or its end token if there is none. So `score(lm, [""], [text])` scores a whole text.

    Args:
      lm: a loaded model.
      prompts: texts or lists of token ids. No token is added to ids.
      continuations: one per prompt; a text if the prompt is a text, and ids if it is ids.
      truncate: whether to leave out the first tokens of a pair that is longer than the model allows: max_seq_len
        tokens without the last one. If not, such a pair is an error.
      batch_size: most rows of a batch. None takes as many as `BATCH_TOKENS` allows.

    Returns:
      A `Score` per pair, which is a tuple (logprob, is_greedy).

    Raises:
      UserError: the model cannot continue texts, the lists have different lengths, a continuation has no tokens, ids
        are outside the vocabulary, or a pair is too long.
    """
    check_continues(lm, "score")
    rows = _rows(lm, prompts, continuations, truncate)
    most = None if batch_size is None else whole("batch_size", batch_size, "1 or above", lambda count: count >= 1)
    scores: dict[int, Score] = {}

    def padded(row: int) -> int:
        return buckets.padded(len(rows[row].inputs), engine.CHUNK)

    # The longest first, so that a batch that does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=padded, reverse=True)
    for length, alike in itertools.groupby(order, padded):
        count = max(BATCH_TOKENS // length, 1) if most is None else most
        for batch in batched(list(alike), count):
            scores |= zip(batch, _scored(lm, [rows[row] for row in batch], length), strict=True)
    return [scores[row] for row in range(len(rows))]


def batched(items: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """The items in lists of `count`; the last one may have fewer."""
    return (items[start : start + count] for start in range(0, len(items), count))


def _rows(lm: Any, prompts: Any, continuations: Any, truncate: bool) -> list[_Pair]:
    """All pairs as token ids, checked."""
    for name, items in (("prompts", prompts), ("continuations", continuations)):
        if isinstance(items, str) or not isinstance(items, Sequence | np.ndarray):
            raise UserError(f"{name}={items!r} is not a list; put a single one into a list")
    if len(prompts) != len(continuations):
        raise UserError(
            f"there are {len(prompts)} prompts and {len(continuations)} continuations; give one continuation per prompt"
        )
    longest = lm.arch.model.max_seq_len
    rows = []
    for row, pair in enumerate(zip(prompts, continuations, strict=True)):
        before, after = pair_ids(lm, *pair, row)
        inputs = [*before, *after][:-1]
        if len(after) > longest:
            raise UserError(
                f"continuation {row} has {len(after)} tokens, and model.max_seq_len={longest}; score it in parts, each "
                "with the tokens before it as the prompt"
            )
        if len(inputs) > longest and not truncate:
            raise UserError(
                f"pair {row} has {len(inputs) + 1} tokens, and at most model.max_seq_len + 1 = {longest + 1} can be "
                "scored; make the prompt shorter, or leave out its first tokens with truncate=True"
            )
        rows.append(_Pair(inputs[-longest:], after))
    return rows


def pair_ids(lm: Any, prompt: Any, continuation: Any, row: int) -> tuple[list[int], list[int]]:
    """The token ids of a prompt and of its continuation; see `score`.

    Args:
      lm: a loaded model.
      prompt: a text or token ids.
      continuation: the same kind as the prompt.
      row: index of the pair, for errors.
    """
    if isinstance(prompt, str) != isinstance(continuation, str):
        raise UserError(f"pair {row} has a text and token ids; give prompt and continuation both as texts or as ids")
    if not isinstance(prompt, str):
        before = _given_ids(prompt, row)
        after = _given_ids(continuation, row)
    elif lm.tokenizer is None:
        raise UserError(f"pair {row} is text, but this model has no tokenizer; give lists of token ids")
    else:
        _check_text("prompt", prompt, row)
        _check_text("continuation", continuation, row)
        before, after = _text_ids(lm.tokenizer, prompt, continuation)
    if not before:
        raise UserError(f"prompt {row} has no token, so nothing predicts the first one; give at least one token")
    if not after:
        raise UserError(f"continuation {row} has no token; give at least one")
    check_vocabulary(lm, [*before, *after], f"pair {row}")
    return before, after


def _given_ids(given: Any, row: int) -> list[int]:
    """Token ids that the caller gave, as ints."""
    wanted = f"pair {row} is neither two texts nor two lists of token ids"
    try:
        tokens = list(given)
        ids = [operator.index(token) for token in tokens]
    except TypeError as error:
        raise UserError(f"{wanted}: {error}; give ids as whole numbers") from error
    for token in tokens:
        if isinstance(token, bool):
            raise UserError(f"{wanted}: {token} is no token id; give ids as whole numbers")
    return ids


def _check_text(name: str, text: str, row: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {row} is not valid text: {error}; remove the character") from error


def _text_ids(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    if not prompt:
        ids = tokenizer.encode(continuation)
        begin = [] if tokenizer.start_id is None else [tokenizer.start_id]
        return begin, ids[1:] if ids[:1] == begin else ids
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        continuation = prompt[-blanks:] + continuation
        prompt = prompt[:-blanks]
    before = tokenizer.encode_prompt(prompt)
    return before, tokenizer.encode_prompt(prompt + continuation)[len(before) :]


def _scored(lm: Any, rows: Sequence[_Pair], padded: int) -> list[Score]:
    """The scores of one batch. `padded` is the length to which its inputs are padded."""
    B = buckets.batch_rows(len(rows))
    chunk = min(padded, engine.CHUNK)
    tokens_BT = buckets.padded_rows([pair.inputs for pair in rows], B, padded)
    caches = _no_entries(lm.arch, B, whole_tiles(padded))
    found = []
    for start in range(0, padded, chunk):
        wanted = _Wanted.of(rows, B, start, chunk)
        arrays = jax.device_put((tokens_BT[:, start : start + chunk], np.int32(start), wanted.at_BX, wanted.target_BX))
        caches, logprob_BX, first_BX = _score_chunk(lm.arch, lm.decode_params, caches, *arrays)
        found.append((wanted.count_B, logprob_BX, first_BX))
    return _summed(jax.device_get(found), len(rows))


def _summed(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], rows: int) -> list[Score]:
    """Sums over the chunks of a batch, in float64."""
    logprobs = [
        [logprob for count_B, logprob_BX, _ in found for logprob in logprob_BX[b, : count_B[b]]] for b in range(rows)
    ]
    firsts = [all(first_BX[b, : count_B[b]].all() for count_B, _, first_BX in found) for b in range(rows)]
    return [Score(math.fsum(row), first) for row, first in zip(logprobs, firsts, strict=True)]


class _Wanted(NamedTuple):
    """The positions of a chunk that predict tokens of continuations."""

    at_BX: np.ndarray
    """Index in the chunk. Rows with fewer are filled up with 0."""
    target_BX: np.ndarray
    """The token to predict."""
    count_B: np.ndarray
    """Number of such positions of each row."""

    @classmethod
    def of(cls, rows: Sequence[_Pair], batch: int, start: int, chunk: int) -> "_Wanted":
        """The positions of the chunk that begins at `start`."""
        by_row = []
        for pair in rows:
            first = len(pair.inputs) - len(pair.targets)
            here = range(max(first, start), min(len(pair.inputs), start + chunk))
            by_row.append([(at - start, pair.targets[at - first]) for at in here])
        count_B = np.array([len(row) for row in by_row], np.int32)
        most = int(count_B.max())
        X = min(buckets.power(most, LEAST_SCORED), chunk) if most else 0
        both_2BX = np.zeros((2, batch, X), np.int32)
        for b, row in enumerate(by_row):
            both_2BX[:, b, : len(row)] = np.array(row, np.int32).reshape(-1, 2).T
        return cls(both_2BX[0], both_2BX[1], count_B)


@bounded(statics=(0, 1, 2))
def _no_entries(arch: Arch, batch: int, slots: int) -> Any:
    return trunk.init_caches(arch, batch, slots)


@bounded(statics=(0,), donate=(2,), weights=1)
def _score_chunk(
    arch: Arch,
    params: Any,
    caches: Any,
    tokens_BQ: jax.Array,
    start: jax.Array,
    at_BX: jax.Array,
    target_BX: jax.Array,
) -> tuple[Any, jax.Array, jax.Array]:
    """Runs a chunk of every row, and scores the wanted positions.

    Returns:
      The caches; the log-probability of every target; and whether it is the most likely token.
    """
    B, X = at_BX.shape
    start_B = jnp.full((B,), start)
    new = NewTokens(trunk.embed(arch, params, tokens_BQ), tokens_BQ, start_B)
    state_BQD, _, caches = trunk.decode(arch, params, new, caches)
    if not X:
        return caches, jnp.zeros((B, 0)), jnp.zeros((B, 0), bool)
    state_BXD = jnp.take_along_axis(state_BQD, at_BX[..., None], axis=1)
    hidden_BXD = trunk.final_norm(arch, params, state_BXD)
    most = max(LOGIT_BYTES // (4 * B * arch.model.vocab_size), 1)
    piece = max(size for size in range(1, X + 1) if X % size == 0 and size <= most)

    def pieces(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(B, X // piece, piece, *x.shape[2:]), 1, 0)

    def one(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_BXD, target_BX = given
        logits_BXV = trunk.logits(arch, params, hidden_BXD)
        return log_probability(logits_BXV, target_BX), greedy(logits_BXV) == target_BX

    scored = jax.lax.map(one, (pieces(hidden_BXD), pieces(target_BX)))
    logprob_BX, first_BX = (jnp.moveaxis(x, 0, 1).reshape(B, X) for x in scored)
    return caches, logprob_BX, first_BX
