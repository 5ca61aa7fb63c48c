"""Config files as they lie on the hub, in the spelling of their day, to the model that they mean.

Nothing is read but the config: the fields are those of the published checkpoints."""

import pytest

from mtp_jax.config import ModelConfig
from mtp_jax.convert import layouts
from mtp_jax.convert.architectures import architecture
from mtp_jax.errors import UserError
from mtp_jax.model.rope import attention_factor

COMMON = {"use_cache": True, "transformers_version": "4.42.0", "torch_dtype": "bfloat16", "initializer_range": 0.02}
LLAMA_3_1 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
PHI_3 = {
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "vocab_size": 32064,
}
PUBLISHED = {
    "Llama 2 7B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None}
        | {"vocab_size": 32000, "hidden_act": "silu", "max_position_embeddings": 4096, "tie_word_embeddings": False},
        {"d_ff": 11008, "head_dim": 128, "rope_scaling": "none", "max_seq_len": 4096, "tie_embeddings": False},
    ),
    "Llama 3.1 8B": (
        LLAMA_3_1,
        {"num_kv_heads": 8, "rope_theta": 500_000.0, "rope_scaling": "llama3", "rope_factor": 8.0, "rope_low": 1.0}
        | {"rope_original_len": 8192, "max_seq_len": 131072, "qkv_bias": False},
    ),
    "Llama 3.2 1B": (
        LLAMA_3_1 | {"hidden_size": 2048, "head_dim": 64, "tie_word_embeddings": True, "num_hidden_layers": 16},
        {"head_dim": 64, "tie_embeddings": True, "num_layers": 16},
    ),
    "a Llama stretched twofold, spelled as in 2023": (
        LLAMA_3_1 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": "linear", "rope_factor": 2.0},
    ),
    "Mistral 7B v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 10000.0}
        | {"vocab_size": 32000, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05},
        {"layer_pattern": ("window",), "window": 4096, "num_kv_heads": 8},
    ),
    "Mistral 7B v0.3": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "sliding_window": None, "rope_theta": 1e6}
        | {"vocab_size": 32768, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05},
        {"layer_pattern": ("full",), "window": 0, "rope_theta": 1e6},
    ),
    "Qwen2.5 0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
        | {"num_hidden_layers": 24, "num_key_value_heads": 2, "max_window_layers": 24, "sliding_window": 32768}
        | {"use_mrope": False, "use_sliding_window": False, "tie_word_embeddings": True, "rope_theta": 1e6}
        | {"vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-06},
        {"qkv_bias": True, "out_bias": False, "layer_pattern": ("full",), "head_dim": 64, "tie_embeddings": True},
    ),
    "Qwen3 0.6B": (
        {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
        | {"num_hidden_layers": 28, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": False}
        | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_scaling": None}
        | {"vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-06}
        | {"tie_word_embeddings": True, "rope_theta": 1000000},
        {"qk_norm": True, "head_dim": 128, "rope_theta": 1e6, "qkv_bias": False},
    ),
    "Qwen3 30B A3B": (
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32}
        | {"num_hidden_layers": 48, "num_key_value_heads": 4, "head_dim": 128, "decoder_sparse_step": 1}
        | {"mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128}
        | {"num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001}
        | {"vocab_size": 151936, "hidden_act": "silu", "max_position_embeddings": 40960, "rms_norm_eps": 1e-06}
        | {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 48},
        {"num_experts": 128, "experts_per_token": 8, "d_ff": 768, "renormalise_experts": True},
    ),
    "Mixtral 8x7B": (
        {"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8}
        | {"vocab_size": 32000, "hidden_act": "silu", "max_position_embeddings": 32768, "rms_norm_eps": 1e-05}
        | {"rope_theta": 1e6, "sliding_window": None, "router_aux_loss_coef": 0.02, "output_router_logits": False},
        {"num_experts": 8, "experts_per_token": 2, "d_ff": 14336},
    ),
    "Gemma 2B, whose gelu is the tanh form": (
        {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8}
        | {"num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256, "hidden_act": "gelu"}
        | {"hidden_activation": "gelu_pytorch_tanh", "vocab_size": 256000, "max_position_embeddings": 8192}
        | {"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "attention_bias": False},
        {"activation": "gelu_tanh", "norm_plus_one": True, "embed_scale": 2048**0.5, "tie_embeddings": True},
    ),
    "Gemma 2 2B": (
        {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_attention_heads": 8}
        | {"num_hidden_layers": 26, "num_key_value_heads": 4, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh"}
        | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"}
        | {"vocab_size": 256000, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0},
        {"layer_pattern": ("window", "full"), "window": 4096, "attn_softcap": 50.0, "logit_softcap": 30.0}
        | {"attn_scale": 1 / 16, "norm_position": "sandwich"},
    ),
    "Gemma 3 1B": (
        {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_attention_heads": 4}
        | {"num_hidden_layers": 26, "num_key_value_heads": 1, "head_dim": 256, "attn_logit_softcapping": None}
        | {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 512}
        | {"sliding_window_pattern": 6, "rope_local_base_freq": 10000, "rope_theta": 1000000, "rope_scaling": None}
        | {"vocab_size": 262144, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "cache_implementation": "x"},
        {"layer_pattern": ("window",) * 5 + ("full",), "window": 512, "rope_theta": 1e6, "rope_theta_window": 1e4}
        | {"qk_norm": True},
    ),
    "Phi-3 mini 4k": (PHI_3, {"window": 2047, "layer_pattern": ("window",), "head_dim": 96}),
    "OLMo 2 7B": (
        {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_theta": 500000}
        | {"vocab_size": 100352, "hidden_act": "silu", "max_position_embeddings": 4096, "attention_bias": False},
        {"norm_position": "post", "qk_norm_joint": True, "rope_theta": 500_000.0},
    ),
    "SmolLM 3 3B": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16}
        | {"num_hidden_layers": 36, "num_key_value_heads": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "mlp_bias": False}
        | {"no_rope_layer_interval": 4, "layer_types": ["full_attention"] * 36, "rope_theta": 5000000.0}
        | {"max_window_layers": 28, "pretraining_tp": 2, "sliding_window": None, "use_sliding_window": False}
        | {"vocab_size": 128256, "hidden_act": "silu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-06},
        {"layer_pattern": ("full", "full", "full", "nope"), "tie_embeddings": True},
    ),
    "Granite 3 2B": (
        {"model_type": "granite", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
        | {"num_hidden_layers": 40, "num_key_value_heads": 8, "attention_multiplier": 0.015625, "logits_scaling": 8.0}
        | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "tie_word_embeddings": True, "mlp_bias": False}
        | {"vocab_size": 49155, "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
        {"attn_scale": 0.015625, "logit_scale": 0.125, "embed_scale": 12.0, "residual_scale": 0.22},
    ),
    "StarCoder 2 3B": (
        {"model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12288, "num_attention_heads": 24}
        | {"num_hidden_layers": 30, "num_key_value_heads": 2, "norm_epsilon": 1e-05, "norm_type": "layer_norm"}
        | {"mlp_type": "default", "use_bias": True, "activation_function": "gelu", "layer_norm_epsilon": 1e-05}
        | {"attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True}
        | {"sliding_window": 4096, "rope_theta": 999999.4420358813}
        | {"vocab_size": 49152, "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 16384},
        {"norm": "layer", "gated": False, "mlp_bias": True, "out_bias": True, "window": 4096},
    ),
    "Pythia 160M": (
        {"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        | {"num_hidden_layers": 12, "layer_norm_eps": 1e-05, "rotary_emb_base": 10000, "rotary_pct": 0.25}
        | {"use_parallel_residual": True, "hidden_act": "gelu", "max_position_embeddings": 2048}
        | {"vocab_size": 50304, "tie_word_embeddings": False},
        {"norm_position": "parallel", "rope_fraction": 0.25, "rotary_dim": 16, "mlp_bias": True, "qkv_bias": True},
    ),
}


def read(raw):
    entry = architecture(raw, "config.json")
    return entry.read(*layouts.normalised(raw, "config.json"), "config.json")


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    """Every field is read or known to be harmless, and means what the model card says."""
    raw, expected = PUBLISHED[name]
    model = read(COMMON | raw)
    assert {field: getattr(model, field) for field in expected} == expected
    assert (model.d_model, model.num_layers) == (raw["hidden_size"], raw["num_hidden_layers"])


def test_the_128k_phi_is_refused():
    """longrope picks its factors by the length of the text: refused in words, also in its old spelling."""
    for kind in ("longrope", "su"):
        scaling = {"type": kind, "short_factor": [1.0], "long_factor": [2.0]}
        with pytest.raises(UserError, match="longrope"):
            read(COMMON | PHI_3 | {"rope_scaling": scaling})


def test_what_it_all_comes_to():
    """The whole of one model, no field left to its default by accident."""
    assert read(COMMON | PUBLISHED["Qwen2.5 0.5B"][0]) == ModelConfig(
        vocab_size=151936,
        num_layers=24,
        d_model=896,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        d_ff=4864,
        max_seq_len=32768,
        qkv_bias=True,
        rope_theta=1e6,
    )


def test_switches_that_are_off_are_refused():
    """No config names them unless they are off: is_causal=False is another model. Breaks without ON_BY_DEFAULT."""
    with pytest.raises(UserError, match="is_causal=False is not implemented"):
        read(COMMON | LLAMA_3_1 | {"is_causal": False})


@pytest.mark.parametrize("name", ["output_multiplier", "mtp_foo", "sliding_window_pattern"])
def test_harmless_names_are_no_more_than_that(name):
    """A pattern that is too wide would let a field through that changes the model."""
    with pytest.raises(UserError, match=f"{name}=2 is not implemented"):
        read(COMMON | LLAMA_3_1 | {name: 2})


def test_yarn_at_its_edges():
    """Its factor of attention is 1 up to a stretch of 1; what we cannot say is refused."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 32}
    plain = COMMON | LLAMA_3_1 | {"rope_scaling": None}
    half = read(plain | {"rope_parameters": yarn | {"factor": 0.5}})
    assert attention_factor(half, "full") == 1
    for factors in ({"factor": 1.0, "attention_factor": 1.5}, {"factor": 4.0, "attention_factor": 0.0}):
        with pytest.raises(UserError, match="attention_factor="):
            read(plain | {"rope_parameters": yarn | factors})


def test_partial_positions_of_phi():
    """transformers keeps the share beside the rope parameters; both spellings are read."""
    old = COMMON | PHI_3 | {"partial_rotary_factor": 0.5}
    assert read(old).rope_fraction == 0.5
