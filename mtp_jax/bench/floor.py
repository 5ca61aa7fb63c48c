"""The memory floor of decoding: the number of bytes that a step must read, divided by the device's reading speed."""

import time
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.config import Config
from mtp_jax.model import mtp
from mtp_jax.model.cache import LayerCache
from mtp_jax.model.heads import FAMILIES


def bytes_touched(config: Config, batch: int, live: float, heads: int) -> tuple[float, float] | None:
    """The smallest number of bytes that a plain step and a round with drafts must read: the weights once, and the used
    slots of the caches.

    Args:
      config: the model.
      batch: number of rows.
      live: mean number of used cache slots per row.
      heads: number of heads that draft.

    Returns:
      Bytes of a step and of a round. The round adds the heads with their caches, and the unembedding: once if all heads
      draft together, once per head if each reads the draft of the one before. None if the model is no stack of decoder
      blocks: its steps may leave parts of it out.
    """
    if not config.model.is_stack:
        return None
    c = config.model.block
    size = jnp.dtype(c.dtype).itemsize
    params = mtp.abstract(config.arch)
    table = c.vocab_size * c.d_model
    blocks = _count(params["blocks"])
    plain = size * (blocks + c.num_layers * 2 * batch * live * c.num_kv_heads * c.head_dim + table)
    if not heads:
        return plain, plain
    facts = config.heads.facts
    # A set of parameters that all depths share is read once per depth. The near heads of an anticausal chain need the
    # far ones. Masks run through the trunk's blocks in the same pass, and share their LoRA factors.
    sets = 1 if facts.needs_all else heads if facts.one_set else heads / (config.heads.num_future - 1)
    own = sets * _count(params["heads"])
    draft_table = config.heads.draft_vocab * c.d_model or table
    tables = 0 if config.heads.unembed == "own" else (heads if facts.chains_tokens else 1) * draft_table
    slots = jax.eval_shape(lambda: FAMILIES[config.heads.kind].init_cache(config.arch, batch, 1, heads))
    caches = live * sum(_count(cache) / cache.slots for cache in _layer_caches(slots))
    return plain, plain + size * (own + tables + caches)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _layer_caches(tree: Any) -> list[LayerCache]:
    def is_cache(node: Any) -> bool:
        return isinstance(node, LayerCache)

    return [node for node in jax.tree.leaves(tree, is_leaf=is_cache) if is_cache(node)]


def measure_bandwidth(num_bytes: float, seconds: float = 1.0) -> float:
    """Bytes per second at which this device reads an array of this size, measured with matrix-vector products.

    The caller gives the size of the model. So the array fits into the processor's caches if and only if the model does.
    """
    width = 1024
    matrix_IO = jnp.ones((max(int(num_bytes / 4 / width), 1), width))
    product = jax.jit(lambda matrix_IO, vector_O: matrix_IO @ vector_O)
    vector_O = jnp.ones((width,))
    product(matrix_IO, vector_O).block_until_ready()
    count = 0
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        product(matrix_IO, vector_O).block_until_ready()
        count += 1
    return count * matrix_IO.nbytes / (time.perf_counter() - began)
