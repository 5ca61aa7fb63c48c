"""What a conversation keeps of its earlier turns: the caches, and the tokens that have entries in them.

    held       s0 s1 s2 s3 s4 s5 s6 s7          prompt and answer of the turn before, without its last token
    next       s0 s1 s2 s3 s4 t5 t6 t7 t8 t9    the longer conversation, as the template writes it
    begins              ^                       P before the first difference, because heads may have read later tokens

The entries before that position are kept. The others are written again, and no query sees the entries after them.
"""

from typing import Any, NamedTuple

import jax

from mtp_jax.decode import buckets, engine
from mtp_jax.decode.hooks import Hooks, by_position
from mtp_jax.decode.state import LEAST_SLOTS, DecodeState, Kept, Plan, fresh_caches, slots_needed
from mtp_jax.runs.programs import bounded


class Held(NamedTuple):
    """Caches of one row, and the tokens that have entries in them."""

    ids: list[int]
    caches: Any = None
    """None before the first turn."""
    drafter_cache: Any = None
    hook_caches: tuple = ()
    hooks: Hooks = ()
    """The hooks that these caches are of."""

    def kept(self, plan: Plan, ids: list[int]) -> Kept:
        """The caches for the next turn, and how many of their entries it can use.

        Args:
          plan: static settings of the turn. The drafter is the same as in the turns before.
          ids: prompt of the turn.
        """
        if self.hooks != plan.hooks:
            return Held([], hooks=plan.hooks).kept(plan, ids)
        same = 0
        while same < min(len(self.ids), len(ids) - 1) and self.ids[same] == ids[same]:
            same += 1
        held = self.caches, self.drafter_cache, self.hook_caches
        caches = _no_entries(plan, LEAST_SLOTS) if self.caches is None else held
        # Heads that read tokens have entries that depend on the next P tokens.
        return Kept(max(same - plan.drafter.num_draft, 0), *caches)


@bounded(statics=(0, 1))
def _no_entries(plan: Plan, slots: int) -> tuple[Any, Any, tuple]:
    return fresh_caches(plan, 1, slots)


def held_of(plan: Plan, state: DecodeState) -> Held:
    """The `Held` of a state of one row. The newest token has no entry yet. Empty if a hook cannot start from the middle
    of a row."""
    if not by_position(plan.hooks, state.hook_caches):
        return Held([])
    tokens_1S, total_1 = jax.device_get((state.tokens_BS, state.total_B))
    ids = tokens_1S[0, : total_1[0] - 1].tolist()
    return Held(ids, state.caches, state.drafter_cache, state.hook_caches, plan.hooks)


def slots_of_turn(total: int, num_draft: int, longest: int) -> int:
    """Slots for a turn that ends within `total` tokens: a power of two, so that the next turn usually has as many.

    Args:
      total: number of tokens, padding included.
      num_draft: P.
      longest: largest number of tokens that a row may have.
    """
    most = slots_needed(longest + engine.CHUNK, num_draft)
    return min(buckets.power(slots_needed(total, num_draft), LEAST_SLOTS), most)
