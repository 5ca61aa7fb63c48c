"""Flash attention of cuDNN, for rows on NVIDIA GPUs.

Documents and windows are passed as a mask [B, 1, T, S] in q's dtype. It is exact for any packing and any window, also a
traced one. In bfloat16 the mask takes 2 B T S bytes for all attention heads together; scores in XLA take 4 B N T S.
Tiles above the diagonal are not computed.
"""

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention import AttnSpec, visible

AMPERE = 8.0
HOPPER = 9.0


def refusal(q_BTNH: jax.Array, spec: AttnSpec, capability: float) -> str | None:
    """Why cuDNN cannot compute attention for these queries on a GPU of this compute capability; None if it can."""
    _, T, _, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    most = 128 if capability < HOPPER else 256
    if capability < AMPERE:
        return f"its flash attention needs a GPU of compute capability {AMPERE}, and this one has {capability}"
    if dtype != jnp.bfloat16:
        return f"it computes in bfloat16, not {dtype}: set model.dtype='bfloat16'"
    if spec.softcap:
        return f"it has no soft cap, but model.attn_softcap={spec.softcap}"
    if most < H or H % 8:
        return f"on this GPU it needs a model.head_dim of at most {most} that is a multiple of 8, not {H}"
    return f"it needs rows with an even number of tokens, not {T}" if T % 2 else None


def capability() -> float:
    """Compute capability of this machine's GPU; 0 if NVIDIA did not make it."""
    device = jax.local_devices(backend="gpu")[0]
    return float(device.compute_capability) if "cuda" in device.client.platform_version else 0.0


def cudnn_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    query_slots_BT: jax.Array,
    segment_ids_BS: jax.Array | None,
    spec: AttnSpec,
) -> jax.Array:
    """`attention` by cuDNN, with the same arguments and result."""
    T = q_BTNH.shape[1]
    S = k_BKSH.shape[2]
    mask_B1TS = visible(query_slots_BT, segment_ids_BS, S, spec.window)[:, None]
    # cuDNN's causal mask fits whole rows only. The queries of a shard may begin in the middle of their row.
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BKSH.swapaxes(1, 2),
        v_BKSH.swapaxes(1, 2),
        mask=mask_B1TS,
        scale=spec.scale,
        is_causal=T == S,
        implementation="cudnn",
    )
