"""Multi-token heads by their published formulas, in NumPy at float64, on tensors under their published names.

Nothing here comes from the package: x_BTD are states, `tensors` a dictionary of arrays in torch's layout [out, in], and
a head's logits are those at the positions whose tokens it needs are there.
"""

import numpy as np

HEADS, KV_HEADS, HEAD_DIM, EPS, THETA = 4, 2, 8, 1e-6, 10_000.0


def rms_norm(x_BTD, weight_D, plus=0.0):
    """x / rms(x) (w + plus)."""
    return x_BTD / np.sqrt(np.mean(x_BTD**2, axis=-1, keepdims=True) + EPS) * (weight_D + plus)


def silu(x):
    return x / (1 + np.exp(-x))


def turned(x_BTNH, pairs):
    """Rotary embedding: of dimensions i and i + H/2 as Hugging Face has it, or of 2i and 2i + 1 as a complex number."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    frequencies_h = THETA ** -(np.arange(0, H, 2) / H)
    turn_Th = np.exp(1j * np.arange(T)[:, None] * frequencies_h[None, :])[:, None, :]
    if pairs:
        both = (x_BTNH[..., 0::2] + 1j * x_BTNH[..., 1::2]) * turn_Th
        return np.stack([both.real, both.imag], axis=-1).reshape(x_BTNH.shape)
    both = (x_BTNH[..., : H // 2] + 1j * x_BTNH[..., H // 2 :]) * turn_Th
    return np.concatenate([both.real, both.imag], axis=-1)


HUGGING_FACE = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
META = {
    "attn_norm": "attention_norm",
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}


def decoder_layer(x_BTD, tensors, prefix, names=HUGGING_FACE, plus=0.0):
    """Llama's: attention and a gated layer behind a norm each; without a norm before attention if there is none."""
    w = {ours: tensors.get(f"{prefix}{theirs}.weight") for ours, theirs in names.items()}
    B, T, _ = x_BTD.shape
    normed_BTD = x_BTD if w["attn_norm"] is None else rms_norm(x_BTD, w["attn_norm"], plus)
    q_BTNH = turned((normed_BTD @ w["q"].T).reshape(B, T, HEADS, HEAD_DIM), names is META)
    k_BTKH = turned((normed_BTD @ w["k"].T).reshape(B, T, KV_HEADS, HEAD_DIM), names is META)
    v_BTKH = (normed_BTD @ w["v"].T).reshape(B, T, KV_HEADS, HEAD_DIM)
    k_BTNH, v_BTNH = (x.repeat(HEADS // KV_HEADS, axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) * HEAD_DIM**-0.5
    scores_BNTS = np.where(np.tri(T, dtype=bool), scores_BNTS, -np.inf)
    probs_BNTS = np.exp(scores_BNTS - scores_BNTS.max(axis=-1, keepdims=True))
    probs_BNTS /= probs_BNTS.sum(axis=-1, keepdims=True)
    x_BTD = x_BTD + np.einsum("BNTS,BSNH->BTNH", probs_BNTS, v_BTNH).reshape(B, T, -1) @ w["o"].T
    normed_BTD = rms_norm(x_BTD, w["mlp_norm"], plus)
    return x_BTD + (silu(normed_BTD @ w["gate"].T) * (normed_BTD @ w["up"].T)) @ w["down"].T


def depth(hidden_BTD, ahead_BTD, tensors, names, *, hidden_first=False, plus=0.0):
    """One depth of sequential heads: its state before any final norm.

    Args:
      hidden_BTD: the states of the depth before it.
      ahead_BTD: embeddings of the next token that it reads, one per state.
      tensors: of the checkpoint.
      names: (norm of the embedding, norm of the hidden state, projection, prefix of its decoder layer).
      hidden_first: the order of the two in the projection's input.
      plus: 1 where norms scale by 1 + w.
    """
    embed_norm, hidden_norm, proj, block = names
    both = [
        rms_norm(ahead_BTD, tensors[f"{embed_norm}.weight"], plus),
        rms_norm(hidden_BTD, tensors[f"{hidden_norm}.weight"], plus),
    ]
    joined_BTE = np.concatenate(both[::-1] if hidden_first else both, axis=-1)
    return decoder_layer(joined_BTE @ tensors[f"{proj}.weight"].T, tensors, block, plus=plus)


def residual(x_BTD, tensors, name):
    """Medusa's layer: x + SiLU(W x + b)."""
    return x_BTD + silu(x_BTD @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"])
