"""A Llama of random tensors, made by hand and written as a Hugging Face directory in any spelling."""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from mtp_jax.convert.reader import open_checkpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EMBED, UNEMBED = "model.embed_tokens.weight", "lm_head.weight"
FIELDS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "torch_dtype": "float32",
}
BLOCK = {
    "self_attn.q_proj": (16, 16),
    "self_attn.k_proj": (8, 16),
    "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16),
    "mlp.gate_proj": (24, 16),
    "mlp.up_proj": (24, 16),
    "mlp.down_proj": (16, 24),
    "input_layernorm": (16,),
    "post_attention_layernorm": (16,),
}


def _random():
    shapes = {"model.embed_tokens": (24, 16), "model.norm": (16,)}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
    rng = np.random.default_rng(0)
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


TENSORS = _random()
"""Of the tied model."""
HEAD = {UNEMBED: TENSORS[EMBED].copy()}
"""The copy of the embedding that some files of tied models hold."""


def write(directory, tensors=TENSORS, *, fields=None, index=None):
    """Writes a checkpoint.

    Args:
      directory: made if need be.
      tensors: by name, in one file; a list of such dictionaries makes shards `0.safetensors`, `1.safetensors`, ...
      fields: changes of config.json; `...` takes a field away.
      index: names that the index lists, with their files; None lists what the shards hold.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    said = {name: value for name, value in (FIELDS | (fields or {})).items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(said))
    if isinstance(tensors, dict):
        save_file(tensors, directory / SINGLE)
        return directory
    where = {}
    for number, shard in enumerate(tensors):
        save_file(shard, directory / f"{number}.safetensors")
        where |= dict.fromkeys(shard, f"{number}.safetensors")
    named = where if index is None else index
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))
    return directory


def quiet(line):
    """Lines that no test looks at."""


def meaning(directory, **options):
    """What the model will be: its settings, and the bytes of every parameter."""
    found = open_checkpoint(directory, notify=quiet, **options)
    tensors = {(piece.path, piece.at): found.tensors[piece.name].array.tobytes() for piece in found.pieces}
    return found.arch.model, tensors
