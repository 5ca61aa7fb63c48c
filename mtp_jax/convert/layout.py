"""The parts of an entry in the table of architectures: slots, and rows of fused matrices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import ModelConfig, TrunkConfig
from mtp_jax.convert.settings import Given, Setting
from mtp_jax.errors import UserError

Rows = Callable[[ModelConfig], np.ndarray]


class Slot(NamedTuple):
    """A parameter of ours and the tensor that holds it."""

    ours: str
    theirs: str
    rows: Rows | None = None
    """The rows of the tensor that hold the parameter; None is all rows."""


BUFFERS = ("*rotary_emb.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached", "*.position_ids")
"""Tables in old files that can be computed from the config."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A `model_type` of Hugging Face."""

    model_type: str
    class_name: str
    """Name of the class with a language model head."""
    settings: tuple[Setting, ...]
    block: tuple[Slot, ...]
    """Slots of one block. The tensor names follow the prefix `layer`."""
    layer: str = "model.layers.{i}."
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    unembed: str = "lm_head.weight"
    buffers: tuple[str, ...] = BUFFERS
    """Tensors of old files that are not parameters."""
    also: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other names that some files use for a tensor."""
    unused: tuple[str, ...] = ()
    """Config fields that have no effect in this architecture."""
    older: dict[str, str] = dataclasses.field(default_factory=dict)
    """Names of fields in transformers 4 that differ from those of most architectures."""
    refuse: Callable[[dict[str, Any]], str | None] = lambda raw: None
    """Returns the feature of a config file that is not implemented, in words; None if there is none."""
    section: type = ModelConfig
    """The type of the `model` section."""

    def slots(self) -> tuple[Slot, ...]:
        """The slots of the whole model."""
        outer = (
            Slot("embed/table", self.embed),
            *both("final_norm", self.final_norm),
            Slot("unembed/table", self.unembed),
        )
        return (*outer, *self.block_slots("blocks", self.layer))

    def block_slots(self, ours: str, theirs: str) -> tuple[Slot, ...]:
        """The slots of the blocks.

        Args:
          ours: path of the blocks in our parameters.
          theirs: prefix of the tensor names.
        """
        return tuple(Slot(f"{ours}/{slot.ours}", theirs + slot.theirs, slot.rows) for slot in self.block)

    def read(
        self, values: dict[str, Any], defaults: dict[str, Any], origin: str, ignore: Sequence[str] = ()
    ) -> ModelConfig:
        """The `model` section for the fields of a config file.

        Args:
          values: the fields.
          defaults: the default values of this architecture.
          origin: name of the file in error messages.
          ignore: patterns of fields to ignore.

        Raises:
          UserError: a field is missing, or is not implemented.
        """
        given = Given(values, origin)
        fields = {}
        for setting in self.settings:
            fields |= given.through(setting)
        given.check_all_read(defaults, (*self.unused, *ignore))
        try:
            return ModelConfig(**fields)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """The fields of a config file for a model. If reading them gives another model, this architecture is wrong."""
        return {name: value for setting in self.settings for name, value in setting.write(model).items()}


NOT_COMPUTED = ("dtype", "param_dtype", "remat", "attention", "max_seq_len", "slots_per_byte")
"""Settings of the model that a config file does not have, or that may be increased."""


def differing(one: TrunkConfig, other: TrunkConfig) -> list[str]:
    """Names of the fields that make two models compute different results."""
    return [
        field.name
        for field in dataclasses.fields(one)
        if field.name not in NOT_COMPUTED and getattr(one, field.name) != getattr(other, field.name)
    ]


def both(ours: str, theirs: str) -> tuple[Slot, Slot]:
    """The slots of a norm's scale and bias. If the norm has no bias, that slot is not used."""
    return Slot(f"{ours}/scale", f"{theirs}.weight"), Slot(f"{ours}/bias", f"{theirs}.bias")


def matrix(ours: str, theirs: str, rows: Rows | None = None) -> tuple[Slot, Slot]:
    """The slots of a matrix and of its bias. If the matrix has no bias, that slot is not used."""
    return Slot(ours, f"{theirs}.weight", rows), Slot(f"{ours}_bias", f"{theirs}.bias", rows)


# Rows of fused matrices.


def _span(start: Callable[[ModelConfig], int], count: Callable[[ModelConfig], int]) -> Rows:
    return lambda model: np.arange(start(model), start(model) + count(model))


def _queries(model: ModelConfig) -> int:
    return model.num_heads * model.head_dim


def _keys(model: ModelConfig) -> int:
    return model.num_kv_heads * model.head_dim


STACKED_Q = _span(lambda model: 0, _queries)
STACKED_K = _span(_queries, _keys)
STACKED_V = _span(lambda model: _queries(model) + _keys(model), _keys)
STACKED_GATE = _span(lambda model: 0, lambda model: model.d_ff)
STACKED_UP = _span(lambda model: model.d_ff, lambda model: model.d_ff)


def interleaved(part: int) -> Rows:
    """Rows of queries (part 0), keys (1) or values (2), if they are stored together for each head (GPT-NeoX)."""

    def rows(model: ModelConfig) -> np.ndarray:
        count = 3 * model.num_heads * model.head_dim
        return np.arange(count).reshape(model.num_heads, 3, model.head_dim)[:, part].reshape(-1)

    return rows


def turned_pairs(heads: Callable[[ModelConfig], int]) -> Rows:
    """The order of rows for rotary pairs: Meta rotates dimensions 2i and 2i + 1 together, we rotate i and i + H/2."""

    def rows(model: ModelConfig) -> np.ndarray:
        count = heads(model)
        pairs_NhP = np.arange(count * model.head_dim).reshape(count, model.head_dim // 2, 2)
        return pairs_NhP.swapaxes(1, 2).reshape(-1)

    return rows
