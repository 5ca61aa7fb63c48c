"""Chooses drafts from a drafter's logits, with the noise that verification will use."""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax.decode import sampling
from mtp_jax.decode.drafters import Drafts
from mtp_jax.decode.sampling import Controls
from mtp_jax.decode.state import DecodeState, Plan
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.model.heads.base import draft_places


def probability(logits_BQV: jax.Array, tokens_BQ: jax.Array) -> jax.Array:
    """Probabilities [B, Q] of tokens, at temperature 1."""
    return jnp.exp(sampling.log_probability(logits_BQV, tokens_BQ))


def propose(
    plan: Plan,
    controls: Controls,
    state: DecodeState,
    logits_BPV: jax.Array,
    first: int = 0,
    ids_v: jax.Array | None = None,
) -> Drafts:
    """Drafts from a drafter's logits; see `DraftContext.propose`."""
    facts = plan.rule.facts
    known = plan.arch.model.vocab_size if ids_v is None else len(ids_v)
    if logits_BPV.shape[-1] != known:
        which = "the model has" if ids_v is None else "ids_v has"
        raise UserError(
            f"drafter {plan.drafter.name!r} proposes from logits over {logits_BPV.shape[-1]} tokens, but {which} "
            f"{known}; give ids_v, with the model's id for each token of the drafter"
        )
    if ids_v is not None:
        logits_BPV = mtp.over_vocabulary(logits_BPV, draft_places(plan.arch, ids_v))
    position_BP = state.total_B[:, None] + first + jnp.arange(logits_BPV.shape[1])[None, :]
    # Without the caller's logits function, which might read tokens that do not exist yet. Penalty and bias read only
    # tokens that exist.
    sampler = dataclasses.replace(plan.sampler, logits_fn=None)
    known_BP = jnp.broadcast_to(state.total_B[:, None], position_BP.shape)
    logits_BPV = sampling.process(sampler, controls, logits_BPV, state.tokens_BS, known_BP)
    tokens_BP = sampling.choose(sampler, controls, logits_BPV, position_BP)
    sure_BP = None if facts.blind else probability(logits_BPV, tokens_BP)
    probs_BPV = None
    if facts.needs_probs and not sampler.sampled:
        probs_BPV = jax.nn.softmax(logits_BPV)
    elif facts.reads_drafter:
        probs_BPV = sampling.probabilities(sampler, controls, logits_BPV)
    return Drafts(tokens_BP, probs_BPV, sure_BP=sure_BP, chosen_BP=None if facts.ahead is None else sure_BP)
