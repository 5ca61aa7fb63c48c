"""Converts the metadata of a GGUF file to the fields of a Hugging Face config.

Some numbers of an architecture are in the code of llama.cpp and not in the file: the pattern of Gemma's windows, and
the scale of its attention, which is different in the largest model of each generation. `KNOWN` and `_gemma` have them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.convert.gguf.header import Header
from mtp_jax.convert.gguf.tensors import ROPE_FACTORS, Packed, names
from mtp_jax.convert.settings import Given
from mtp_jax.errors import UserError


class Entry(NamedTuple):
    """An architecture of llama.cpp that we read."""

    model_type: str
    """Its name at Hugging Face."""
    turned: bool = False
    """Whether the rows of queries and keys are in llama.cpp's order."""
    sandwich: bool = False
    """Whether there are also norms after attention and MLP."""
    pattern: int = 0
    """Every pattern-th layer has full attention, and the others have windows. 0 is no windows."""
    largest: int = 0
    """Number of layers of the largest model. Its attention scale is that of width / heads, not of head_dim."""


KNOWN = {
    "llama": Entry("llama", turned=True),
    "qwen2": Entry("qwen2"),
    "qwen3": Entry("qwen3"),
    "gemma2": Entry("gemma2", sandwich=True, pattern=2, largest=46),
    "gemma3": Entry("gemma3_text", sandwich=True, pattern=6, largest=62),
}
"""The architectures, by their name in `general.architecture`."""
SILENT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
"""Fields of the architecture that change nothing, or that follow from the tensors."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3_LENGTH = 8192
"""The numbers of Llama 3's rope scaling. llama.cpp's converter writes only the factors that they give."""
YARN = {
    "rope.scaling.yarn_beta_fast": ("beta_fast", 32.0),
    "rope.scaling.yarn_beta_slow": ("beta_slow", 1.0),
}


def known(header: Header) -> Entry:
    """The architecture of a file.

    Raises:
      UserError: the file names no architecture, or one that we do not read.
    """
    path = header.path
    name = header.fields.get("general.architecture")
    if name is None:
        raise UserError(f"{path} has no general.architecture, which says what model it is; fetch it again")
    if (kind := header.fields.get("general.type", "model")) != "model":
        raise UserError(f"{path} does not hold a model (general.type={kind!r}); give the file of the model")
    if name not in tuple(KNOWN):
        raise UserError(
            f"{path}: general.architecture={name!r} is not implemented for GGUF files; implemented: "
            f"{', '.join(KNOWN)}. Use the model's Hugging Face directory, if that architecture is implemented"
        )
    return KNOWN[name]


def names_of(entry: Entry) -> dict[str, str]:
    """The Hugging Face names of the parts of a block, by their names in the file."""
    return names(entry.sandwich)


def config_fields(header: Header, ignore: Sequence[str] = ()) -> dict[str, Any]:
    """The fields that config.json of the same model has.

    Args:
      header: header of the file.
      ignore: patterns of metadata fields to ignore.

    Raises:
      UserError: metadata is missing or not implemented. The error names the field.
    """
    entry = known(header)
    name = header.fields["general.architecture"]
    prefix = f"{name}."
    given = Given(
        {key: _exact(value) for key, value in header.fields.items() if key.startswith(prefix)}, str(header.path)
    )
    width = _count(given, f"{prefix}embedding_length")
    heads = _count(given, f"{prefix}attention.head_count")
    turned = given(f"{prefix}rope.dimension_count", None)
    head_dim = _count(given, f"{prefix}attention.key_length", (turned if entry.turned else None) or width // heads)
    for other, value in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if (said := given(prefix + other, value)) != value:
            raise UserError(f"{header.path}: {prefix}{other}={said} with heads of {head_dim} is not implemented")
    fields = {
        "architectures": [ARCHITECTURES[entry.model_type].class_name],
        "model_type": entry.model_type,
        "vocab_size": _vocabulary(header),
        "hidden_size": width,
        "intermediate_size": _count(given, f"{prefix}feed_forward_length"),
        "num_hidden_layers": _count(given, f"{prefix}block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(given, f"{prefix}attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": _count(given, f"{prefix}context_length"),
        "rms_norm_eps": given(f"{prefix}attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "hidden_act": "silu",
    }
    rope = _rope(given, prefix, header, fields)
    if entry.pattern:
        fields |= _gemma(given, prefix, entry, fields, rope)
    else:
        fields |= {"rope_parameters": rope}
    if entry.model_type == "qwen2":  # it always has biases, and no such field
        del fields["attention_bias"]
    given.check_all_read({}, (*(prefix + silent for silent in SILENT), *ignore))
    return fields | token_fields(header)


TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
"""Names of special tokens in a config, and in the metadata of the tokenizer."""


def token_fields(header: Header) -> dict[str, Any]:
    """The ids of the special tokens; None for tokens that do not exist."""
    return {ours: header.fields.get(f"tokenizer.ggml.{theirs}") for ours, theirs in TOKENS.items()}


def _exact(value: Any) -> Any:
    """A float32 number as it was written in the original config: the file has 9.999999747e-06 for 1e-05."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _count(given: Given, name: str, *default: Any) -> int:
    value = given(name, *default)
    if type(value) is not int or value < 1:
        raise UserError(
            f"{given.origin}: {name}={value!r} is not implemented; it must be one whole number for all layers"
        )
    return value


def _vocabulary(header: Header) -> int:
    """Number of rows of the embedding. The tokenizer may have fewer tokens."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise UserError(f"{header.path} lacks token_embd.weight, the embedding; fetch it again")
    return embedding.shape[0]


# Rotary positions.


def _rope(given: Given, prefix: str, header: Header, fields: dict[str, Any]) -> dict[str, Any]:
    theta = given(f"{prefix}rope.freq_base", 1e6 if prefix == "gemma3." else 1e4)
    kind = given.one_of(f"{prefix}rope.scaling.type", ("none", "linear", "yarn"), "none")
    if ROPE_FACTORS in header.tensors:
        if kind != "none":
            raise UserError(f"{header.path}: {ROPE_FACTORS} with {prefix}rope.scaling.type={kind!r} is not implemented")
        return _llama3(header, theta, fields["head_dim"])
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope = {"rope_type": kind, "rope_theta": theta, "factor": given(f"{prefix}rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = _count(given, f"{prefix}rope.scaling.original_context_length")
        rope |= {theirs: given(prefix + name, default) for name, (theirs, default) in YARN.items()}
    else:
        given(f"{prefix}rope.scaling.original_context_length", None)  # linear scaling does not depend on it
    return rope


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """The numbers of Llama 3's rope scaling that give the factors in the file."""
    place = header.tensors[ROPE_FACTORS]
    factors = Packed(place, header.path, header.mapped).array
    if factors.shape == (head_dim // 2,):
        for factor in (*LLAMA3_FACTORS, float(factors.max())):
            rope = LLAMA3 | {"factor": factor, "original_max_position_embeddings": LLAMA3_LENGTH}
            if np.allclose(_llama3_factors(rope, theta, head_dim), factors, rtol=1e-4):
                return {"rope_type": "llama3", "rope_theta": theta} | rope
    raise UserError(
        f"{header.path}: {ROPE_FACTORS} scales frequencies in another way than Llama 3, which is not implemented"
    )


def _llama3_factors(rope: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """The divisor of each frequency: 1 for fast ones, `factor` for slow ones, a value between for the others."""
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low = rope["low_freq_factor"]
    high = rope["high_freq_factor"]
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - share) / rope["factor"] + share)


# Gemma.


def _gemma(given: Given, prefix: str, entry: Entry, fields: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Windows, soft caps and attention scale. The window layers of Gemma 3 have another rotary base."""
    layers = fields["num_hidden_layers"]
    head_dim = fields["head_dim"]
    largest = layers == entry.largest
    more = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": fields["hidden_size"] // fields["num_attention_heads"] if largest else head_dim,
        "sliding_window": _count(given, f"{prefix}attention.sliding_window"),
        "layer_types": _kinds(given(f"{prefix}attention.sliding_window_pattern", entry.pattern), layers, given.origin),
    }
    if entry.model_type == "gemma2":
        caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
        return (
            more | {"rope_parameters": rope} | {name: given(prefix + name, default) for name, default in caps.items()}
        )
    local = {"rope_type": "default", "rope_theta": given(f"{prefix}rope.freq_base_swa", 1e4)}
    more["final_logit_softcapping"] = given(f"{prefix}final_logit_softcapping", None) or None
    return more | {"rope_parameters": {"full_attention": rope, "sliding_attention": local}}


def _kinds(pattern: Any, layers: int, origin: str) -> list[str]:
    """The kinds of all layers.

    Args:
      pattern: one flag per layer, which is true for a window; or n, if every n-th layer has full attention.
      layers: number of layers.
      origin: name of the file in error messages.
    """
    windows = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    if len(windows) != layers:
        raise UserError(f"{origin}: attention.sliding_window_pattern has {len(windows)} flags for {layers} layers")
    return ["sliding_attention" if window else "full_attention" for window in windows]
