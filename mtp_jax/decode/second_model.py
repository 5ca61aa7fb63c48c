"""A second model that runs next to the decoded one, with its own caches: for its logits, or as a drafter.

Its rows may begin with another prompt than those of the decoded model. Then they have other lengths, and the same new
tokens:

    decoded model   p0 p1 p2 | n0 n1 n2         3 prompt tokens, n0 is at position 3
    second model    q0 q1 q2 q3 q4 | n0 n1 n2   5 prompt tokens: n0 is at position 5, `offset` is 2

`begin` runs the second model's prompts, before the decoded model reads its own. The newest token of the prompt runs
again in every chunk of the decoded model's prompts, to give the logits for n0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets, engine
from mtp_jax.decode.drafters import DraftContext, Drafter, Drafts
from mtp_jax.decode.hooks import HookContext
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.model.cache import fewest_slots, grow_caches
from mtp_jax.model.given import NewTokens
from mtp_jax.runs.programs import bounded


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ahead:
    """Caches of rows that may be longer than those of the decoded model."""

    caches: Any
    more: int = dataclasses.field(metadata={"static": True})
    """Slots that they have more."""

    @property
    def slots(self) -> int:
        """Slots of the decoded model's caches for which they have room."""
        return fewest_slots(self.caches, otherwise=self.more) - self.more

    def enlarged(self, slots: int) -> "Ahead":
        """The same entries, with room for `slots` positions of the decoded model."""
        return Ahead(grow_caches(self.caches, slots + self.more), self.more)


@dataclasses.dataclass(frozen=True)
class SecondModel:
    """The static part of a second model."""

    arch: Arch
    more: int = 0
    """Length to which its own prompts are padded; 0 if it reads those of the decoded model."""

    def init(self, batch: int, slots: int) -> Any:
        """Empty caches."""
        caches = trunk.init_caches(self.arch, batch, slots + self.more)
        return Ahead(caches, self.more) if self.more else caches

    def begin(self, params: Any, cache: Any) -> Any:
        """Runs its own prompts, if it has any."""
        if not self.more:
            return cache
        chunk = min(self.more, engine.CHUNK)
        caches = cache.caches
        for start in range(0, self.more, chunk):
            caches = _read(self.arch, chunk, params["view"], params["prompt_BT"], jnp.int32(start), caches)
        return Ahead(caches, self.more)

    def logits(self, params: Any, cache: Any, context: HookContext) -> tuple[jax.Array, Any]:
        """Float32 logits [B, X, V] after the same tokens as the decoded model's, and the caches."""
        view = params["view"]
        if not self.more:
            state_BQD, cache = _decode(self.arch, view, context.tokens_BQ, context.start_B, cache)
            return _project(self.arch, view, context.wanted(state_BQD)), cache
        if context.at_BX is None:
            tokens_BQ = context.tokens_BQ
            start_B = context.start_B + params["offset_B"]
        else:
            start_B = params["length_B"] - 1
            tokens_BQ = jnp.take_along_axis(params["prompt_BT"], start_B[:, None], axis=1)
        state_BQD, caches = _decode(self.arch, view, tokens_BQ, start_B, cache.caches)
        return _project(self.arch, view, state_BQD), Ahead(caches, self.more)


def second_model(lm: Any, own: list[list[int]], ids: list[list[int]], rows: int) -> tuple[SecondModel, Any]:
    """The static part and the parameters of a model that reads its own prompts.

    Args:
      lm: the loaded model.
      own: its prompts. If they are those of the decoded model, it needs no caches for them alone.
      ids: prompts of the decoded model.
      rows: rows of the batch. Padding rows have one token.
    """
    view = mtp.trunk_params(lm.decode_params)
    if own == ids:
        return SecondModel(lm.arch), {"view": view}
    more = buckets.padded(max(map(len, own)), engine.CHUNK)
    prompt_BT = buckets.padded_rows(own, rows, more)
    fill = (0, rows - len(own))
    length_B = np.pad(np.array([len(row) for row in own], np.int32), fill, constant_values=1)
    base_B = np.pad(np.array([len(row) for row in ids], np.int32), fill, constant_values=1)
    rest = {"prompt_BT": prompt_BT, "length_B": length_B, "offset_B": length_B - base_B}
    return SecondModel(lm.arch, more), {"view": view} | rest


def _decode(arch: Arch, view: Any, tokens_BQ: jax.Array, start_B: jax.Array, caches: Any) -> tuple[jax.Array, Any]:
    """The last states [B, Q, D] over new tokens, and the caches."""
    # The decoded model may have more tokens. Those are never chosen, but they may be drafted.
    known_BQ = jnp.minimum(tokens_BQ, arch.model.vocab_size - 1)
    new = NewTokens(trunk.embed(arch, view, known_BQ), known_BQ, start_B)
    state_BQD, _, caches = trunk.decode(arch, view, new, caches)
    return state_BQD, caches


def _project(arch: Arch, view: Any, state_BQD: jax.Array) -> jax.Array:
    return trunk.logits(arch, view, trunk.final_norm(arch, view, state_BQD))


@bounded(statics=(0, 1), donate=(5,), weights=2)
def _read(arch: Arch, chunk: int, view: Any, prompt_BT: jax.Array, start: jax.Array, caches: Any) -> Any:
    """The caches after one chunk of the prompts."""
    tokens_BQ = jax.lax.dynamic_slice_in_dim(prompt_BT, start, chunk, axis=1)
    return _decode(arch, view, tokens_BQ, jnp.full((len(prompt_BT),), start), caches)[1]


# As a drafter.


@dataclasses.dataclass(frozen=True)
class _DraftInit:
    arch: Arch

    def __call__(self, arch: Arch, num_draft: int, batch: int, slots: int) -> Any:
        return trunk.init_caches(self.arch, batch, slots)


@dataclasses.dataclass(frozen=True)
class _Draft:
    """Drafts one token after the other."""

    arch: Arch

    def __call__(self, arch: Arch, params: Any, caches: Any, context: DraftContext) -> tuple[Drafts, Any]:
        view = context.own
        # The tokens of this round, and the newest one. Those after it are overwritten.
        place_Q = jnp.arange(context.tap_BQD.shape[1] + 1)
        slot_BQ = jnp.minimum(context.start_B[:, None] + place_Q[None, :], context.tokens_BS.shape[1] - 1)
        tokens_BQ = jnp.take_along_axis(context.tokens_BS, slot_BQ, axis=1)
        state_BQD, caches = _decode(self.arch, view, tokens_BQ, context.start_B, caches)
        at_B11 = (context.total_B - 1 - context.start_B)[:, None, None]
        # A row that takes no part may have any total.
        state_B1D = jnp.take_along_axis(state_BQD, jnp.clip(at_B11, 0, len(place_Q) - 1), axis=1)
        pieces = []
        for k in range(context.count):
            if k:
                state_B1D, caches = _decode(self.arch, view, pieces[-1].tokens_BP, context.total_B + k - 1, caches)
            pieces.append(self._propose(arch, context, _project(self.arch, view, state_B1D), k))
        if not pieces:
            return Drafts(jnp.zeros((len(context.total_B), 0), jnp.int32)), caches
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces), caches

    def _propose(self, arch: Arch, context: DraftContext, logits_B1V: jax.Array, place: int) -> Drafts:
        own = logits_B1V.shape[-1]
        known = arch.model.vocab_size
        if own < known:
            return context.propose(logits_B1V, place, jnp.arange(own))
        return context.propose(logits_B1V[..., :known], place)


def model_drafter(name: str, lm: Any, num_draft: int) -> Drafter:
    """A drafter that runs another model of the same vocabulary (speculative decoding, Leviathan et al. 2023).

    It reads the prompt of the decoded model.

    Args:
      name: name of the drafter.
      lm: the loaded model that drafts.
      num_draft: P, drafts per round.

    Raises:
      UserError: num_draft is below 1.
    """
    if not isinstance(num_draft, int) or num_draft < 1:
        raise UserError(f"num_draft={num_draft!r} of drafter {name!r}; it must be a whole number, at least 1")
    view = mtp.trunk_params(lm.decode_params)
    return Drafter(name, num_draft, _DraftInit(lm.arch), _Draft(lm.arch), params=view)
