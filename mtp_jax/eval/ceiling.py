"""Compares extra heads with the marginals of their own model, at the same offset and the same held-out positions.

Head m predicts the token m + 1 behind a position. `marginals` says what the next-token model knows about that token
from the same tokens. The ratio of the two accuracies is the share of this ceiling that the head reaches. Heads on a
frozen trunk stay well below it (Mehra et al. 2025, arXiv:2502.09419).

Both sides see the tokens of the document in the row, up to the position. A head that reads tokens behind the position
(families `sequential` and `recursive`) reads its own greedy drafts here, and not the true tokens as in training. So its
accuracy is below the one in the table of heads.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data.extras import WEIGHTS
from mtp_jax.data.pack import PackedRows
from mtp_jax.decode.tree import LANES, Branching, Distributions, distributions
from mtp_jax.errors import UserError
from mtp_jax.eval.intervals import Interval, Ratio
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.strict_json import strict

PLAIN_OFFSETS = 3
"""Largest offset for a model without extra heads."""
COLUMNS = ("offset", "head top-1", "marginal top-1", "share of the ceiling", "head top-5", "marginal top-5", "covered")


def percent(figure: Interval) -> str:
    """A share in percent, as text; a dash if it is undefined, such as a share of a marginal that is never right."""
    if not math.isfinite(figure.value):
        return "-"
    ends = "" if math.isnan(figure.low) else f" ({figure.low:.1%}-{figure.high:.1%})"
    return f"{figure.value:.1%}{ends}"


class Accuracy(NamedTuple):
    """How well distributions predict the tokens that follow."""

    top1: Interval
    top5: Interval
    loss: Interval
    """Cross-entropy in nats. For heads with a draft vocabulary, of the targets that are in it."""

    def as_json(self) -> dict[str, Any]:
        """The figures by name, each with its value, low and high."""
        return {name: one.as_json() for name, one in self._asdict().items()}


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """A head and the marginal at one offset, over the same positions."""

    offset: int
    """1 is the next token."""
    positions: int
    documents: int
    """Number of documents that have these positions."""
    marginal: Accuracy
    """The loss is that of the renormalised marginal."""
    head: Accuracy | None
    """None if no head drafts at this offset."""
    share: Interval | None
    """Top-1 accuracy of the head divided by that of the marginal."""
    covered: float
    """Mean probability of the continuations that the marginal sums over."""

    def as_json(self) -> dict[str, Any]:
        """One entry of `marginals` in the JSON of `mtp eval`; undefined numbers are None."""
        fields = {name: getattr(self, name) for name in ("offset", "positions", "documents", "covered")}
        fields |= {"marginal": self.marginal.as_json(), "head": None, "share": None}
        if self.head is not None:
            fields |= {"head": self.head.as_json(), "share": self.share.as_json()}
        return strict(fields)

    def cells(self) -> tuple[str, ...]:
        """The texts of a table row, in the order of `COLUMNS`."""
        head = ("-", "-") if self.head is None else (percent(self.head.top1), percent(self.head.top5))
        share = "-" if self.share is None else percent(self.share)
        marginal = self.marginal
        covered = f"{self.covered:.1%}"
        return (f"t+{self.offset}", head[0], percent(marginal.top1), share, head[1], percent(marginal.top5), covered)


def check_ceilings(lm: LoadedModel, top_k: int, positions: int) -> None:
    """Checks the arguments of `ceilings`.

    Raises:
      UserError: one is out of range, or the model does not predict next tokens.
    """
    vocab = lm.arch.model.vocab_size
    if not 1 <= top_k <= vocab:
        raise UserError(f"--marginalise {top_k}: give a number of tokens from 1 to {vocab}, the size of the vocabulary")
    if positions < 0:
        raise UserError(f"--marginal-positions {positions} is negative; give 1 or more, or 0 for all positions")
    if lm.answers_in_one_pass:
        raise UserError("a model that was trained with loss.teacherless has no marginals; leave them out")


def ceilings(
    lm: LoadedModel,
    rows: PackedRows,
    top_k: int,
    positions: int,
    *,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Ceiling, ...]:
    """Compares every extra head with the marginal at its offset, on held-out rows.

    A marginal at offset o sums over top_k^(o-1) continuations. At most top_k^2 continuations of one length are followed
    (the most probable ones), so the cost grows slowly beyond offset 3.

    Args:
      lm: a loaded model. It may be one that only decodes.
      rows: held-out rows.
      top_k: K, tokens to sum over at each step.
      positions: number of positions, drawn from all those with enough tokens after them; 0 takes all of these.
      seed: seed of the draw.
      progress: is called with a line of text about what is being done.

    Returns:
      One entry per offset from 2 on: to M for a model with M - 1 extra heads, to 3 for one without.

    Raises:
      UserError: as for `check_ceilings`, or no position has enough tokens after it.
    """
    check_ceilings(lm, top_k, positions)
    heads = lm.arch.heads
    offsets = heads.num_future if heads.num_future > 1 else PLAIN_OFFSETS
    rows = dataclasses.replace(rows, prompt_tokens=lm.config.data.prompt_tokens)
    places = _draw(_places(rows, offsets), positions, seed)
    branching = Branching(offsets, top_k, top_k**2)
    batches = -(-len(places) // LANES)
    size = -(-len(places) // batches)
    progress(f"marginals at {len(places)} positions, {top_k} tokens per step, offsets 2 to {offsets}")
    parts = []
    for start in range(0, len(places), size):
        given = places[start : start + size]
        # The last batch is filled up, so that it has the shape, and so the program, of the others.
        filled = given + given[-1:] * (size - len(given))
        found = distributions(lm, [place.context for place in filled], branching, heads=heads.draft)
        parts.append(_scores(found, filled, len(given)))
        progress(f"marginals: {start + len(given)} of {len(places)} positions")
    scores = _Scores(*(None if arrays[0] is None else np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))
    documents_B = np.unique([place.document for place in places], return_inverse=True)[1]
    return tuple(_ceiling(scores, documents_B, m) for m in range(1, offsets))


class _Place(NamedTuple):
    """A position of the held-out text."""

    context: list[int]
    """The tokens of its document in its row, up to the position."""
    following: list[int]
    """The tokens at offsets 1, 2, ... behind the position."""
    document: int


def _places(rows: PackedRows, offsets: int) -> list[tuple[PackedRows, int, int, int]]:
    """All positions that have `offsets` more tokens of the document in their row, if all of these are learned. Each as
    the rows, the row, the position in it, and `offsets`."""
    found = []
    for row in range(len(rows)):
        item = rows[row]
        segments_T = item["segment_ids"]
        ones_T = np.ones(rows.seq_len, bool)
        learned_T = (item.get("learn", ones_T) != 0) & (item.get(WEIGHTS, ones_T) != 0)
        count = rows.seq_len - offsets
        fits_T = segments_T[:count] != 0
        for offset in range(1, offsets + 1):
            fits_T &= (segments_T[offset : offset + count] == segments_T[:count]) & learned_T[offset : offset + count]
        found += [(rows, row, int(at), offsets) for at in np.flatnonzero(fits_T)]
    if not found:
        raise UserError(
            f"no position of the text has {offsets} more tokens of its document in its row of {rows.seq_len} tokens; "
            "give longer documents, or leave the marginals out"
        )
    return found


def _draw(found: list[tuple[PackedRows, int, int, int]], count: int, seed: int) -> list[_Place]:
    """`count` of the positions, in order; all of them if there are fewer, or if `count` is 0."""
    if count and count < len(found):
        chosen = np.sort(np.random.default_rng(seed).choice(len(found), count, replace=False))
        found = [found[index] for index in chosen]
    return [_place(*one) for one in found]


def _place(rows: PackedRows, row: int, at: int, offsets: int) -> _Place:
    item = rows[row]
    begin = at - item["positions"][at]
    tokens = item["tokens"].tolist()
    in_stream = row * (rows.seq_len - 1) + at
    document = int(np.searchsorted(rows.doc_starts, in_stream, "right")) - 1
    return _Place(tokens[begin : at + 1], tokens[at + 1 : at + 1 + offsets], document)


class _Scores(NamedTuple):
    """Ranks and probabilities of the true tokens, [M, B]; for the heads of m = 1, 2, ..."""

    rank_MB: np.ndarray
    prob_MB: np.ndarray
    covered_MB: np.ndarray
    head_rank_MB: np.ndarray | None
    head_prob_MB: np.ndarray | None


def _scores(found: Distributions, places: list[_Place], real: int) -> _Scores:
    targets_MB = np.array([place.following for place in places]).T
    rank_MB, prob_MB = _rank(found.probs_MBV, targets_MB)
    own = (None, None) if found.heads_MBV is None else _rank(found.heads_MBV, targets_MB[1:])
    arrays = (rank_MB, prob_MB / found.covered_MB, found.covered_MB, *own)
    return _Scores(*(None if array is None else array[:, :real] for array in arrays))


def _rank(probs_MBV: np.ndarray, targets_MB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each target, how many tokens are at least as probable, and its probability."""
    prob_MB1 = np.take_along_axis(probs_MBV, targets_MB[..., None], axis=-1)
    return np.sum(probs_MBV >= prob_MB1, axis=-1), prob_MB1[..., 0]


def _ceiling(scores: _Scores, documents_B: np.ndarray, m: int) -> Ceiling:
    """The figures at offset m + 1."""
    marginal = _accuracy(scores.rank_MB[m], scores.prob_MB[m], documents_B)
    head = share = None
    if scores.head_rank_MB is not None:
        rank_B = scores.head_rank_MB[m - 1]
        head = _accuracy(rank_B, scores.head_prob_MB[m - 1], documents_B)
        share = per_document(rank_B == 1, scores.rank_MB[m] == 1, documents_B)
    count = len(documents_B)
    return Ceiling(m + 1, count, int(documents_B.max()) + 1, marginal, head, share, float(scores.covered_MB[m].mean()))


def _accuracy(rank_B: np.ndarray, prob_B: np.ndarray, documents_B: np.ndarray) -> Accuracy:
    known_B = prob_B > 0  # outside a draft vocabulary the probability is 0
    loss_B = -np.log(np.where(known_B, prob_B, 1))
    one_B = np.ones(len(rank_B))
    shares = [per_document(rank_B <= most, one_B, documents_B) for most in (1, 5)]
    return Accuracy(*shares, per_document(loss_B, known_B, documents_B))


def per_document(over_B: np.ndarray, under_B: np.ndarray, documents_B: np.ndarray) -> Interval:
    """sum(over) / sum(under), with an interval over documents.

    Args:
      over_B, under_B: one number per position.
      documents_B: the document of each position, 0, 1, ...
    """
    return Ratio(*(np.bincount(documents_B, one_B.astype(float)) for one_B in (over_B, under_B))).interval()
