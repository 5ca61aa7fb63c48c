"""How uncertain a model is about every next token. A small byte model with these entropies cuts text into patches.

The entropy model of the Byte Latent Transformer (arXiv:2412.09871, section 2.3) is an ordinary decoder over bytes:
`configs/byte_entropy.py` trains one. Slot t holds the entropy of the distribution of token t+1:

    H_t = - sum over v of p(v | tokens up to t) ln p(v | tokens up to t)        in nats, over the whole vocabulary
"""

import jax
import jax.numpy as jnp

from mtp_jax.config import Arch
from mtp_jax.model import mtp


def next_entropy(
    arch: Arch, params: mtp.Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None
) -> jax.Array:
    """Entropy of the next token at every position, by head 0. The extra heads do not run.

    Args:
      arch: the model and its heads.
      params: parameters, stacked over layers.
      tokens_BT: token ids.
      segment_ids_BT: document of each token; tokens see only their own document. None if every row is one document.

    Returns:
      [B, T] float32 in nats, from 0 to ln V. The last slot of a document is about the token after it.
    """
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones(tokens_BT.shape, jnp.int32)
    trunk = mtp.trunk_params(params)
    hidden_1BTD = mtp.apply(arch, trunk, tokens_BT, _positions(segment_ids_BT), segment_ids_BT)

    def of_row(hidden_TD: jax.Array) -> jax.Array:
        return entropy_of(mtp.logits(arch, trunk, hidden_TD[None, None])[0, 0])

    # Row by row, so that there are logits of one row only.
    return jax.lax.map(of_row, hidden_1BTD[0])


def entropy_of(logits: jax.Array) -> jax.Array:
    """Entropies [...] in nats of the distributions of logits [..., V]."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    probs = jnp.exp(log_probs)
    return -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)


def _positions(segment_ids_BT: jax.Array) -> jax.Array:
    """Position of every token in its document."""
    at_BT = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1])[None], segment_ids_BT.shape)
    begins_BT = (segment_ids_BT != jnp.roll(segment_ids_BT, 1, axis=1)).at[:, 0].set(True)
    return at_BT - jax.lax.cummax(jnp.where(begins_BT, at_BT, 0), axis=1)
