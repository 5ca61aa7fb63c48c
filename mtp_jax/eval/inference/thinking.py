"""Truncated thinking: a response is cut after a budget of tokens, its thinking is ended, and the model goes on.

    response     t1 t2 t3 t4 t5 </think> answer      thinking: five tokens
    budget 3     t1 t2 t3 </think>                   the model continues from here
    budget 5     the response stays as it is

This is the low-budget baseline of arXiv:2504.14047. For a model that writes no mark, all of the response is thinking;
a text such as "The answer is" can then take the place of the mark.
"""

from collections.abc import Callable, Sequence

from mtp_jax.errors import UserError


def thinking_tokens(tokens: Sequence[int], end_ids: Sequence[int], text_of: Callable[[Sequence[int]], str]) -> int:
    """The number of tokens before the end of the thinking; all of them if it does not end.

    The end is found as tokens, or else as text, because the same text can be other tokens in a response.

    Args:
      tokens: tokens of a response.
      end_ids: tokens of the text that ends the thinking.
      text_of: the tokenizer's `decode`.
    """
    mark = list(end_ids)
    whole = list(tokens)
    for at in range(len(whole) - len(mark) + 1):
        if whole[at : at + len(mark)] == mark:
            return at
    words = text_of(mark)
    place = text_of(whole).find(words) if words.strip() else -1
    if place < 0:
        return len(whole)
    return next(count for count in range(len(whole)) if len(text_of(whole[: count + 1])) > place)


def truncate_reasoning(
    tokens: Sequence[int], budget: int, end_ids: Sequence[int], text_of: Callable[[Sequence[int]], str]
) -> list[int] | None:
    """The beginning of a response with its thinking ended after a budget.

    Args:
      tokens: tokens of the response.
      budget: most tokens of thinking.
      end_ids: tokens of the text that ends the thinking.
      text_of: the tokenizer's `decode`.

    Returns:
      The first `budget` tokens and `end_ids`; None if the thinking is not longer than the budget.

    Raises:
      UserError: the budget is below 1, or the text that ends the thinking has no tokens.
    """
    if budget < 1:
        raise UserError(f"a budget of {budget} tokens; it must be at least 1")
    if not end_ids:
        raise UserError("the text that ends the thinking has no tokens; give another --end-think")
    if thinking_tokens(tokens, end_ids, text_of) <= budget:
        return None
    return [*tokens[:budget], *end_ids]
