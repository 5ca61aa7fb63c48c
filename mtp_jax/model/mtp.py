"""The multi-token model: the next-token path plus M-1 extra heads that read its state at a tap.

    tokens ─ embed ─ block 1 ─ ... ─ block L-1 ─┬─ block L ─ norm ─ unembed     head 0: token t+1, the LM itself
                                                ├─ head 1  ─ norm ─ unembed     token t+2
                                                └─ head 2  ─ norm ─ unembed     token t+3        (tap = L-1)

Dropping `params["heads"]` leaves a complete decoder. To the rest of the package the model is `init` and `apply`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.model import lm
from mtp_jax.model.cache import LayerCache, init_cache
from mtp_jax.model.heads import FAMILIES

Params = dict[str, Any]


def init_boxed(config: Config, key: jax.Array) -> Params:
    """Parameters boxed with their logical axis names; `sharding.py` reads the names from its abstract evaluation."""
    lm_key, heads_key = jax.random.split(key)
    params = lm.init(config.model, lm_key)
    if config.heads.num_future > 1:
        params["heads"] = FAMILIES[config.heads.kind].init(config, heads_key)
    return params


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters, a tree of plain dicts.

    Args:
      config: the run's config; `model` and `heads` are read.
      key: a PRNG key.
    """
    return nn.meta.unbox(init_boxed(config, key))


def apply(
    config: Config, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Final-normed states of every head at every position, ready for the unembedding.

    Args:
      config: the run's config.
      params: parameters, stacked over layers.
      tokens_BT: token ids.
      positions_BT: position of each token inside its document.
      segment_ids_BT: document of each token; tokens see their own document only.

    Returns:
      hidden_MBTD; head m's state at t predicts token t+1+m. Logits are `lm.logits(config.model, params, hidden)`.
    """
    model = config.model
    below = jax.tree.map(lambda leaf: leaf[: config.tap], params["blocks"])
    above = jax.tree.map(lambda leaf: leaf[config.tap :], params["blocks"])
    tap_BTD = lm.run_blocks(model, below, lm.embed(model, params, tokens_BT), positions_BT, segment_ids_BT)
    states_MBTD = lm.run_blocks(model, above, tap_BTD, positions_BT, segment_ids_BT)[None]
    if "heads" in params:
        if config.heads.tap_norm:
            tap_BTD = lm.final_norm(model, params, tap_BTD)
        family = FAMILIES[config.heads.kind]
        extra_MBTD = family.train(config, params["heads"], tap_BTD, positions_BT, segment_ids_BT)
        states_MBTD = jnp.concatenate([states_MBTD, extra_MBTD])
    return lm.final_norm(model, params, states_MBTD)


def count_params(config: Config) -> int:
    """Number of parameters, heads included."""
    tree = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def decode_view(config: Config, params: Params) -> Params:
    """Parameters as decoding wants them: one tree per layer and per head, in the compute dtype. Made once at load."""
    # Norms multiply by their scale in float32, in training too.
    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(config.model.dtype), params
    )
    view = cast | {"blocks": lm.unstack(cast["blocks"])}
    if "unembed" in view:
        # Products with few rows read it faster this way round on a CPU.
        view["unembed"] = {"table_DV": view["unembed"]["table"].T}
    if "heads" in params:
        view["heads"] = FAMILIES[config.heads.kind].unstack(cast["heads"])
    return view


def decode_forward(
    config: Config, params: Params, tokens_BQ: jax.Array, start_B: jax.Array, caches: tuple[LayerCache, ...]
) -> tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]:
    """The next-token path over Q new tokens per row, behind what the caches hold.

    Args:
      config: the run's config.
      params: a `decode_view`.
      tokens_BQ: the new tokens; row b's stand at positions start_B[b]..start_B[b]+Q-1.
      start_B: tokens of each row that the caches already hold.
      caches: one per layer.

    Returns:
      state_BQD before the final norm, tap_BQD as the heads read it, and the caches.
    """
    model, tap = config.model, config.tap
    x_BQD = lm.embed(model, params, tokens_BQ)
    tap_BQD, below = lm.decode_blocks(model, params["blocks"][:tap], x_BQD, start_B, caches[:tap])
    state_BQD, above = lm.decode_blocks(model, params["blocks"][tap:], tap_BQD, start_B, caches[tap:])
    if config.heads.tap_norm:
        tap_BQD = lm.final_norm(model, params, tap_BQD)
    return state_BQD, tap_BQD, below + above


def init_caches(config: Config, batch: int, slots: int) -> tuple[LayerCache, ...]:
    """One empty cache per layer of the next-token path."""
    c = config.model
    return tuple(init_cache(batch, slots, c.num_kv_heads, c.head_dim, c.dtype) for _ in range(c.num_layers))
