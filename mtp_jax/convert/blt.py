"""The Byte Latent Transformer of Hugging Face, `BltForCausalLM`, as an entry like those of `architectures`.

Its config has one config inside for each of the four stacks of blocks. Rotary embedding turns dimensions 2i and 2i + 1
together there, and ours i and i + H/2, so the rows of queries and keys are in another order. Cross-attention has no
positions, and keeps its order.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.config import BltConfig, ModelConfig, PatchRule
from mtp_jax.convert.layout import Architecture, Slot
from mtp_jax.convert.settings import Given
from mtp_jax.errors import UserError

STACKS = {
    "encoder": ("encoder_config", "model.local_encoder"),
    "latent": ("global_config", "model.global_transformer"),
    "decoder": ("decoder_config", "model.local_decoder"),
    "entropy": ("patcher_config", "model.patcher"),
}
"""Our name of each stack; the name of its config; the beginning of its tensors."""
OFFSET = 4
"""The token id of byte 0."""
UNUSED = ("patch_size", "patching_batch_size", "max_position_embeddings", "rope_parameters", "is_encoder_decoder")
"""Fields without an effect. Every stack has its own rope and its own largest number of positions."""
OF_PARTS = (
    *("vocab_size", "cross_attn_k", "cross_attn_all_layers", "sliding_window", "tie_word_embeddings", "head_dim"),
    *("hidden_size_global", "encoder_cross_output_size", "max_position_embeddings", "is_encoder_decoder"),
)
"""Fields of the inner configs that are known from other fields."""


def _turned(name: str, heads: str) -> Callable[[BltConfig], np.ndarray]:
    """The order of rows for rotary pairs, of queries (`num_heads`) or keys (`num_kv_heads`) of a stack."""

    def rows(model: BltConfig) -> np.ndarray:
        part = getattr(model, name)
        count = getattr(part, heads)
        return np.arange(count * part.head_dim).reshape(count, part.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)

    return rows


def _blocks(name: str, ours: str) -> tuple[Slot, ...]:
    """The slots of one stack of blocks."""
    theirs = f"{STACKS[name][1]}.layers.{{i}}."
    return (
        Slot(f"{ours}/attn/q", f"{theirs}self_attn.q_proj.weight", _turned(name, "num_heads")),
        Slot(f"{ours}/attn/k", f"{theirs}self_attn.k_proj.weight", _turned(name, "num_kv_heads")),
        Slot(f"{ours}/attn/v", f"{theirs}self_attn.v_proj.weight"),
        Slot(f"{ours}/attn/o", f"{theirs}self_attn.o_proj.weight"),
        *(Slot(f"{ours}/mlp/{one}", f"{theirs}mlp.{one}_proj.weight") for one in ("gate", "up", "down")),
        Slot(f"{ours}/attn_norm/scale", f"{theirs}input_layernorm.weight"),
        Slot(f"{ours}/mlp_norm/scale", f"{theirs}post_attention_layernorm.weight"),
    )


def _cross(ours: str, theirs: str) -> tuple[Slot, ...]:
    """The slots of cross-attention."""
    return (
        *(Slot(f"{ours}/{one}", f"{theirs}{one}_proj.weight") for one in ("q", "k", "v", "o")),
        *(Slot(f"{ours}/{one}_norm/scale", f"{theirs}{one}_norm.weight") for one in ("q", "k")),
    )


SLOTS = (
    Slot("embed/table", "model.local_encoder.embed_tokens.weight"),
    Slot("hashes/table", "model.encoder_hash_tok_embedding.weight"),
    Slot("encoder/to_patch", "model.local_encoder.patch_embedding_projection.weight"),
    Slot("latent/enter", "model.global_transformer.token_embedding_projection.weight"),
    Slot("decoder/from_patch", "model.local_decoder.patch_embedding_projection.weight"),
    Slot("final_norm/scale", "model.local_decoder.norm.weight"),
    Slot("unembed/table", "lm_head.weight"),
    Slot("entropy/embed/table", "model.patcher.embed_tokens.weight"),
    Slot("entropy/final_norm/scale", "model.patcher.norm.weight"),
    Slot("entropy/unembed/table", "model.patcher.lm_head.weight"),
    *_blocks("encoder", "encoder/blocks"),
    *_blocks("latent", "latent/blocks"),
    *_blocks("decoder", "decoder/blocks"),
    *_blocks("entropy", "entropy/blocks"),
    *_cross("encoder/cross", "model.local_encoder.cross_attn_layers.0."),
    *_cross("decoder/cross", "model.local_decoder.cross_attn_layers.{i}."),
)


@dataclasses.dataclass(frozen=True)
class BltArchitecture(Architecture):
    """`BltForCausalLM`."""

    def slots(self) -> tuple[Slot, ...]:
        """The slots of the whole model."""
        return SLOTS

    def read(
        self, values: dict[str, Any], defaults: dict[str, Any], origin: str, ignore: Sequence[str] = ()
    ) -> BltConfig:
        """See `Architecture.read`."""
        given = Given(values, origin)
        k = given("cross_attn_k")
        parts = {
            name: _read_part(name, Given(given(field), f"{origin}: {field}"), k, defaults[field])
            for name, (field, _) in STACKS.items()
        }
        window = given("local_attention_window_len") or 0
        for name in ("encoder", "decoder"):
            parts[name] = _windowed(parts[name], window)
        parts["entropy"] = _windowed(parts["entropy"], given("patcher_config").get("sliding_window") or 0)
        given.one_of("patch_in_forward", (True,))
        given.one_of("patching_mode", ("entropy",))
        given.one_of("tie_word_embeddings", (False, None))
        lengths = [given(STACKS[name][0])["max_position_embeddings"] for name in ("encoder", "decoder")]
        fields = {
            "vocab_size": given("vocab_size"),
            "hash_sizes": tuple(given("encoder_hash_byte_group_size")),
            "hash_rows": given("encoder_hash_byte_group_vocab"),
            "hash_functions": given("encoder_hash_byte_group_nb_functions"),
        }
        threshold = float(given("patching_threshold"))
        longest = given("max_patch_length") or 0
        given.check_all_read(defaults, (*UNUSED, *ignore))
        try:
            rule = PatchRule("global", threshold=threshold, max_length=longest, byte_offset=OFFSET)
            return BltConfig(
                max_seq_len=min(lengths), patches=rule, patch_states=k, double_residual=True, **fields, **parts
            )
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error

    def write(self, model: BltConfig) -> dict[str, Any]:
        """See `Architecture.write`."""
        rule = model.patches
        inner = {field: _written_part(model, name) for name, (field, _) in STACKS.items()}
        return {
            "vocab_size": model.vocab_size,
            "patch_in_forward": True,
            "patching_mode": "entropy",
            "patching_threshold": rule.threshold,
            "max_patch_length": rule.max_length or None,
            "local_attention_window_len": model.decoder.window or None,
            "cross_attn_k": model.patch_states,
            "encoder_hash_byte_group_size": list(model.hash_sizes),
            "encoder_hash_byte_group_vocab": model.hash_rows,
            "encoder_hash_byte_group_nb_functions": model.hash_functions,
            "tie_word_embeddings": False,
            **inner,
        }


def _read_part(name: str, given: Given, k: int, defaults: dict[str, Any]) -> ModelConfig:
    """The shape of a stack, from its inner config."""
    given.one_of("hidden_act", ("silu",), "silu")
    rope = given("rope_parameters")
    if rope.get("rope_type", "default") != "default":
        raise UserError(f"{given.origin}: rope_type={rope['rope_type']!r} is not implemented; implemented: 'default'")
    layers = given("num_hidden_layers")
    if name in ("encoder", "decoder"):
        given.one_of("cross_attn_k", (k,))
        # With one layer both values mean the same.
        known = {"encoder": False, "decoder": True}[name]
        given.one_of("cross_attn_all_layers", (known,) if layers > 1 else (True, False))
    width = given("hidden_size")
    heads = given("num_attention_heads")
    tied = {"tie_embeddings": False} if name == "entropy" else {}
    part = ModelConfig(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=given("num_key_value_heads", None) or heads,
        head_dim=width // heads,
        d_ff=given("intermediate_size"),
        norm_eps=given("rms_norm_eps"),
        rope_theta=float(rope["rope_theta"]),
        **tied,
    )
    given.check_all_read(defaults, OF_PARTS)
    return part


def _windowed(part: ModelConfig, window: int) -> ModelConfig:
    return dataclasses.replace(part, layer_pattern=("window",), window=window) if window else part


def _written_part(model: BltConfig, name: str) -> dict[str, Any]:
    """The inner config of a stack."""
    part = getattr(model, name)
    fields = {
        "hidden_size": part.d_model,
        "num_hidden_layers": part.num_layers,
        "num_attention_heads": part.num_heads,
        "num_key_value_heads": part.num_kv_heads,
        "intermediate_size": part.d_ff,
        "rms_norm_eps": part.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": part.rope_theta},
        "max_position_embeddings": model.max_seq_len,
    }
    if name != "latent":
        fields["vocab_size"] = model.vocab_size
    if name in ("encoder", "decoder"):
        fields |= {"cross_attn_k": model.patch_states, "hidden_size_global": model.latent.d_model}
        fields["cross_attn_all_layers"] = name == "decoder"
    if name == "entropy":
        fields["sliding_window"] = part.window or None
    return fields


BLT = BltArchitecture(
    "blt",
    "BltForCausalLM",
    settings=(),
    block=(),
    layer="model.local_decoder.layers.{i}.",
    embed="model.local_encoder.embed_tokens.weight",
    final_norm="model.local_decoder.norm",
    section=BltConfig,
)
