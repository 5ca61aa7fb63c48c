"""The functions `generate` and `stream`: they run prompts through the engine and return text, tokens and statistics."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax.decode.drafters import Drafter
from mtp_jax.decode.options import Options, takes_options
from mtp_jax.decode.prompts import Prompt
from mtp_jax.decode.records import TokenRecords
from mtp_jax.decode.request import Model, NumDraft, Request
from mtp_jax.decode.result import Generation
from mtp_jax.errors import UserError

UNLIMITED = np.iinfo(np.int32).max
Item = tuple[int, str] | tuple[int, str, TokenRecords] | Generation


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
    n: int = 1,
    options: Options | None = None,
    **keywords: Any,
) -> Generation:
    """Generates text with drafts that the model verifies. With any drafter, the tokens are those of plain decoding.

    This is also true for sampling: the noise that draws the token at a position depends only on the row's seed and the
    position. A row gets the same tokens with any drafter, and alone or in a batch if it has its own seed. It also gets
    the same tokens in one call or in several calls that continue from the tokens of the call before. (Continue from the
    tokens, not from the text: a text that ends inside a character does not give the same tokens.)

    Args:
      lm: a loaded model.
      prompts: strings; lists of messages, `{"role": "user", "content": "..."}`, for the tokenizer's chat template;
        lists of token ids, to which no token is added; or what a tokenizer returns: a dict with `input_ids`.
      max_new_tokens: largest number of new tokens per prompt. There are fewer if the row reaches the model's
        max_seq_len.
      draft: `heads`, `lookup`, `heads+lookup`, `local`, `none`, or your own `Drafter`. `auto` means heads, or lookup if
        the model has no extra heads.
      num_draft: P, drafts per round. None drafts with every head, 4 with lookup and 8 with local. `auto` measures which
        number is fastest, and may use no drafts. With a rule other than `exact` the tokens depend on P, so `auto` may
        give other tokens in every call.
      stop: strings that end a row; they may contain names of special tokens. The text is cut before the first of them.
      ignore_eos: whether to continue after an end token, for measurements.
      n: samples per prompt. Sample j of prompt i is row i * n + j of every list in the result. The rows are those of a
        call with each prompt n times, but each prompt is run once. A list of seeds has one number per row.
      options: how tokens are chosen and accepted.
      keywords: fields of `Options`, which replace those in `options`: `temperature=0.8, seed=1`.

    Raises:
      UserError: the model is teacherless, there are no prompts, a prompt is empty, has ids outside the vocabulary or is
        longer than the model's limit, a setting is out of range, the cache does not fit into memory, or the logits do
        not allow to choose a token.
    """
    options = Options.of(options, keywords)
    request = Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos, n=n)
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
    n: int = 1,
    options: Options | None = None,
    **keywords: Any,
) -> Iterator[Item]:
    """Like `generate`, but yields `(row, text)` as soon as text is final, and the `Generation` at the end.

    The row is the index of the prompt. If there are n samples per prompt, sample j of prompt i is row i * n + j.

    A piece never ends inside a character, nor inside text that may become a stop string. The options are those of
    `generate`. The call itself processes the prompts and raises the errors of `generate`.

    With `logprobs` the items are `(row, text, records)`. `records` are a `TokenRecords` of the row's tokens since its
    last item. Their text may be in a later item, and the text of this item may be empty.
    """
    if lm.tokenizer is None:
        raise UserError("streaming needs a tokenizer, but this model has none; use generate with token ids")
    options = Options.of(options, keywords)
    return _pieces(Request(lm, prompts, max_new_tokens, draft, num_draft, options, stop, ignore_eos=False, n=n))


def _pieces(request: Request) -> Iterator[Item]:
    shown = [""] * len(request.settled_text())
    told = [0] * len(shown)
    while True:
        for row, text in enumerate(request.settled_text()):
            piece = text[len(shown[row]) :]
            shown[row] = text
            if not request.keeps_records:
                if piece:
                    yield row, piece
                continue
            records = request.records(row, told[row])
            told[row] += len(records.tokens)
            if piece or records.tokens:
                yield row, piece, records
        if request.done:
            break
        request.advance(1)
    yield request.result()
