"""What an entry in the table of architectures is made of: slots, and rows of fused matrices."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.config import ModelConfig
from mtp_jax.convert.settings import Given, Setting
from mtp_jax.errors import UserError

Rows = Callable[[ModelConfig], np.ndarray]


class Slot(NamedTuple):
    """A parameter of ours and the tensor that holds it."""

    ours: str
    theirs: str
    rows: Rows | None = None
    """Which rows of that tensor; all of them by default."""


BUFFERS = ("*rotary_emb.inv_freq", "*rotary_emb.cos_cached", "*rotary_emb.sin_cached", "*.position_ids")
"""Tables that old files hold, and that follow from the config."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A `model_type` of Hugging Face."""

    model_type: str
    class_name: str
    """The class with a language model head."""
    settings: tuple[Setting, ...]
    block: tuple[Slot, ...]
    """Of one block, below `layer`."""
    layer: str = "model.layers.{i}."
    embed: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    unembed: str = "lm_head.weight"
    buffers: tuple[str, ...] = BUFFERS
    """Tensors of old files that hold no parameter."""
    also: dict[str, str] = dataclasses.field(default_factory=dict)
    """Other names that files have for a tensor."""
    unused: tuple[str, ...] = ()
    """Fields that say nothing about this architecture."""
    older: dict[str, str] = dataclasses.field(default_factory=dict)
    """What fields are called in transformers 4, where it is another name than in most architectures."""
    refuse: Callable[[dict[str, Any]], str | None] = lambda raw: None
    """What in a config file is beyond us, in words, if anything."""

    def slots(self) -> tuple[Slot, ...]:
        """The whole model; blocks of all layers."""
        outer = (
            Slot("embed/table", self.embed),
            *both("final_norm", self.final_norm),
            Slot("unembed/table", self.unembed),
        )
        return (*outer, *self.block_slots("blocks", self.layer))

    def block_slots(self, ours: str, theirs: str) -> tuple[Slot, ...]:
        """Blocks below a path of ours, and below a prefix of their names."""
        return tuple(Slot(f"{ours}/{slot.ours}", theirs + slot.theirs, slot.rows) for slot in self.block)

    def read(
        self, values: dict[str, Any], defaults: dict[str, Any], origin: str, ignore: Sequence[str] = ()
    ) -> ModelConfig:
        """The `model` section that the fields of a config file stand for.

        Raises:
          UserError: a field that is missing, or that we do not implement.
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
        """The fields of a config file for a model; reading them shows whether it is one of this architecture."""
        return {name: value for setting in self.settings for name, value in setting.write(model).items()}


NOT_COMPUTED = ("dtype", "param_dtype", "remat", "attention", "max_seq_len")
"""Settings of the model that its config file does not speak of, or that may grow."""


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Fields in which two models compute different things."""
    return [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if field.name not in NOT_COMPUTED and getattr(one, field.name) != getattr(other, field.name)
    ]


def both(ours: str, theirs: str) -> tuple[Slot, Slot]:
    """Scale and bias of a norm; a norm without a bias has no such parameter, and the slot goes unused."""
    return Slot(f"{ours}/scale", f"{theirs}.weight"), Slot(f"{ours}/bias", f"{theirs}.bias")


def matrix(ours: str, theirs: str, rows: Rows | None = None) -> tuple[Slot, Slot]:
    """A matrix and its bias, if it has one."""
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
    """Query, key and value of each head lie together (GPT-NeoX)."""

    def rows(model: ModelConfig) -> np.ndarray:
        count = 3 * model.num_heads * model.head_dim
        return np.arange(count).reshape(model.num_heads, 3, model.head_dim)[:, part].reshape(-1)

    return rows


def turned_pairs(heads: Callable[[ModelConfig], int]) -> Rows:
    """Meta turns neighbouring dimensions, 2i and 2i + 1; we turn i and i + H/2."""

    def rows(model: ModelConfig) -> np.ndarray:
        count = heads(model)
        pairs_NhP = np.arange(count * model.head_dim).reshape(count, model.head_dim // 2, 2)
        return pairs_NhP.swapaxes(1, 2).reshape(-1)

    return rows
