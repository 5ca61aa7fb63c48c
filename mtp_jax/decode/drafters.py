"""Drafters: who proposes the tokens that the model verifies. A drafter is a pair of pure functions.

    init(config, num_draft, batch, slots) -> cache
    draft(config, params, cache, context) -> (drafts_BP, cache)

`draft` runs after every verification (and after the prompt). Nothing that it returns can change the output, only how
many tokens a round emits. A drafter of your own is a `Drafter` with your two functions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.decode.sampling import greedy
from mtp_jax.errors import UserError
from mtp_jax.model import lm
from mtp_jax.model.heads import FAMILIES


class DraftContext(NamedTuple):
    """What a drafter may look at."""

    tap_BQD: jax.Array
    """Tapped states of the Q positions that were just processed."""
    start_B: jax.Array
    """Position of the first of them."""
    index_B: jax.Array
    """Which of them produced the row's newest token; those behind it were rejected."""
    tokens_BS: jax.Array
    """Every row's prompt and output so far."""
    total_B: jax.Array
    """How many of those count; the newest token is at total - 1."""


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A drafter as the engine sees it; static, so its functions are part of what is compiled."""

    name: str
    num_draft: int
    """P, drafts per round."""
    init: Callable[[Config, int, int, int], Any]
    draft: Callable[[Config, Any, Any, DraftContext], tuple[jax.Array, Any]]


def _no_cache(config: Config, num_draft: int, batch: int, slots: int) -> tuple:
    return ()


def _no_drafts(config: Config, params: Any, cache: tuple, context: DraftContext) -> tuple[jax.Array, tuple]:
    return jnp.zeros((context.total_B.shape[0], 0), jnp.int32), cache


def _heads_cache(config: Config, num_draft: int, batch: int, slots: int) -> Any:
    return FAMILIES[config.heads.kind].init_cache(config, batch, slots, num_draft)


def _heads_draft(config: Config, params: Any, cache: Any, context: DraftContext) -> tuple[jax.Array, Any]:
    """The arg-max of heads 1..P at the position that produced the newest token; head m predicts m tokens behind it."""
    states_PBD, cache = FAMILIES[config.heads.kind].draft(
        config, params["heads"], cache, context.tap_BQD, context.start_B, context.index_B
    )
    hidden_PBD = lm.final_norm(config.model, params, states_PBD)
    return greedy(lm.logits(config.model, params, hidden_PBD)).T, cache


NONE = Drafter("none", 0, _no_cache, _no_drafts)
"""Plain autoregression by the same engine: the baseline of every ratio."""


def make_drafter(name: str, config: Config, num_draft: int | None = None) -> Drafter:
    """A drafter by name.

    Args:
      name: `heads` or `none`.
      config: the model's config.
      num_draft: P; None takes every head.

    Raises:
      UserError: an unknown name, a model without heads, or more drafts than extra heads.
    """
    if name == "heads" and num_draft == 0:
        return NONE
    if name == "none":
        if num_draft:
            raise UserError(f"num_draft={num_draft} with draft='none'; use draft='heads', or leave num_draft out")
        return NONE
    if name != "heads":
        raise UserError(f"draft={name!r} is no drafter; choose 'heads' or 'none'")
    extra = config.heads.num_future - 1
    if extra == 0:
        raise UserError("draft='heads', but this model has no extra heads (heads.num_future=1); use draft='none'")
    num_draft = extra if num_draft is None else num_draft
    if not 1 <= num_draft <= extra:
        raise UserError(
            f"num_draft={num_draft}, but this model has {extra} extra heads; use 0..{extra}, or draft='none'"
        )
    return Drafter("heads", num_draft, _heads_cache, _heads_draft)
