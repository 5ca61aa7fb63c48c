"""The `model` section: the shape of the decoder.

The defaults give a Llama 2 block. Every other feature of the common decoders is one field, so that their checkpoints
need a config and no code.
"""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require

SCALES = ("embed_scale", "residual_scale", "logit_scale")
Layer = Literal["full", "window", "nope"]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder language model: the trunk, which is complete without extra heads."""

    vocab_size: int = 2048
    """V, number of rows of the embedding and of the unembedding; at least the size of the tokenizer."""
    num_layers: int = 4
    """L, number of blocks of the trunk."""
    d_model: int = 256
    """D, width of the residual stream."""
    num_heads: int = 4
    """N, number of query heads."""
    num_kv_heads: int = 4
    """K, number of key/value heads; num_heads must be a multiple of it."""
    head_dim: int = 64
    """H, width of one attention head; it need not be d_model / num_heads. It must be even, because rotary embedding
    rotates pairs."""
    d_ff: int = 704
    """F, inner width of the feed-forward layer, or of one expert."""
    max_seq_len: int = 2048
    """Largest number of positions of a row; in decoding, of the prompt and the generated tokens together."""

    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with a bias (GPT-NeoX, StarCoder 2)."""
    norm_eps: float = 1e-6
    """Added to the mean square or the variance inside a norm."""
    norm_plus_one: bool = False
    """RMSNorm scales by 1 + w (Gemma, Qwen3-Next); w starts at 0."""
    norm_position: Literal["pre", "post", "sandwich", "parallel", "mlp"] = "pre"
    """Position of the norms in a block. pre: x + f(norm(x)). post: x + norm(f(x)) (OLMo 2). sandwich:
    x + norm(f(norm(x))) (Gemma 2 and 3). parallel: x + attention(norm(x)) + mlp(norm(x)) (GPT-NeoX). mlp: as pre, but
    without the norm before attention (EAGLE's head)."""
    residual_scale: float = 1.0
    """The output of attention and of the feed-forward layer is multiplied by this before it is added to the residual
    stream (Granite)."""

    qk_norm: bool = False
    """RMSNorm on queries and keys before the rotary embedding."""
    qk_norm_joint: bool = False
    """The norm of `qk_norm` is over all heads of a position together (OLMo 2), not over each head (Qwen3, Gemma 3)."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (Qwen2)."""
    out_bias: bool = False
    """A bias in the output projection of attention."""
    attn_scale: float = 0.0
    """Attention scores are multiplied by this; 0 means head_dim^-1/2."""
    attn_softcap: float = 0.0
    """c in `c * tanh(scores / c)` (Gemma 2); 0 switches it off."""

    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Non-linearity of the feed-forward layer; GELU is exact or the tanh approximation."""
    gated: bool = True
    """True: the feed-forward layer is down(act(gate(x)) * up(x)), as in SwiGLU. False: it is down(act(up(x)))
    (GPT-NeoX, StarCoder 2)."""
    mlp_bias: bool = False
    """Biases of the feed-forward layer."""
    num_experts: int = 0
    """E, number of experts in every block. Experts are gated feed-forward layers; each token uses some of them
    (Mixtral, Qwen3-MoE). 0 is one feed-forward layer for all tokens."""
    experts_per_token: int = 0
    """Number of experts that a token uses: those with the highest probabilities (2 in Mixtral, 8 in Qwen3-MoE)."""
    renormalise_experts: bool = True
    """Divide the probabilities of the chosen experts by their sum (Mixtral, and Qwen3-MoE with norm_topk_prob)."""

    layer_pattern: tuple[Layer, ...] = ("full",)
    """The kind of attention of each layer; the pattern repeats up to the last layer. full: over all positions so far.
    window: over the last `window` positions. nope: over all positions so far, without rotary embedding (SmolLM 3).
    Gemma 2 has ("window", "full")."""
    window: int = 0
    """Number of positions that a token in a "window" layer sees, its own position included."""

    rope_theta: float = 10_000.0
    """Base of the rotary position frequencies."""
    rope_theta_window: float = 0.0
    """Base of the frequencies in "window" layers. If it is set, `rope_scaling` does not apply to these layers
    (Gemma 3). 0 uses `rope_theta`."""
    rope_fraction: float = 1.0
    """Share of the dimensions of an attention head that are rotated: the first ones (GPT-NeoX, Phi-4-mini)."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = "none"
    """How rotary frequencies are lowered for contexts that are longer than those of pretraining."""
    rope_factor: float = 1.0
    """`rope_scaling` divides frequencies by this: the new context length divided by that of pretraining."""
    rope_original_len: int = 0
    """llama3, yarn: context length of pretraining, in tokens."""
    rope_low: float = 1.0
    """llama3 (low_freq_factor): a frequency with fewer rotations than this in `rope_original_len` tokens is divided by
    `rope_factor`."""
    rope_high: float = 4.0
    """llama3 (high_freq_factor): a frequency with more rotations than this in `rope_original_len` tokens does not
    change."""
    rope_beta_slow: float = 1.0
    """yarn (beta_slow): as `rope_low`."""
    rope_beta_fast: float = 32.0
    """yarn (beta_fast): as `rope_high`."""
    rope_attention_factor: float = 0.0
    """yarn: rotated queries and keys are multiplied by this. 0 means 0.1 ln(rope_factor) + 1, or 1 if rope_factor is
    below 1."""

    embed_scale: float = 1.0
    """Embeddings are multiplied by this (Gemma: the square root of d_model)."""
    tie_embeddings: bool = True
    """Use the embedding as the unembedding."""
    logit_scale: float = 1.0
    """Logits are multiplied by this (Granite: 1 / logits_scaling)."""
    logit_softcap: float = 0.0
    """c in `c * tanh(logits / c)`; 0 switches it off."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of activations and matrix products. Norm statistics, softmax and losses are always float32."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the parameters are stored."""
    remat: Literal["none", "dots", "block", "offload"] = "none"
    """What the backward pass computes again. none: nothing. dots: everything except matrix products. block: whole
    blocks. offload: whole blocks, with their inputs kept in the memory of the host."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """Kernel for attention over whole rows: cuDNN on a GPU, splash on a TPU, or XLA. auto uses the first that is
    available."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        positive(
            "model",
            self,
            *("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff", "max_seq_len"),
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
            "every key/value head serves the same number of query heads",
        )
        require(
            0 < self.rope_fraction <= 1,
            f"model.rope_fraction={self.rope_fraction}; it must be above 0 and at most 1",
        )
        require(
            self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
            f"model.head_dim={self.head_dim} with model.rope_fraction={self.rope_fraction} rotates "
            f"{self.rotary_dim} dimensions; rotary embedding rotates pairs, so the number must be even and above 0",
        )
        require(self.vocab_size <= 2**24, f"model.vocab_size={self.vocab_size} is above {2**24}")
        for name in ("rope_theta", "rope_factor", "rope_high", "rope_beta_fast", *SCALES):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)}; it must be above 0")
        for name in ("norm_eps", "attn_scale", "rope_theta_window", "rope_original_len", "rope_attention_factor"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} is negative")
        for name in ("logit_softcap", "attn_softcap"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} is negative; 0 switches it off")
        self._check_layers()
        self._check_experts()
        self._check_rope()

    def _check_layers(self) -> None:
        require(bool(self.layer_pattern), "model.layer_pattern is empty; use ('full',) for plain attention")
        windowed = "window" in self.layers
        require(
            windowed == (self.window > 0),
            f"model.window={self.window} with model.layer_pattern={self.layer_pattern}: 'window' layers need a window "
            "above 0, and it has no effect without such layers",
        )
        require(
            self.norm == "rms" or not self.norm_plus_one,
            "model.norm_plus_one=True is for RMSNorm, but model.norm='layer'; use norm_plus_one=False",
        )
        require(
            self.qk_norm or not self.qk_norm_joint,
            "model.qk_norm_joint=True has no effect without model.qk_norm; set model.qk_norm=True too",
        )

    def _check_experts(self) -> None:
        E = self.num_experts
        require(E >= 0, f"model.num_experts={E} is negative; 0 is one feed-forward layer")
        only_with("model", self, "experts_per_token renormalise_experts", E > 0, "model.num_experts")
        require(
            E == 0 or 1 <= self.experts_per_token <= E,
            f"model.experts_per_token={self.experts_per_token} with model.num_experts={E}; use 1..{E}",
        )
        require(
            E == 0 or not self.mlp_bias,
            f"model.mlp_bias=True with model.num_experts={E}: experts have no biases; use mlp_bias=False",
        )
        require(
            E == 0 or self.gated,
            f"model.gated=False with model.num_experts={E}: every expert is gated; use gated=True",
        )

    def _check_rope(self) -> None:
        require(
            self.rope_scaling == "none" or self.rope_factor != 1.0,
            f"model.rope_scaling={self.rope_scaling!r} needs model.rope_factor",
        )
        require(
            self.rope_scaling not in ("llama3", "yarn") or self.rope_original_len > 0,
            f"model.rope_scaling={self.rope_scaling!r} needs model.rope_original_len",
        )
        for low, high in (("rope_low", "rope_high"), ("rope_beta_slow", "rope_beta_fast")):
            lesser = getattr(self, low)
            greater = getattr(self, high)
            require(0 < lesser < greater, f"model.{low}={lesser} must be above 0 and below model.{high}={greater}")

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of attention of every layer."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_layers))

    @property
    def block(self) -> "ModelConfig":
        """The shape of a block: the section's own."""
        return self

    @property
    def is_stack(self) -> bool:
        """The trunk is a stack of such blocks."""
        return True

    @property
    def stacks(self) -> "dict[str, ModelConfig]":
        """The one stack of blocks."""
        return {"blocks": self}

    @property
    def unembedding_path(self) -> str:
        """Path of the parameter that the unembedding is made of."""
        return "embed/table" if self.tie_embeddings else "unembed/table"

    @property
    def frozen_models(self) -> "dict[str, ModelConfig]":
        """There are none: every parameter can be trained."""
        return {}

    @property
    def split_fields(self) -> tuple[str, ...]:
        """Fields that divide over `mesh.tensor` devices."""
        return ("vocab_size", "num_heads", "num_kv_heads", "d_ff")

    @property
    def rotary_dim(self) -> int:
        """Number of dimensions of an attention head that are rotated."""
        return int(self.head_dim * self.rope_fraction)
