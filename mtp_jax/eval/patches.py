"""Patches of a text: cut by a small byte model, with the figures of their lengths.

The threshold is fitted on rows of text, so that patches have a wanted mean length. `model.blt.patching` has the rules.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.config.patching import ENTROPY_KINDS, PatchRule
from mtp_jax.data.loader import heldout_batches
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.reading import INCOMPLETE
from mtp_jax.data.tokenize import is_of_bytes
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel
from mtp_jax.model.blt.patching import entropy_segments, fit_threshold, patch_starts
from mtp_jax.model.entropies import next_entropy

ROWS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Entropies:
    """Rows of bytes with the entropies of a byte model."""

    tokens_BT: np.ndarray
    segment_ids_BT: np.ndarray
    """Document of each token; 0 is padding."""
    entropy_BT: np.ndarray
    """In nats; slot t is about token t+1."""

    def fitted(self, rule: PatchRule, mean_length: float) -> PatchRule:
        """The rule with the threshold for which patches of these rows have a mean length; see `fit_threshold`."""
        return fit_threshold(self.entropy_BT, mean_length, rule, self.segment_ids_BT, self.tokens_BT)

    def starts(self, rule: PatchRule) -> np.ndarray:
        """Which tokens begin a patch, bool [B, T]; none in padding."""
        starts_BT = patch_starts(self.entropy_BT, rule, self.segment_ids_BT, self.tokens_BT)
        return np.asarray(starts_BT)[:, :-1] & (self.segment_ids_BT != 0)

    def before(self) -> np.ndarray:
        """Entropy of every token given those before it, [B, T]; nan for the first of a document."""
        before_BT = np.roll(self.entropy_BT, 1, axis=1)
        first_BT = self.segment_ids_BT != np.roll(self.segment_ids_BT, 1, axis=1)
        first_BT[:, 0] = True
        return np.where(first_BT, np.nan, before_BT)


def check_bytes(lm: LoadedModel, source: str) -> None:
    """Refuses a model that does not read bytes.

    Raises:
      UserError: it has no tokenizer, or one of other tokens than bytes.
    """
    if lm.tokenizer is None or not is_of_bytes(lm.tokenizer):
        raise UserError(
            f"{source} does not read bytes, so it cannot cut them into patches; train a model with "
            "data.tokenizer='bytes' or 'blt_bytes', for example configs/byte_entropy.py"
        )


def byte_offset(tokenizer: Any) -> int:
    """The token id of byte 0."""
    return tokenizer.encode("\0")[0]


def entropies_of_rows(
    lm: LoadedModel, rows: PackedRows, rule: PatchRule, limit: int, progress: Callable[[str], None] = lambda _: None
) -> Entropies:
    """The entropies of the first `limit` packed rows.

    Args:
      lm: a model of bytes.
      rows: the rows.
      rule: the rule; it says whether the model starts anew at newlines.
      limit: most rows.
      progress: is called with a line of text about what is being done.
    """
    count = min(limit, len(rows))
    progress(f"entropies of {count} rows of {rows.seq_len} bytes")
    batches = heldout_batches(rows, min(ROWS_AT_ONCE, count), count)
    parts = [_of_batch(lm, rule, batch["tokens"], batch["segment_ids"]) for batch in batches]
    whole = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    return Entropies(*(array[:count] for array in whole))


def entropies_of_text(lm: LoadedModel, text: str, rule: PatchRule) -> Entropies:
    """The entropies of one text, as one row that begins with the model's first token.

    Raises:
      UserError: the text is empty, or longer than the model's rows.
    """
    ids = lm.tokenizer.encode_prompt(text)
    longest = lm.config.model.max_seq_len
    if not text or len(ids) > longest:
        raise UserError(
            f"the text has {len(ids)} tokens; give 1 to {longest} (model.max_seq_len), or a longer text as --data"
        )
    tokens_BT = np.array([ids], np.int32)
    return Entropies(*_of_batch(lm, rule, tokens_BT, np.ones_like(tokens_BT)))


def _of_batch(
    lm: LoadedModel, rule: PatchRule, tokens_BT: np.ndarray, segment_ids_BT: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    seen_BT = entropy_segments(rule, jnp.asarray(tokens_BT), jnp.asarray(segment_ids_BT))
    return tokens_BT, segment_ids_BT, np.asarray(_entropy(lm.arch, lm.stacked_params(), tokens_BT, seen_BT))


@functools.partial(jax.jit, static_argnums=0)
def _entropy(arch: Arch, params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    return next_entropy(arch, params, tokens_BT, segment_ids_BT)


def rule_of(kind: str, mean_length: float | None, offset: int, **more: Any) -> tuple[PatchRule, float | None]:
    """A rule, and the mean length that its threshold is to be fitted to; None if it has no threshold.

    Args:
      kind: name of the rule.
      mean_length: the wanted mean length; None takes 4.5, and for `static` 4.
      offset: the token id of byte 0.
      more: further fields of `PatchRule`.

    Raises:
      UserError: the rule cannot have this mean length.
    """
    if mean_length is not None and not (mean_length >= 1 and math.isfinite(mean_length)):
        raise UserError(f"--mean-length {mean_length:g} is no length of a patch; give 1 or more")
    if kind in ENTROPY_KINDS:
        return PatchRule(kind=kind, byte_offset=offset, **more), 4.5 if mean_length is None else mean_length
    if kind == "space":
        if mean_length is not None:
            raise UserError(f"--mean-length {mean_length:g} has no effect with --rule space; leave it out")
        return PatchRule(kind="space", byte_offset=offset, **more), None
    stride = 4.0 if mean_length is None else mean_length
    if stride != int(stride):
        raise UserError(
            f"--mean-length {stride:g} with --rule static: all patches have one length; give a whole number"
        )
    return PatchRule(kind="static", stride=int(stride), byte_offset=offset, **more), None


@dataclasses.dataclass(frozen=True, eq=False)
class PatchFigures:
    """The lengths of patches."""

    lengths_P: np.ndarray
    """Tokens of every patch, in order, [patches]. Patches that the end of a row or document cuts count as they are."""

    @classmethod
    def of(cls, starts_BT: np.ndarray, segment_ids_BT: np.ndarray) -> "PatchFigures":
        """The figures of rows, without padding."""
        lengths = [_row_lengths(*row) for row in zip(starts_BT, segment_ids_BT, strict=True)]
        return cls(np.concatenate(lengths))

    @property
    def tokens(self) -> int:
        """Number of tokens in all patches."""
        return int(self.lengths_P.sum())

    @property
    def mean(self) -> float:
        """Mean length."""
        return self.tokens / len(self.lengths_P)

    def quantile(self, share: float) -> int:
        """The length that this share of the patches does not exceed."""
        return int(np.quantile(self.lengths_P, share, method="inverted_cdf"))

    def counts(self, most: int) -> list[int]:
        """Number of patches of length 1, 2, ..., most-1, and of `most` or more."""
        return np.bincount(np.minimum(self.lengths_P, most), minlength=most + 1)[1:].tolist()

    def as_json(self) -> dict[str, Any]:
        """All figures, with the number of patches of every length that occurs."""
        lengths, counts = np.unique(self.lengths_P, return_counts=True)
        return {
            "bytes": self.tokens,
            "patches": len(self.lengths_P),
            "mean_length": self.mean,
            "median_length": self.quantile(0.5),
            "p90_length": self.quantile(0.9),
            "longest": int(self.lengths_P.max()),
            "lengths": dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
        }


def _row_lengths(starts_T: np.ndarray, segment_ids_T: np.ndarray) -> np.ndarray:
    used = int(np.sum(segment_ids_T != 0))
    return np.diff(np.flatnonzero(starts_T), append=used)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A character of a text, as a picture of patches shows it."""

    text: str
    entropy: float
    """The largest entropy of its bytes, given the bytes before; nan for the first byte of a document."""
    starts: bool
    """Whether a patch begins at one of its bytes."""


def characters(tokenizer: Any, ids: Sequence[int], entropy_T: np.ndarray, starts_T: np.ndarray) -> Iterator[Shown]:
    """The characters of a row of bytes. A byte that forms no character is U+FFFD, a special token is its name.

    Args:
      tokenizer: the tokenizer of the model.
      ids: the row.
      entropy_T: entropy of every byte given those before it.
      starts_T: which bytes begin a patch.
    """
    special = tokenizer.special_tokens
    begin = 0
    while begin < len(ids):
        ahead = list(itertools.takewhile(lambda token: token not in special, ids[begin : begin + 4]))
        end = begin + _size(tokenizer.decode, ahead)
        known_T = entropy_T[begin:end][~np.isnan(entropy_T[begin:end])]
        largest = float(known_T.max()) if len(known_T) else math.nan
        text = special.get(ids[begin]) or tokenizer.decode(ids[begin:end])
        yield Shown(text, largest, bool(starts_T[begin:end].any()))
        begin = end


def _size(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> int:
    """Number of bytes of the first character of some bytes; 1 if they form none, or if there are none."""
    for size in range(1, len(ids) + 1):
        text = decode(ids[:size])
        if len(text) == 1 and text != INCOMPLETE:
            return size
    return 1
