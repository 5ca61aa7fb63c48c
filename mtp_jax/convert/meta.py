"""Checkpoints in the layout of Meta's Llama code. Meta's multi-token models were released in this layout.

The number of layers in `params.json` includes one layer per extra head: with n heads, the trunk has n - 1 layers fewer.
"""

import json
import pathlib
import re
from typing import Any

from mtp_jax.config import Arch, ModelConfig
from mtp_jax.convert.files import Tensors, open_file, write_file
from mtp_jax.convert.layout import Architecture, Slot, differing, turned_pairs
from mtp_jax.convert.leaving import Came, Leaving
from mtp_jax.convert.settings import Given, Setting, fixed, same
from mtp_jax.errors import UserError

PARAMS = "params.json"
CONFIG_NAME = PARAMS
WEIGHTS = ("consolidated.safetensors", "consolidated.pth", "consolidated.00.pth")
IGNORED = ("multiple_of", "n_future_tokens", "max_batch_size", "use_scaled_rope")
"""Fields that are read together with others, or do not change the model."""


def _inner_width(given: Given) -> dict[str, Any]:
    """Inner width of the feed-forward layer: by default 8/3 of the model's width, rounded up to a multiple."""
    width = int(8 * given("dim") / 3)
    width = int((given("ffn_dim_multiplier", None) or 1) * width)
    multiple = given("multiple_of")
    return {"d_ff": -(-width // multiple) * multiple}


def _heads(given: Given) -> dict[str, Any]:
    heads = given("n_heads")
    wide = given("dim")
    return {"num_heads": heads, "num_kv_heads": given("n_kv_heads", None) or heads, "head_dim": wide // heads}


def _written_shape(model: ModelConfig) -> dict[str, Any]:
    """Fields for the shape. Meta computes the inner width by a formula; `multiple_of` = d_ff makes it give d_ff."""
    kv_heads = {} if model.num_kv_heads == model.num_heads else {"n_kv_heads": model.num_kv_heads}
    share = model.d_ff / int(8 * model.d_model / 3)
    return {"multiple_of": model.d_ff, "ffn_dim_multiplier": share, "n_heads": model.num_heads, **kv_heads}


META = Architecture(
    "meta",
    "Transformer",
    (
        *(same("vocab_size"), same("num_layers", "n_layers"), same("d_model", "dim"), same("norm_eps")),
        *(Setting(_heads, _written_shape), Setting(_inner_width, lambda model: {})),
        *(same("max_seq_len", default=4096), same("rope_theta", default=10_000.0)),
        fixed(tie_embeddings=False),
    ),
    (
        Slot("attn/q", "attention.wq.weight", turned_pairs(lambda model: model.num_heads)),
        Slot("attn/k", "attention.wk.weight", turned_pairs(lambda model: model.num_kv_heads)),
        Slot("attn/v", "attention.wv.weight"),
        Slot("attn/o", "attention.wo.weight"),
        Slot("mlp/gate", "feed_forward.w1.weight"),
        Slot("mlp/up", "feed_forward.w3.weight"),
        Slot("mlp/down", "feed_forward.w2.weight"),
        Slot("attn_norm/scale", "attention_norm.weight"),
        Slot("mlp_norm/scale", "ffn_norm.weight"),
    ),
    layer="layers.{i}.",
    embed="tok_embeddings.weight",
    final_norm="norm",
    unembed="output.weight",
    buffers=("rope.freqs",),
)


def open_weights(directory: pathlib.Path) -> Tensors:
    """Opens the file of weights. Weights that are split over several files are refused."""
    if (directory / "consolidated.01.pth").is_file():
        raise UserError(
            f"{directory} holds weights that are split for several devices (consolidated.01.pth), and joining them is "
            "not implemented; use the model's Hugging Face directory (safetensors)"
        )
    found = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if found is None:
        raise UserError(f"{directory} has {PARAMS} but no weights; fetch {' or '.join(WEIGHTS)}")
    return open_file(found)


def fields(raw: dict[str, Any], tensors: Tensors, origin: str) -> dict[str, Any]:
    """Meta's fields, with the number of layers in the trunk and the vocabulary size of the embedding."""
    if raw.get("use_scaled_rope"):
        raise UserError(f"{origin}: use_scaled_rope is not implemented for Meta's layout; use the Hugging Face one")
    layers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    embed = tensors.get(META.embed)
    width = tensors.get("layers.0.feed_forward.w1.weight")
    if embed is None or width is None or not embed.shape:
        raise UserError(f"{origin}: its weights lack {META.embed} or layers.0.feed_forward.w1.weight; fetch them again")
    return raw | {"vocab_size": embed.shape[0], "n_layers": len(layers)}


def architecture(raw: dict[str, Any]) -> Architecture:
    """See `leaving.Writing`."""
    return META


def describe(arch: Arch, came: Came | None) -> tuple[Architecture, dict[str, Any]]:
    """See `leaving.Writing`; heads are parallel ones."""
    model = arch.model
    heads = arch.heads.num_future
    if model.num_heads * model.head_dim != model.d_model:
        raise _not_ours(f"model.head_dim={model.head_dim} (it must be d_model / num_heads)")
    raw = (came.raw if came is not None else {}) | META.write(model)
    if different := differing(META.read(raw, {}, PARAMS, ("*",)), model):
        raise _not_ours(f"model.{different[0]}={getattr(model, different[0])!r}")
    return META, raw | {"n_layers": model.num_layers + heads - 1, "n_future_tokens": heads}


def write(directory: pathlib.Path, leaving: Leaving, shard_bytes: int) -> dict[str, Any]:
    """See `leaving.Writing`; all tensors are in one file."""
    write_file(directory / WEIGHTS[0], leaving.entries)
    (directory / PARAMS).write_text(json.dumps(leaving.raw, indent=2) + "\n")
    return leaving.raw


def _not_ours(what: str) -> UserError:
    remedy = "use form 'none' to write the model without its heads"
    return UserError(f"parallel heads are written in Meta's layout (form 'meta'), which cannot hold {what}; {remedy}")
