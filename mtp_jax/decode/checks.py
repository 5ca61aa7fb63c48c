"""Refuses what a drafter returns, and rules that do not fit the model, while programs are traced."""

from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch, families
from mtp_jax.decode.drafters import Drafter, Drafts
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError


def checked(drafter: Drafter, drafts: Drafts, rows: int, vocab_size: int, wants_probs: bool) -> Drafts:
    """Checks what a drafter returns, while it is traced. Converts tokens to int32 and probabilities to float32."""
    V = vocab_size
    most = drafter.num_draft
    is_drafts = isinstance(drafts, Drafts)
    tokens = drafts.tokens_BP if is_drafts else drafts
    probs = drafts.probs_BPV if is_drafts else None
    shape = jnp.shape(tokens) if hasattr(tokens, "dtype") else ()
    integers = hasattr(tokens, "dtype") and jnp.issubdtype(tokens.dtype, jnp.integer)
    if not is_drafts or not integers or len(shape) != 2 or shape[0] != rows or shape[1] > most:
        got = f"{tokens.dtype} of shape {list(shape)}" if hasattr(tokens, "dtype") else repr(tokens)
        raise UserError(
            f"drafter {drafter.name!r} returns {got}; it must return Drafts(tokens) with whole numbers of shape "
            f"[{rows}, {most}], or fewer columns"
        )
    if probs is not None and jnp.shape(probs) != (*shape, V):
        raise UserError(
            f"drafter {drafter.name!r} returns probabilities of shape {list(jnp.shape(probs))} for drafts of "
            f"shape {list(shape)}; they must be {[*shape, V]}"
        )
    if probs is None and shape[1] and wants_probs:
        raise UserError(
            f"accept='confidence' needs the drafter's probabilities, but {drafter.name!r} returns none; return them as "
            "Drafts.probs_BPV, or use another accept rule"
        )
    worth_B = drafts.worth_B
    if worth_B is not None and (jnp.shape(worth_B) != (rows,) or worth_B.dtype != bool):
        raise UserError(
            f"drafter {drafter.name!r} returns worth_B as {worth_B.dtype} of shape {list(jnp.shape(worth_B))}; it must "
            f"be bool of shape [{rows}]"
        )
    probs = None if probs is None else jnp.asarray(probs, jnp.float32)
    return Drafts(jnp.asarray(tokens, jnp.int32), probs, worth_B)


def check_rule(rule: Rule, arch: Arch, drafter: Drafter, num_draft: int | str | None) -> None:
    """Refuses a rule that emits drafts without verification, unless the model was trained for that and its own
    predictions are the drafts.

    Args:
      rule: the accept rule.
      arch: the model.
      drafter: the drafter of the request.
      num_draft: the number of drafts that the caller asked for.

    Raises:
      UserError: the rule does not fit.
    """
    if rule.facts.ahead is None:
        return
    asked = f"accept={rule.name!r}"
    if not arch.heads.facts.stands_alone:
        kinds = " or ".join(f"heads.kind={kind!r}" for kind in families("stands_alone"))
        raise UserError(
            f"{asked} emits tokens without verification, for which this model was not trained; train it with {kinds}, "
            "or use accept='exact'"
        )
    if drafter.num_draft and drafter.name != "heads":
        raise UserError(f"{asked} emits the model's own predictions, not those of draft={drafter.name!r}; use 'heads'")
    if num_draft == "auto":
        raise UserError(f"num_draft='auto' with {asked} would change the tokens from call to call; give a number")


def checked_caches(drafter: Drafter, drafts: Drafts, caches: Any) -> Any:
    """The model's caches after the drafter: those that it changed, or else `caches`.

    Raises:
      UserError: it returns arrays of other names, shapes or dtypes.
    """
    if drafts.caches is None:
        return caches

    def form(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)

    if form(drafts.caches) != form(caches):
        raise UserError(
            f"drafter {drafter.name!r} returns caches of another form than DraftContext.caches; return those, with "
            "other entries only"
        )
    return drafts.caches
