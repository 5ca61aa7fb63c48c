"""Tiny random models of transformers with awkward settings, saved as Hugging Face directories."""

import pathlib
import random

import numpy as np
import torch
import transformers
from transformers.utils import logging

logging.disable_progress_bar()
LAYERS = ("sliding_attention", "full_attention")


def awkward(model_type, seed):
    """A config of an architecture: head_dim beside D/N, grouped keys, odd vocabulary, stretched positions, biases."""
    rng = random.Random(f"{model_type} {seed}")
    heads, kv_heads = rng.choice([(4, 2), (6, 2), (3, 1), (4, 4)])
    head_dim, layers = rng.choice([6, 10, 12]), rng.choice([2, 3])
    fields = {
        "vocab_size": rng.choice([61, 83, 131]),
        "hidden_size": rng.choice([24, 36]),
        "intermediate_size": rng.choice([20, 44]),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": _rope(rng),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
    }
    maybe = lambda: rng.random() < 0.5  # noqa: E731
    window = rng.choice([3, 9, 300])
    kinds = [rng.choice(LAYERS) for _ in range(layers)]
    if model_type in ("llama", "smollm3", "granite"):
        fields |= {"attention_bias": maybe(), "mlp_bias": maybe()}
    if model_type in ("qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "qwen3_moe"):
        fields |= {"attention_bias": maybe()}
    if model_type in ("mistral", "starcoder2", "phi3", "mixtral"):
        fields |= {"sliding_window": rng.choice([None, window])}
    if model_type in ("qwen2", "qwen3"):
        fields |= {"use_sliding_window": maybe(), "sliding_window": window, "max_window_layers": 1}
    if model_type in ("gemma2", "gemma3_text"):
        fields |= {
            "sliding_window": window,
            "layer_types": kinds,
            "query_pre_attn_scalar": rng.choice([7, 20]),
            "attn_logit_softcapping": rng.choice([None, 5.0]) if model_type == "gemma2" else None,
            "final_logit_softcapping": rng.choice([None, 3.0]),
        }
    if model_type == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": rng.choice([100.0, 10_000.0])}
        fields["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": local}
    if model_type == "smollm3":
        fields |= {"no_rope_layers": [rng.choice([0, 1]) for _ in range(layers)]}
    if model_type == "granite":
        fields |= {
            "embedding_multiplier": 6.0,
            "logits_scaling": rng.choice([1.0, 3.0]),
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.1,
        }
    if model_type == "starcoder2":
        fields |= {"use_bias": maybe(), "norm_epsilon": fields.pop("rms_norm_eps")}
    if model_type == "phi3":  # transformers takes no other stretching than longrope here
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    if model_type in ("gpt_neox", "phi3"):
        fields["rope_parameters"] |= {"partial_rotary_factor": rng.choice([0.5, 1.0])}
        fields["head_dim"] = head_dim = 12
    if model_type == "gpt_neox":
        for name in ("num_key_value_heads", "head_dim"):
            del fields[name]
        fields |= {"layer_norm_eps": fields.pop("rms_norm_eps"), "hidden_size": heads * head_dim}
        fields |= {"use_parallel_residual": maybe(), "attention_bias": maybe()}
    if model_type in ("mixtral", "qwen3_moe"):
        fields |= {"num_experts_per_tok": rng.choice([1, 2]), "num_local_experts": 4}
    if model_type == "qwen3_moe":
        fields |= {"moe_intermediate_size": 12, "norm_topk_prob": maybe(), "use_sliding_window": maybe()}
        fields |= {"sliding_window": window}
    return transformers.CONFIG_MAPPING[model_type](**fields)


def _rope(rng):
    theta = rng.choice([500.0, 10_000.0, 1e6])
    factor = rng.choice([2.0, 8.0])
    return rng.choice(
        [
            {"rope_type": "default", "rope_theta": theta},
            {"rope_type": "linear", "rope_theta": theta, "factor": factor},
            {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": 32},
            {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ]
    )


def random_model(config, seed=0):
    """A float32 model of unit-gain matrices, and norms and biases away from where they start."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            shift = float("norm" in name and name.endswith("weight") and "gemma" not in config.model_type)
            parameter.copy_(scale * torch.randn_like(parameter) + shift)
    return model


def save(model, directory):
    """Writes a model as transformers does."""
    model.save_pretrained(directory)
    return pathlib.Path(directory)


def ragged(vocab, lengths=(200, 131, 7), seed=0):
    """Rows of different lengths, padded behind with zeros: tokens and mask, [B, T] each."""
    tokens = np.random.default_rng(seed).integers(3, vocab, (len(lengths), max(lengths)))
    mask = np.arange(max(lengths))[None, :] < np.array(lengths)[:, None]
    return np.where(mask, tokens, 0), mask


def logits_of(model, tokens, mask):
    """Logits of transformers, [B, T, V]."""
    with torch.no_grad():
        given = {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask.astype(np.int64))}
        return model(**given).logits.numpy()
