"""The Hugging Face decoders that we read and write. Each has one entry, which serves both directions.

An entry says what the fields of the config mean and which tensor holds each parameter. `{i}` is the layer, `{e}` the
expert. If a tensor holds several parameters, like a fused query-key-value matrix, the entry has the rows of each.
"""

from typing import Any

from mtp_jax.convert.blt import BLT
from mtp_jax.convert.layout import (
    BUFFERS,
    STACKED_GATE,
    STACKED_K,
    STACKED_Q,
    STACKED_UP,
    STACKED_V,
    Architecture,
    Slot,
    both,
    interleaved,
    matrix,
)
from mtp_jax.convert.settings import (
    ATTENTION_SCALE,
    EVEN_HEAD_DIM,
    EVERY_LAYER_WINDOWED,
    KV_HEADS,
    LAYER_TYPES,
    NO_ROPE_LAYERS,
    OWN_HEAD_DIM,
    PARTIAL_ROPE,
    ROOT_EMBED_SCALE,
    ROPE,
    SHAPE,
    SWITCHED_LAYER_TYPES,
    SWITCHED_WINDOW,
    TWO_ROPES,
    Setting,
    activation,
    biases,
    converted,
    fixed,
    off_is_none,
    only,
    same,
)
from mtp_jax.errors import UserError

# Tensors of a block.

SEPARATE_ATTENTION = (
    *matrix("attn/q", "self_attn.q_proj"),
    *matrix("attn/k", "self_attn.k_proj"),
    *matrix("attn/v", "self_attn.v_proj"),
    *matrix("attn/o", "self_attn.o_proj"),
    *both("attn/q_norm", "self_attn.q_norm"),
    *both("attn/k_norm", "self_attn.k_norm"),
)
GATED = (
    *matrix("mlp/gate", "mlp.gate_proj"),
    *matrix("mlp/up", "mlp.up_proj"),
    *matrix("mlp/down", "mlp.down_proj"),
)
PRE_NORMS = (*both("attn_norm", "input_layernorm"), *both("mlp_norm", "post_attention_layernorm"))
POST_NORMS = (
    *both("attn_post_norm", "post_attention_layernorm"),
    *both("mlp_post_norm", "post_feedforward_layernorm"),
)
SANDWICH_NORMS = (
    *both("attn_norm", "input_layernorm"),
    *both("mlp_norm", "pre_feedforward_layernorm"),
    *POST_NORMS,
)
LLAMA_BLOCK = (*SEPARATE_ATTENTION, *GATED, *PRE_NORMS)

RMS = same("norm_eps", "rms_norm_eps")
D_FF = same("d_ff", "intermediate_size")
COMMON = (*SHAPE, D_FF, KV_HEADS, OWN_HEAD_DIM)
GEMMA = fixed(norm_plus_one=True)
TANH_GELU = activation("hidden_activation")


def _longrope(raw: dict[str, Any]) -> str | None:
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters")
    kind = (scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, dict) else None
    return "rope scaling 'longrope', with factors that depend on the length," if kind in ("longrope", "su") else None


ARCHITECTURES = {
    entry.model_type: entry
    for entry in (
        Architecture(
            "llama",
            "LlamaForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act")),
                *(biases("attention_bias", "qkv_bias", "out_bias"), biases("mlp_bias", "mlp_bias")),
            ),
            LLAMA_BLOCK,
        ),
        Architecture(
            "qwen2",
            "Qwen2ForCausalLM",
            (*COMMON, RMS, ROPE, activation("hidden_act"), SWITCHED_LAYER_TYPES, fixed(qkv_bias=True)),
            LLAMA_BLOCK,
        ),
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act"), SWITCHED_LAYER_TYPES, fixed(qk_norm=True)),
                biases("attention_bias", "qkv_bias", "out_bias"),
            ),
            LLAMA_BLOCK,
        ),
        Architecture(
            "mistral",
            "MistralForCausalLM",
            (*COMMON, RMS, ROPE, activation("hidden_act"), EVERY_LAYER_WINDOWED),
            LLAMA_BLOCK,
        ),
        Architecture(
            "mixtral",
            "MixtralForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act"), EVERY_LAYER_WINDOWED, fixed(renormalise_experts=True)),
                *(same("num_experts", "num_local_experts"), same("experts_per_token", "num_experts_per_tok")),
            ),
            (
                *SEPARATE_ATTENTION,
                Slot("mlp/router", "block_sparse_moe.gate.weight"),
                Slot("mlp/gate", "block_sparse_moe.experts.{e}.w1.weight"),
                Slot("mlp/up", "block_sparse_moe.experts.{e}.w3.weight"),
                Slot("mlp/down", "block_sparse_moe.experts.{e}.w2.weight"),
                *PRE_NORMS,
            ),
        ),
        Architecture(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            (
                *(*SHAPE, KV_HEADS, OWN_HEAD_DIM, same("d_ff", "moe_intermediate_size")),
                *(RMS, ROPE, activation("hidden_act"), SWITCHED_WINDOW, fixed(qk_norm=True)),
                biases("attention_bias", "qkv_bias", "out_bias"),
                *(same("num_experts", "num_local_experts"), same("experts_per_token", "num_experts_per_tok")),
                Setting(
                    lambda given: {"renormalise_experts": bool(given("norm_topk_prob"))},
                    lambda model: {"norm_topk_prob": model.renormalise_experts},
                ),
            ),
            (
                *SEPARATE_ATTENTION,
                Slot("mlp/router", "mlp.gate.weight"),
                Slot("mlp/gate", "mlp.experts.{e}.gate_proj.weight"),
                Slot("mlp/up", "mlp.experts.{e}.up_proj.weight"),
                Slot("mlp/down", "mlp.experts.{e}.down_proj.weight"),
                *PRE_NORMS,
            ),
            unused=("intermediate_size",),
            older={"num_local_experts": "num_experts"},
        ),
        Architecture(
            "gemma",
            "GemmaForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act"), ROOT_EMBED_SCALE, GEMMA),
                *(
                    biases("attention_bias", "qkv_bias", "out_bias"),
                    only("hidden_activation", None, "gelu_pytorch_tanh"),
                ),
            ),
            LLAMA_BLOCK,
        ),
        Architecture(
            "gemma2",
            "Gemma2ForCausalLM",
            (
                *(*COMMON, RMS, ROPE, TANH_GELU, ROOT_EMBED_SCALE, GEMMA, fixed(norm_position="sandwich")),
                *(LAYER_TYPES, ATTENTION_SCALE, biases("attention_bias", "qkv_bias", "out_bias")),
                off_is_none("attn_softcap", "attn_logit_softcapping"),
                off_is_none("logit_softcap", "final_logit_softcapping"),
            ),
            (*SEPARATE_ATTENTION, *GATED, *SANDWICH_NORMS),
            unused=("hidden_act",),
        ),
        Architecture(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (
                *(*COMMON, RMS, TWO_ROPES, TANH_GELU, ROOT_EMBED_SCALE, GEMMA),
                fixed(norm_position="sandwich", qk_norm=True),
                *(LAYER_TYPES, ATTENTION_SCALE, biases("attention_bias", "qkv_bias", "out_bias")),
                off_is_none("logit_softcap", "final_logit_softcapping"),
            ),
            (*SEPARATE_ATTENTION, *GATED, *SANDWICH_NORMS),
            unused=("hidden_act", "sliding_window_pattern", "_sliding_window_pattern"),
        ),
        Architecture(
            "phi3",
            "Phi3ForCausalLM",
            (*COMMON, RMS, PARTIAL_ROPE, activation("hidden_act"), EVERY_LAYER_WINDOWED),
            (
                Slot("attn/q", "self_attn.qkv_proj.weight", STACKED_Q),
                Slot("attn/k", "self_attn.qkv_proj.weight", STACKED_K),
                Slot("attn/v", "self_attn.qkv_proj.weight", STACKED_V),
                Slot("attn/o", "self_attn.o_proj.weight"),
                Slot("mlp/gate", "mlp.gate_up_proj.weight", STACKED_GATE),
                Slot("mlp/up", "mlp.gate_up_proj.weight", STACKED_UP),
                Slot("mlp/down", "mlp.down_proj.weight"),
                *PRE_NORMS,
            ),
            unused=("partial_rotary_factor",),  # transformers repeats it in the rope parameters, which are read
            refuse=_longrope,
        ),
        Architecture(
            "olmo2",
            "Olmo2ForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act")),
                fixed(norm_position="post", qk_norm=True, qk_norm_joint=True),
                biases("attention_bias", "qkv_bias", "out_bias"),
            ),
            (*SEPARATE_ATTENTION, *GATED, *POST_NORMS),
            older={"rope_type": "type"},
        ),
        Architecture(
            "smollm3",
            "SmolLM3ForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act"), NO_ROPE_LAYERS),
                *(biases("attention_bias", "qkv_bias", "out_bias"), biases("mlp_bias", "mlp_bias")),
            ),
            LLAMA_BLOCK,
        ),
        Architecture(
            "granite",
            "GraniteForCausalLM",
            (
                *(*COMMON, RMS, ROPE, activation("hidden_act")),
                *(biases("attention_bias", "qkv_bias", "out_bias"), biases("mlp_bias", "mlp_bias")),
                same("embed_scale", "embedding_multiplier"),
                same("residual_scale", "residual_multiplier"),
                same("attn_scale", "attention_multiplier"),
                converted("logit_scale", "logits_scaling", lambda value: 1 / value, lambda value: 1 / value),
            ),
            LLAMA_BLOCK,
        ),
        Architecture(
            "starcoder2",
            "Starcoder2ForCausalLM",
            (
                *(*COMMON, same("norm_eps", "norm_epsilon"), ROPE, activation("hidden_act"), EVERY_LAYER_WINDOWED),
                *(fixed(norm="layer", gated=False), biases("use_bias", "qkv_bias", "out_bias", "mlp_bias")),
                *(only("norm_type", "layer_norm"), only("mlp_type", "default"), only("scale_attn_weights", True)),
            ),
            (
                *SEPARATE_ATTENTION,
                *matrix("mlp/up", "mlp.c_fc"),
                *matrix("mlp/down", "mlp.c_proj"),
                *PRE_NORMS,
            ),
            unused=("activation_function", "layer_norm_epsilon", "*softmax_in_fp32"),
        ),
        Architecture(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            (
                *(*SHAPE, D_FF, EVEN_HEAD_DIM, PARTIAL_ROPE, activation("hidden_act")),
                same("norm_eps", "layer_norm_eps"),
                fixed(norm="layer", gated=False, mlp_bias=True),
                Setting(
                    lambda given: {
                        "num_kv_heads": given("num_attention_heads"),
                        "norm_position": "parallel" if given("use_parallel_residual") else "pre",
                    },
                    lambda model: {"use_parallel_residual": model.norm_position == "parallel"},
                ),
                biases("attention_bias", "qkv_bias", "out_bias"),
            ),
            (
                *matrix("attn/q", "attention.query_key_value", interleaved(0)),
                *matrix("attn/k", "attention.query_key_value", interleaved(1)),
                *matrix("attn/v", "attention.query_key_value", interleaved(2)),
                *matrix("attn/o", "attention.dense"),
                *matrix("mlp/up", "mlp.dense_h_to_4h"),
                *matrix("mlp/down", "mlp.dense_4h_to_h"),
                *PRE_NORMS,
            ),
            layer="gpt_neox.layers.{i}.",
            embed="gpt_neox.embed_in.weight",
            final_norm="gpt_neox.final_layer_norm",
            unembed="embed_out.weight",
            also={"embed_out.weight": "lm_head.weight"},
            buffers=(*BUFFERS, "*.attention.bias", "*.attention.masked_bias"),
            older={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        ),
    )
}


ENTRIES = ARCHITECTURES | {BLT.model_type: BLT}
"""The decoders, and the models that are no decoder LM."""

MOST_LAYERS = 10_000
"""Largest number of layers. A config file with more is damaged, and handling it would take hours."""

REFUSED = {
    "gpt2": "learned position embeddings and transposed matrices; use a model of this size with rotary positions",
    "gemma3": "a vision tower, because it is a model of text and images; extract its text model (gemma3_text)",
    "deepseek_v3": "multi-head latent attention (MLA) and DeepSeek's router, which are not implemented",
    "deepseek_v2": "multi-head latent attention (MLA), which is not implemented",
    "glm4_moe": "shared experts and GLM's router, which are not implemented",
    "qwen3_next": "linear attention (gated delta net), which is not implemented",
    "qwen3_5": "linear attention (gated delta net), which is not implemented",
    "qwen3_5_text": "linear attention (gated delta net), which is not implemented",
}
"""Architectures that are refused, and what they would need."""


def architecture(raw: dict[str, Any], origin: str) -> Architecture:
    """The entry for the architecture of a config file.

    Raises:
      UserError: the architecture, or one of its settings, is not implemented. The error names it.
    """
    name = raw.get("model_type")
    if name not in tuple(ENTRIES):  # a tuple takes any value, also one without a hash
        need = f": it needs {REFUSED[name]}" if name in tuple(REFUSED) else f"; implemented: {', '.join(ENTRIES)}"
        raise UserError(f"{origin}: model_type={name!r} is not implemented{need}")
    if isinstance(layers := raw.get("num_hidden_layers"), int) and layers > MOST_LAYERS:
        raise UserError(f"{origin}: num_hidden_layers={layers} is above {MOST_LAYERS}")
    _refuse_quantised(raw, origin)
    if beyond := ENTRIES[name].refuse(raw):
        raise UserError(f"{origin}: {beyond} is not implemented")
    return ENTRIES[name]


QUANTISED = {"quantization_config": "", "quantization": "mlx", "compression_config": "compressed-tensors"}
"""Fields of quantised checkpoints, and the library that writes the field; "" if several do."""


def _refuse_quantised(raw: dict[str, Any], origin: str) -> None:
    for field, library in QUANTISED.items():
        given = raw.get(field)
        if not given:
            continue
        method = library or (isinstance(given, dict) and given.get("quant_method")) or f"{field}={given!r}"
        if "quantization" in raw and raw["quantization"] == given:
            method = QUANTISED["quantization"]
        raise UserError(
            f"{origin}: the weights are quantised ({method}), which we do not read; use the checkpoint before "
            "quantisation, in float32, bfloat16 or float16"
        )
