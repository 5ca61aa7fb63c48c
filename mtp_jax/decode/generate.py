"""Text in, text out: batching of prompts, buckets, stop conditions, streaming and statistics around the engine."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.options import Options
from mtp_jax.decode.prompts import Prompt
from mtp_jax.decode.request import Model, NumDraft, Request
from mtp_jax.decode.result import Generation
from mtp_jax.decode.sampling import LogitsFn
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError

UNLIMITED = np.iinfo(np.int32).max


def generate(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_fn: LogitsFn | None = None,
    accept: str | Rule = "exact",
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Generation:
    """Generates, drafted and verified; the tokens are those of plain decoding, whoever drafts.

    That holds for sampling as well: the token at a position is drawn with noise that depends on the row's seed and the
    position alone. A row gets the same tokens with any drafter, alone or in a batch (given its own seed), in one call
    or in several that each go on from the tokens of the one before (from the tokens: a text that ends inside a
    character is not what they decode to).

    Args:
      lm: a loaded model.
      prompts: strings; lists of messages, `{"role": "user", "content": "..."}`, which the tokenizer's chat template
        writes; lists of token ids (no token is added to those); or what a tokenizer returns: a dict with `input_ids`.
      max_new_tokens: most new tokens per prompt; fewer where the model's max_seq_len ends.
      draft: `heads`, `lookup`, `heads+lookup`, `none`, or a `Drafter` of your own; `auto` is heads, and lookup where
        the model has none.
      num_draft: P, drafts per round; None drafts with every head; `auto` measures what pays, down to none at all. With
        a rule other than `exact` the tokens depend on P, so `auto` gives other ones in every call.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens.
      top_p: only the smallest set of most likely tokens that holds this probability.
      min_p: only tokens at least this fraction as likely as the most likely one.
      seed: one number, from which every row derives its own by its place in the batch, or one per prompt, with which a
        row gets the same tokens wherever it stands.
      repetition_penalty: divides positive and multiplies negative logits of tokens that prompt or output hold.
      logit_bias: numbers that are added to the logits of tokens; -inf forbids one.
      logits_fn: `(logits_V, tokens_S, length) -> logits_V`, a jax function of the logits behind the first `length`
        tokens of a row. Pass the same function object in every call: a new one is compiled anew.
      accept: `exact`, or `rejection`, the same in law only; `typical` and `confidence` are lossy: they take drafts that
        the model would not have chosen. A `mtp_jax.Rule` sets their thresholds. At temperature 0 typical goes by the
        model's distribution at temperature 1.
      stop: strings that end a row, also ones that spell special tokens; the text is cut before the first of them.
      ignore_eos: go on after an end token, for measurements.

    Raises:
      UserError: a teacherless model, no prompts, an empty prompt, ids outside the vocabulary, a prompt longer than the
        model's limit, a setting out of range, a cache that does not fit into memory, or logits from which no token can
        be chosen.
    """
    options = Options(temperature, top_k, top_p, min_p, seed, repetition_penalty, logit_bias, logits_fn, accept)
    request = Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos)
    while not request.done:
        request.advance(1 if request.stop else UNLIMITED)
    return request.result()


def stream(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Sequence[int] = 0,
    repetition_penalty: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    logits_fn: LogitsFn | None = None,
    accept: str | Rule = "exact",
    stop: Sequence[str] = (),
) -> Iterator[tuple[int, str] | Generation]:
    """Like `generate`, yielding `(prompt index, text)` as text is decided and the `Generation` as the last item.

    A piece never ends inside a character, nor inside what may become a stop string. Options are those of `generate`.
    Raises like `generate`, at the call; the prompts are processed by then.
    """
    if lm.tokenizer is None:
        raise UserError("streaming needs a tokenizer, and this model was trained on token ids; use generate")
    options = Options(temperature, top_k, top_p, min_p, seed, repetition_penalty, logit_bias, logits_fn, accept)
    return _pieces(Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos=False))


def _pieces(request: "Request") -> Iterator[tuple[int, str] | Generation]:
    shown = [""] * len(request.settled_text())
    while True:
        for row, text in enumerate(request.settled_text()):
            if piece := text[len(shown[row]) :]:
                shown[row] = text
                yield row, piece
        if request.done:
            break
        request.advance(1)
    yield request.result()
