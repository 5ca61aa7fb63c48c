"""Text in, text out: batching of prompts, buckets, stop conditions, streaming and statistics around the engine."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.options import Options, takes_options
from mtp_jax.decode.prompts import Prompt
from mtp_jax.decode.request import Model, NumDraft, Request
from mtp_jax.decode.result import Generation
from mtp_jax.errors import UserError

UNLIMITED = np.iinfo(np.int32).max


@takes_options
def generate(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    options: Options | None = None,
    **keywords: Any,
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
      stop: strings that end a row, also ones that spell special tokens; the text is cut before the first of them.
      ignore_eos: go on after an end token, for measurements.
      options: how tokens are chosen and accepted.
      keywords: fields of `Options`, in place of those in `options`: `temperature=0.8, seed=1`.

    Raises:
      UserError: a teacherless model, no prompts, an empty prompt, ids outside the vocabulary, a prompt longer than the
        model's limit, a setting out of range, a cache that does not fit into memory, or logits from which no token can
        be chosen.
    """
    options = Options.of(options, keywords)
    request = Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos)
    while not request.done:
        request.advance(1 if request.stop else UNLIMITED)
    return request.result()


@takes_options
def stream(
    lm: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | Drafter = "auto",
    num_draft: NumDraft = None,
    stop: Sequence[str] = (),
    options: Options | None = None,
    **keywords: Any,
) -> Iterator[tuple[int, str] | Generation]:
    """Like `generate`, yielding `(prompt index, text)` as text is decided and the `Generation` as the last item.

    A piece never ends inside a character, nor inside what may become a stop string. Options are those of `generate`.
    Raises like `generate`, at the call; the prompts are processed by then.
    """
    if lm.tokenizer is None:
        raise UserError("streaming needs a tokenizer, and this model was trained on token ids; use generate")
    options = Options.of(options, keywords)
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
