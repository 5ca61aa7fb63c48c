"""Slow, obvious versions in float64: all logits at once, loops over positions, rotation by complex numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from reference.quick import quick_jit


def cross_entropy(z_MBTV, targets_MBT):
    """-log softmax(z)[target] of every token."""
    lse_MBT = jax.nn.logsumexp(z_MBTV, axis=-1)
    return lse_MBT - jnp.take_along_axis(z_MBTV, targets_MBT[..., None], axis=-1)[..., 0]


def xent_loss(hidden_MBTD, table_VD, targets_MBT, weights_MBT, softcap=0.0, z_loss=0.0):
    """sum_x weight_x (ce_x + z_loss lse_x^2) from the whole array of logits, in the dtype of the inputs."""
    z_MBTV = jnp.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD)
    if softcap:
        z_MBTV = softcap * jnp.tanh(z_MBTV / softcap)
    ce_MBT = cross_entropy(z_MBTV, targets_MBT)
    loss = jnp.sum(weights_MBT * (ce_MBT + z_loss * jax.nn.logsumexp(z_MBTV, axis=-1) ** 2))
    return loss, ce_MBT


def xent_grads(hidden_MBTD, table_VD, targets_MBT, weights_MBT, softcap=0.0, z_loss=0.0):
    """Float64 (loss, ce, gradients of hidden, table and weights) of `xent_loss`, by autodiff, as numpy arrays."""
    with jax.enable_x64(True):
        inputs = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden_MBTD, table_VD, weights_MBT)]
        (loss, ce_MBT), grads = _value_and_grads(*inputs, jnp.asarray(targets_MBT), softcap, z_loss)
        return tuple(np.asarray(x) for x in (loss, ce_MBT, *grads))


@functools.partial(quick_jit, static_argnums=(4, 5))
def _value_and_grads(hidden_MBTD, table_VD, weights_MBT, targets_MBT, softcap, z_loss):
    def loss(hidden_MBTD, table_VD, weights_MBT):
        return xent_loss(hidden_MBTD, table_VD, targets_MBT, weights_MBT, softcap, z_loss)

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(hidden_MBTD, table_VD, weights_MBT)


def probabilities(z):
    return jnp.exp(z - jax.nn.logsumexp(z, axis=-1, keepdims=True))


def distance(name, z_MBTV, teacher_MBTV):
    """D(p, q) of every token, p and q the softmax of teacher and student, from the definitions."""
    p, q = probabilities(teacher_MBTV), probabilities(z_MBTV)
    accept = jnp.sum(jnp.minimum(p, q), axis=-1)
    kl, tv = jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1), jnp.sum(jnp.abs(p - q), axis=-1) / 2
    share = jax.lax.stop_gradient(jnp.exp(-3 * accept))
    return {"kl": kl, "tv": tv, "lk_alpha": -jnp.log(accept), "lk_lambda": share * kl + (1 - share) * tv}[name]


def objective_grads(hidden_MBTD, table_VD, targets_MBTV, weights_MBT, teacher, spec):
    """Float64 (loss, gradients of hidden and table) of the objective, with targets as dense distributions."""
    with jax.enable_x64(True):
        given = [jnp.asarray(np.asarray(x, np.float64)) for x in (hidden_MBTD, table_VD, targets_MBTV, weights_MBT)]
        taught = [jnp.asarray(np.asarray(x, np.float64)) for x in teacher]
        loss, grads = _objective(*given, *taught, spec)
        return float(loss), [np.asarray(x) for x in grads]


@functools.partial(quick_jit, static_argnums=6)
def _objective(hidden_MBTD, table_VD, targets_MBTV, weights_MBT, teacher_MBTD, teacher_table_VD, spec):
    cap = lambda z: spec.softcap * jnp.tanh(z / spec.softcap) if spec.softcap else z  # noqa: E731

    def loss(hidden_MBTD, table_VD):
        z_MBTV = cap(jnp.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD))
        teacher_MBTV = cap(jnp.einsum("MBTD,VD->MBTV", teacher_MBTD, teacher_table_VD))
        log_q = jnp.log(probabilities(z_MBTV))
        smooth = (1 - spec.smoothing) * targets_MBTV + spec.smoothing / z_MBTV.shape[-1]
        hard = -jnp.sum(smooth * log_q, axis=-1)
        soft = distance(spec.distance, z_MBTV, teacher_MBTV)
        z_term = spec.z_loss * jax.nn.logsumexp(z_MBTV, axis=-1) ** 2
        return jnp.sum(weights_MBT * ((1 - spec.mix) * hard + spec.mix * soft + z_term))

    return jax.value_and_grad(loss, argnums=(0, 1))(hidden_MBTD, table_VD)


def rank(z_MBTV, targets_MBT):
    """1 + entries above the target + other entries equal to it, by looping over tokens."""
    rank_MBT = np.zeros(targets_MBT.shape, np.int32)
    for x in np.ndindex(targets_MBT.shape):
        others = np.delete(z_MBTV[x], targets_MBT[x])
        rank_MBT[x] = 1 + sum(value >= z_MBTV[x][targets_MBT[x]] for value in others)
    return rank_MBT


def attention(
    q_BTNH, k_BSKH, v_BSKH, query_slots_BT, segment_ids_BS=None, *, scale=None, softcap=0.0, window=float("inf")
):
    """Softmax attention one query and one head at a time, over the list of keys that the query may see."""
    q_BTNH, k_BSKH, v_BSKH = (np.asarray(x, np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    query_slots_BT = np.asarray(query_slots_BT)  # an element of a JAX array costs a program's call
    segment_ids_BS = segment_ids_BS if segment_ids_BS is None else np.asarray(segment_ids_BS)
    B, T, N, H = q_BTNH.shape
    group = N // k_BSKH.shape[2]
    out_BTNH = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(k_BSKH.shape[1]) if query_slots_BT[b][t] - window < s <= query_slots_BT[b][t]]
        if segment_ids_BS is not None:
            seen = [s for s in seen if segment_ids_BS[b][s] == segment_ids_BS[b][t]]
        scores = np.array([q_BTNH[b, t, n] @ k_BSKH[b, s, n // group] * (scale or H**-0.5) for s in seen])
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        out_BTNH[b, t, n] = sum(p * v_BSKH[b, s, n // group] for p, s in zip(probs, seen, strict=True))
    return out_BTNH


def experts(x_BTD, params, count, *, renormalise):
    """Sum over the `count` most probable experts of p down(silu(gate x) * up x), one token and one expert at a time."""
    x_BTD, params = np.asarray(x_BTD, np.float64), {name: np.asarray(w, np.float64) for name, w in params.items()}
    out_BTD = np.zeros_like(x_BTD)
    for b, t in np.ndindex(x_BTD.shape[:2]):
        x_D = x_BTD[b, t]
        score_E = x_D @ params["router"]
        prob_E = np.exp(score_E) / np.sum(np.exp(score_E))
        chosen = sorted(range(len(prob_E)), key=lambda e: -prob_E[e])[:count]
        total = sum(prob_E[e] for e in chosen) if renormalise else 1.0
        for e in chosen:
            gate_F, up_F = x_D @ params["gate"][e], x_D @ params["up"][e]
            out_BTD[b, t] += prob_E[e] / total * ((gate_F / (1 + np.exp(-gate_F)) * up_F) @ params["down"][e])
    return out_BTD


def rotary(x_BTNH, positions_BT, theta):
    """(x_i + i x_{i+H/2}) exp(i position theta^(-2i/H)), as complex numbers."""
    x_BTNH = np.asarray(x_BTNH, np.float64)
    half = x_BTNH.shape[-1] // 2
    turned_BTNH = np.zeros_like(x_BTNH)
    for b, t in np.ndindex(x_BTNH.shape[:2]):
        for i in range(half):
            turn = np.exp(1j * int(positions_BT[b][t]) * theta ** (-2 * i / (2 * half)))
            pair_N = (x_BTNH[b, t, :, i] + 1j * x_BTNH[b, t, :, i + half]) * turn
            turned_BTNH[b, t, :, i], turned_BTNH[b, t, :, i + half] = pair_N.real, pair_N.imag
    return turned_BTNH
