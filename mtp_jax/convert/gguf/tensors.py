"""Opens the tensors of a GGUF file under their Hugging Face names. A tensor is unpacked when it is read.

llama.cpp's converter changes three things, which are handled here:

- The rows of queries and keys of Llama models are reordered: it rotates dimensions 2i and 2i + 1 together, we rotate i
  and i + H/2.
- The norms of Gemma are written as 1 + w.
- If the unembedding is not in the file, it is the embedding.
"""

import dataclasses
import functools
import mmap
import pathlib
import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from mtp_jax.config import ModelConfig
from mtp_jax.convert.files import Tensors, give_back, matches
from mtp_jax.convert.gguf.header import Header, Place
from mtp_jax.convert.layout import turned_pairs
from mtp_jax.errors import UserError

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SANDWICH_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
"""The factors of Llama 3's rope scaling. They are not a parameter, and are read with the metadata."""
PLAIN = {
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F64: np.dtype(np.float64),
}
"""Types that are not packed. All other types are unpacked to float32."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor in a mapped GGUF file. Every access to `array` unpacks it."""

    place: Place
    file: pathlib.Path
    mapped: mmap.mmap
    rows: np.ndarray | None = None
    """The order in which its rows are read."""
    minus_one: bool = False
    unlisted: pathlib.Path | None = None

    @property
    def start(self) -> int:
        """Position of its first byte in the file."""
        return self.place.start

    @property
    def nbytes(self) -> int:
        """Number of its bytes in the file."""
        return self.place.nbytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape after unpacking."""
        return self.place.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype that it is unpacked to."""
        return np.dtype(np.float32) if self.minus_one else PLAIN.get(self.place.kind, np.dtype(np.float32))

    @property
    def array(self) -> np.ndarray:
        """Its values."""
        raw = np.frombuffer(self.mapped, np.uint8, self.nbytes, self.start)
        raw = raw.reshape(*self.shape[:-1], self.nbytes // int(np.prod(self.shape[:-1])))
        kind = self.place.kind
        if kind in PLAIN:
            values = raw.view(PLAIN[kind])
            values = values if self.rows is None else values[self.rows]
        else:
            # A block is within one row, so rows can be reordered before they are unpacked.
            values = dequantize(raw if self.rows is None else raw[self.rows], kind)
        return values.astype(np.float32) - np.float32(1) if self.minus_one else values

    def release(self) -> None:
        """Frees the pages of the tensor."""
        give_back(self.mapped, self.start, self.nbytes)


def names(sandwich: bool) -> dict[str, str]:
    """The Hugging Face names of the parts of a block, by their names in the file."""
    return ATTENTION | MLP | (SANDWICH_NORMS if sandwich else PRE_NORMS)


def renamed(name: str, parts: dict[str, str]) -> str | None:
    """The Hugging Face name of a tensor; None if these models do not have the tensor."""
    stem, _, end = name.rpartition(".")
    if end not in ("weight", "bias"):
        return None
    if stem in OUTER:
        return f"{OUTER[stem]}.{end}"
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if block is None or block[2] not in parts:
        return None
    return f"model.layers.{block[1]}.{parts[block[2]]}.{end}"


def spelled(name: str, parts: dict[str, str]) -> str:
    """The inverse of `renamed`: the name of a tensor in the file."""
    stem, _, end = name.rpartition(".")
    outer = {theirs: ours for ours, theirs in OUTER.items()}
    if stem in outer:
        return f"{outer[stem]}.{end}"
    block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    inner = {theirs: ours for ours, theirs in parts.items()}
    return f"blk.{block[1]}.{inner[block[2]]}.{end}" if block and block[2] in inner else name


def open_tensors(
    header: Header, model: ModelConfig, parts: dict[str, str], turned: bool, ignore: Sequence[str]
) -> Tensors:
    """The tensors of a file, by their Hugging Face names.

    Args:
      header: header of the file.
      model: the model's config, for the order of rows.
      parts: result of `names`.
      turned: whether the rows of queries and keys are in llama.cpp's order.
      ignore: patterns of tensor names in the file to ignore.

    Raises:
      UserError: a tensor is not one of these models, or its type cannot be unpacked.
    """
    heads = {"attn_q": model.num_heads, "attn_k": model.num_kv_heads}
    tensors: Tensors = {}
    for name, place in header.tensors.items():
        if name == ROPE_FACTORS or matches(name, ignore):
            continue
        theirs = renamed(name, parts)
        if theirs is None:
            raise UserError(
                f"{header.path} holds {name}, which a model of this architecture does not have; it may change what the "
                f"model computes. If it does not, ignore it: ignore={[name]!r}, --ignore '{name}'"
            )
        _check_kind(place, header)
        part = name.split(".")[-2]
        count = heads.get(part) if turned else None
        rows = None if count is None else turned_pairs(lambda model, count=count: count)(model)
        if rows is not None and len(rows) != place.shape[0]:
            raise UserError(
                f"{name} in {header.path} has {place.shape[0]} rows, not {count} heads of {model.head_dim}; "
                "fetch it again"
            )
        minus_one = model.norm_plus_one and part.endswith("norm")
        tensors[theirs] = Packed(place, header.path, header.mapped, rows, minus_one)
    return tensors


def _check_kind(place: Place, header: Header) -> None:
    if place.kind not in PLAIN and not _unpacks(place.kind):
        raise UserError(
            f"{place.name} in {header.path} has the type {place.kind.name}, which the gguf package does not unpack; "
            "use the model in another type, such as Q8_0 or F16"
        )


@functools.cache
def _unpacks(kind: GGMLQuantizationType) -> bool:
    """Whether the package can unpack a type. It is called with one block to find out."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
