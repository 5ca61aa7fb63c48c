"""GGUF files as llama.cpp's converter writes them, made with the `gguf` package from models of transformers."""

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from reference import hub
from tokenizers import pre_tokenizers

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3_text": "gemma3"}


def small(model_type, **fields):
    """A config that transformers reads back from a GGUF file as it was: with the values that it takes for granted."""
    fields = {
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | fields
    if model_type == "qwen3":  # it does not read the width of heads
        fields |= {"head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    if model_type.startswith("gemma"):  # nor the scale of attention
        fields |= {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5}
        fields |= {"num_hidden_layers": 7 if model_type == "gemma3_text" else 2}
    return transformers.CONFIG_MAPPING[model_type](**fields)


def write(path, model, kind=Kind.F32, *, fields=None, tensors=None, tokenizer=None):
    """Writes a model.

    Args:
      path: of the file.
      model: of transformers.
      kind: of its matrices; norms and biases stay float32, as everywhere.
      fields: changes of the metadata, by whole name; None takes a field away.
      tensors: more of them, by their names in the file.
      tokenizer: metadata of the tokenizer; by default one of a few letters.
    """
    config = model.config
    name = ARCHITECTURES[config.model_type]
    said = metadata(config, name) | (LETTERS if tokenizer is None else tokenizer) | (fields or {})
    writer = gguf.GGUFWriter(str(path), name)
    for key, value in said.items():
        if value is not None:
            add(writer, key, value)
    for key, value in (packed(model, kind) | (tensors or {})).items():
        value, own = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(key, value, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer, key, value):
    """A field, in the type that the converter gives it."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def metadata(config, name):
    """The fields of an architecture."""
    rope = config.rope_parameters
    whole = rope.get("full_attention", rope)
    fields = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(whole["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if name != "qwen2":
        fields |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if name == "llama":
        fields["rope.dimension_count"] = config.head_dim
    if name.startswith("gemma"):
        fields["attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        fields["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        fields["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if whole["rope_type"] in ("linear", "yarn"):
        fields |= {"rope.scaling.type": whole["rope_type"], "rope.scaling.factor": float(whole["factor"])}
    if whole["rope_type"] == "yarn":
        fields["rope.scaling.original_context_length"] = whole["original_max_position_embeddings"]
    return {f"{name}.{key}": value for key, value in fields.items()}


def packed(model, kind):
    """Tensors under the names of the package's own table, changed as the converter changes them."""
    config, tensors = model.config, {}
    name = ARCHITECTURES[config.model_type]
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        stem, end = key.rsplit(".", 1)
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.float().numpy()
        if name == "llama" and "q_proj" in key:
            array = turned(array, config.num_attention_heads)
        if name == "llama" and "k_proj" in key:
            array = turned(array, config.num_key_value_heads)
        if name.startswith("gemma") and key.endswith("norm.weight"):
            array = array + 1
        own = kind if array.ndim > 1 else Kind.F32
        tensors[f"{table.get_name(stem)}.{end}"] = gguf.quantize(np.ascontiguousarray(array), own), own
    return tensors


def turned(array, heads):
    """Rows of queries or keys in llama.cpp's order."""
    return array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def letters():
    """A tokenizer of bytes as letters, with one merge and three tokens that are whole."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    }


LETTERS = letters()


def read_by_transformers(path, tokenizer=False):
    """The model, or the tokenizer, that transformers makes of a file."""
    if tokenizer:
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def random(model_type, **fields):
    """`small` with random weights."""
    return hub.random_model(small(model_type, **fields))
