"""Splash attention, the Pallas kernel for TPUs in JAX: flash attention that skips tiles that no query sees.

Causality and windows are static masks. Documents are segment ids. If the layers of a model have different windows,
there is one kernel per window, and the program chooses among them at run time.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec

from mtp_jax.kernels.attention import AttnSpec, own_segments
from mtp_jax.kernels.linear import LINEAR

LANES = 128
"""The lengths of the kernel's tiles are multiples of this."""
NATIVE = (None, "default", "bfloat16", "fastest")
"""Matmul precisions under which bfloat16 products stay bfloat16."""
Kernels = tuple[splash.SplashAttentionKernel, ...]
"""One kernel for each window of `AttnSpec.windows`; a single kernel if there are none."""


def refusal(q_BTNH: jax.Array, shards: int, spec: AttnSpec) -> str | None:
    """Why the kernel cannot compute attention for these queries, split over `shards` devices; None if it can."""
    slots = q_BTNH.shape[1]
    precision = jax.config.jax_default_matmul_precision
    queries = slots // shards
    if queries % LANES or slots % LANES:
        return f"it needs multiples of {LANES} tokens, not {queries} queries per device over {slots} tokens"
    if spec.window is not None and not spec.windows:
        return "its masks are static, but the window is known only at run time"
    if q_BTNH.dtype == jnp.bfloat16 and precision not in NATIVE:
        return f"in bfloat16 it needs the default matmul precision, not jax_default_matmul_precision={precision!r}"
    return None


def make_kernels(
    spec: AttnSpec, queries: int, slots: int, heads: int, shards: int = 1, *, interpret: bool = False
) -> Kernels:
    """Makes the kernels for rows of `queries` queries and `heads` attention heads. The queries are split equally over
    `shards` devices."""
    tile = next(size for size in (512, 256, LANES) if queries // shards % size == 0 and slots % size == 0)
    sizes = splash.BlockSizes(*(tile,) * 8)
    made = []
    for window in spec.windows or (None,):
        seen = masks.LocalMask((queries, slots), (None if window is None else window - 1, 0), 0)
        made.append(
            splash.make_splash_mha(
                masks.MultiHeadMask([seen] * heads),
                block_sizes=sizes,
                head_shards=1,
                q_seq_shards=shards,
                attn_logits_soft_cap=spec.softcap or None,
                # Remat policies keep the results of products by this name. The residuals are kept with them.
                residual_checkpoint_name=LINEAR,
                interpret=interpret,
            )
        )
    return tuple(made)


def kernel_specs(kernels: Kernels, mesh: jax.sharding.AbstractMesh, length: str | None) -> Kernels:
    """How the masks inside the kernels are split over a mesh; its axis `length` splits the queries."""
    where = NamedSharding(mesh, PartitionSpec(None, length))
    return tuple(kernel.manual_sharding_spec(where) for kernel in kernels)


def splash_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None,
    spec: AttnSpec,
    kernels: Kernels,
) -> jax.Array:
    """`attention` by these kernels. The other arguments and the result are the same."""
    q_BNTH = (q_BTNH * spec.scale).swapaxes(1, 2)
    ids = None
    if segment_ids_BS is not None:
        ids = splash.SegmentIds(own_segments(query_slots_BT, segment_ids_BS), segment_ids_BS)
    run = [jax.vmap(kernel) for kernel in kernels]
    if len(run) == 1:
        mixed_BNTH = run[0](q_BNTH, k_BKSH, v_BKSH, ids)
    else:
        which = jnp.argmax(jnp.asarray(spec.windows) == spec.window)
        mixed_BNTH = jax.lax.switch(which, run, q_BNTH, k_BKSH, v_BKSH, ids)
    return mixed_BNTH.swapaxes(1, 2)
