"""Random inputs of the cross-entropy, and one jitted call that returns all it can return."""

import functools

import jax
import numpy as np
from reference.quick import quick_jit

from mtp_jax.losses.mtp import XENT


def problem(M=2, B=1, T=11, D=8, V=37, seed=0):
    """(hidden, table, targets, weights) in float32, a quarter of the weights 0 and the others in (0.5, 2)."""
    rng = np.random.default_rng(seed)
    hidden_MBTD = rng.standard_normal((M, B, T, D)).astype(np.float32)
    table_VD = rng.standard_normal((V, D)).astype(np.float32)
    targets_MBT = rng.integers(0, V, (M, B, T)).astype(np.int32)
    weights_MBT = (rng.uniform(0.5, 2, (M, B, T)) * (rng.random((M, B, T)) < 0.75)).astype(np.float32)
    return hidden_MBTD, table_VD, targets_MBT, weights_MBT


@functools.partial(quick_jit, static_argnums=(0, 1))
def xent_and_grads(impl, spec, hidden_MBTD, table_VD, targets_MBT, weights_MBT, cotangent=1.0, wanted_MBT=None):
    """(Xent without gradients, Xent of the differentiated call, cotangent * gradients of hidden, table, weights)."""
    wanted = {"wanted_MBT": wanted_MBT}

    def loss(hidden_MBTD, table_VD, weights_MBT):
        xent = XENT[impl](hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec, **wanted)
        return xent.loss, xent

    plain = XENT[impl](hidden_MBTD, table_VD, targets_MBT, weights_MBT, spec, **wanted)
    _, pull, xent = jax.vjp(loss, hidden_MBTD, table_VD, weights_MBT, has_aux=True)
    return plain, xent, pull(cotangent)
