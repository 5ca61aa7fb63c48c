"""The `model` section of a Byte Latent Transformer (arXiv:2412.09871), whose functions are in `model.blt`."""

import dataclasses
import math
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.patching import ENTROPY_KINDS, PatchRule

PARTS = ("encoder", "latent", "decoder", "entropy")
"""The four stacks of blocks."""
SHARED = ("vocab_size", "max_seq_len", "dtype", "param_dtype", "remat", "attention")
"""Fields that belong to the whole model. The parts take them from there."""
OF_LANGUAGE_MODELS = ("embed_scale", "logit_scale", "logit_softcap", "tie_embeddings")
"""Fields of a language model that a stack of blocks alone does not have."""
MOST_TOKENS = 2**12
"""Largest number of token ids, if bytes are hashed."""
MOST_ROWS = 2**24
"""Largest number of embeddings of a hash."""
LONGEST_HASH = 16
"""Largest number of bytes of a hash. The sum of 16 products of 12 bits (a token) and 16 bits still has 32 bits."""


SPACES = PatchRule("space")


@dataclasses.dataclass(frozen=True)
class BltConfig:
    """A byte model that thinks in patches of bytes.

    The encoder runs over bytes. A patch is made of the encoder's states of its bytes. The latent transformer runs over
    patches. The decoder runs over bytes again, and each byte reads a patch in every layer. Extra heads read the states
    of the decoder.
    """

    kind: str = "blt"
    vocab_size: int = 258
    """V, number of token ids: 256 bytes and the special tokens. The tokenizer `bytes` has 258."""
    max_seq_len: int = 4096
    """Largest number of bytes of a row."""

    patches: PatchRule = SPACES
    """Where patches begin."""
    slots_per_byte: float = 1.0
    """Number of patches for which a training row has room, per byte. With 1, every row fits. With less, training needs
    less memory and time. Patches after the last slot are left out: their bytes read the last patch of their document
    that has a slot. Decoding has room for all patches."""
    patch_states: int = 2
    """k, number of states of the bytes' width that make up a patch. If k times this width is not `latent.d_model`, a
    matrix stands between them."""
    hash_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    """Numbers of bytes that are hashed together. Every byte gets an embedding for the hash of its last n bytes; see
    `model.blt.hashing`. Empty: no hashes."""
    hash_rows: int = 4096
    """Number of embeddings for each hash. The released models have 500,002."""
    hash_functions: int = 1
    """Number of hash functions, with a table of embeddings each."""
    double_residual: bool = False
    """Cross-attention returns 2 x + attention instead of x + attention, as in the released models."""

    encoder: ModelConfig = ModelConfig(num_layers=1)
    """The local encoder, over bytes."""
    latent: ModelConfig = ModelConfig(d_model=512, num_heads=8, num_kv_heads=8, d_ff=1408)
    """The latent transformer, over patches."""
    decoder: ModelConfig = ModelConfig()
    """The local decoder, over bytes. Its layers are those that `heads.tap` counts; tap 0 is the state after the
    encoder."""
    entropy: ModelConfig = ModelConfig()
    """The byte language model that measures entropies, for patches of kind `global` and `relative`. No training step
    changes it. Train it alone first, as a decoder LM; see `train.entropy_from`."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """As in `ModelConfig`, for all parts."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """As in `ModelConfig`, for all parts."""
    remat: Literal["none", "dots", "block"] = "none"
    """As in `ModelConfig`, for all parts."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    """As in `ModelConfig`, for the attention of bytes to bytes, and of patches to patches."""

    def __post_init__(self) -> None:
        check_fields("model", self)
        positive("model", self, "vocab_size", "max_seq_len", "patch_states", "hash_rows", "hash_functions")
        require(self.kind == "blt", f"model.kind is {self.kind!r}; a BltConfig has 'blt'")
        require(
            0 < self.slots_per_byte <= 1,
            f"model.slots_per_byte is {self.slots_per_byte}; it must be above 0 and at most 1",
        )
        self._check_hashes()
        for name in PARTS:
            self._check_part(name)
        require(
            self.encoder.d_model == self.decoder.d_model,
            f"model.encoder.d_model={self.encoder.d_model} differs from model.decoder.d_model={self.decoder.d_model}; "
            "the decoder goes on with the encoder's states, so make them equal",
        )

    def _check_hashes(self) -> None:
        only_with("model", self, "hash_rows hash_functions", bool(self.hash_sizes), "model.hash_sizes")
        for size in self.hash_sizes:
            require(
                1 < size <= LONGEST_HASH,
                f"model.hash_sizes has {size}; a hash is of 2 to {LONGEST_HASH} bytes",
            )
        require(
            len(set(self.hash_sizes)) == len(self.hash_sizes), f"model.hash_sizes={self.hash_sizes} has a size twice"
        )
        require(self.hash_rows <= MOST_ROWS, f"model.hash_rows={self.hash_rows} is above {MOST_ROWS}")
        require(
            not self.hash_sizes or self.vocab_size <= MOST_TOKENS,
            f"model.vocab_size={self.vocab_size} is above {MOST_TOKENS}, which hashes of tokens do not allow; use "
            "hash_sizes=()",
        )

    def _check_part(self, name: str) -> None:
        part = getattr(self, name)
        for field in SHARED:
            value = getattr(part, field)
            default = ModelConfig.__dataclass_fields__[field].default
            require(value == default, f"model.{name}.{field}={value!r} has no effect; set model.{field}")
        if name != "entropy":
            given = [field for field in OF_LANGUAGE_MODELS if getattr(part, field) != getattr(ModelConfig, field)]
            require(not given, f"model.{name} has {', '.join(given)}, which has no effect in a stack of blocks")
        used = name != "entropy" or self.reads_entropy
        require(
            used or part == ModelConfig(),
            f"model.entropy is set, but patches of kind {self.patches.kind!r} need no entropies; leave it out",
        )

    def part(self, name: str) -> ModelConfig:
        """The shape of one of `PARTS`, with the fields that belong to the whole model."""
        return dataclasses.replace(getattr(self, name), **{field: getattr(self, field) for field in SHARED})

    def slots(self, seq_len: int) -> int:
        """X, number of patches for which a row of `seq_len` bytes has room."""
        # Whole tiles of 8, so that a device mesh can split them if it can split the bytes.
        return min(seq_len, -(-math.ceil(seq_len * self.slots_per_byte) // 8) * 8)

    @property
    def reads_entropy(self) -> bool:
        """Whether the model has an entropy model."""
        return self.patches.kind in ENTROPY_KINDS

    @property
    def num_layers(self) -> int:
        """Number of layers of the decoder."""
        return self.decoder.num_layers

    @property
    def d_model(self) -> int:
        """Width of the states of bytes."""
        return self.decoder.d_model

    @property
    def tie_embeddings(self) -> bool:
        """False: the unembedding is a table of its own."""
        return False

    @property
    def logit_scale(self) -> float:
        """1: logits are not scaled."""
        return 1.0

    @property
    def logit_softcap(self) -> float:
        """0: logits are not capped."""
        return 0.0

    @property
    def block(self) -> ModelConfig:
        """The shape of blocks of heads: those of the decoder."""
        return self.part("decoder")

    @property
    def is_stack(self) -> bool:
        """The trunk is no stack of equal blocks."""
        return False

    @property
    def stacks(self) -> dict[str, ModelConfig]:
        """The three stacks that are trained."""
        return {f"{name}/blocks": self.part(name) for name in ("encoder", "latent", "decoder")}

    @property
    def split_fields(self) -> tuple[str, ...]:
        """Fields that divide over `mesh.tensor` devices."""
        names = [name for name in PARTS if name != "entropy" or self.reads_entropy]
        return ("vocab_size", *(f"{name}.{field}" for name in names for field in ("num_heads", "num_kv_heads", "d_ff")))

    @property
    def unembedding_path(self) -> str:
        """Path of the unembedding."""
        return "unembed/table"

    @property
    def frozen_models(self) -> dict[str, ModelConfig]:
        """The entropy model."""
        return {"entropy": self.part("entropy")} if self.reads_entropy else {}

    def forward_flops(self, tokens: int, seq_len: int) -> int:
        """Operations of the matrix products of a forward pass, without logits and without the entropy model.

        The latent transformer counts once per patch: every `stride` bytes for patches of kind `static`, else for every
        slot. The mean over a patch's bytes, in the encoder's cross-attention, is no matrix product and does not count.

        Args:
          tokens: number of bytes of the batch.
          seq_len: T, bytes of a row.
        """
        share = 1 / self.patches.stride if self.patches.kind == "static" else self.slots(seq_len) / seq_len
        patches = math.ceil(tokens * share)
        per_row = math.ceil(seq_len * share)
        k = self.patch_states
        D = self.d_model
        wide = self.latent.d_model
        encoder = self.encoder.num_layers * _block_flops(self.encoder, tokens, seq_len)
        encoder += 2 * patches * D * k * D + _cross_flops(self.encoder, patches * k, tokens)
        encoder += 2 * tokens * k * self.encoder.num_heads * self.encoder.head_dim
        latent = self.latent.num_layers * _block_flops(self.latent, patches, per_row)
        latent += 2 * patches * k * D * wide * (1 if wide == k * D else 2)
        decoder = self.decoder.num_layers * _block_flops(self.decoder, tokens, seq_len)
        attended = 4 * tokens * k * self.decoder.num_heads * self.decoder.head_dim
        decoder += self.decoder.num_layers * (_cross_flops(self.decoder, tokens, patches * k) + attended)
        return encoder + latent + decoder


def _block_flops(c: ModelConfig, positions: int, sees: int) -> int:
    """One block over a number of positions, of which each attends to `sees` others."""
    attention = 2 * c.d_model * c.head_dim * (c.num_heads + c.num_kv_heads)
    layers = (3 if c.gated else 2) * max(c.experts_per_token, 1)
    fed = layers * c.d_model * c.d_ff + c.d_model * c.num_experts
    return 2 * positions * (attention + fed) + 4 * positions * sees * c.num_heads * c.head_dim


def _cross_flops(c: ModelConfig, queries: int, keys: int) -> int:
    """The projections of cross-attention."""
    return 4 * c.d_model * c.head_dim * (queries * c.num_heads + keys * c.num_kv_heads)
