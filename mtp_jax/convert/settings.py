"""Converts config fields of Hugging Face checkpoints to `ModelConfig` and back.

A `Setting` is a pair of functions, so one list per architecture serves both directions. Reading records which fields
were used. A field that was not used and differs from the architecture's default is refused by name, because without it
the model would silently compute something else.
"""

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mtp_jax.config import ModelConfig
from mtp_jax.errors import UserError

HARMLESS = (
    # Training and generation.
    *("*dropout*", "*_pdrop", "initializer_range", "use_cache", "*_token_id", "cache_implementation", "problem_type"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "label2id", "id2label", "return_dict"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "router_aux_loss_coef", "router_jitter_noise"),
    *("pretraining_tp", "task_specific_*", "finetuning_*"),
    # Loading.
    *("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "*_version", "*name_or_path", "_commit_hash"),
    *("*attn_implementation*", "tokenizer_class", "unsloth*", "transformers_weights"),
    # Read through other fields, or from the names of the heads' tensors.
    *("max_window_layers", "no_rope_layer_interval", "use_sliding_window"),
    *("num_nextn_predict_layers", "num_mtp_layers", "mtp_layer_types", "mtp_num_hidden_layers"),
    *("mtp_hidden_states_first", "medusa_num_heads", "medusa_num_layers"),
    # Notes by the publishers of a checkpoint.
    *("is_llama_config", "transformers.js_config", "custom_pipelines", "max_sequence_length", "model_max_length"),
    *("tokenizer_model_max_length", "tokenizer_padding_side", "padding_side", "num_labels", "license", "language"),
)
"""Fields that do not change what the model computes, or that are read through other fields."""

UNTOLD = (
    *("torch_dtype", "dtype", "*_token_id", "*dropout*", "*_pdrop", "initializer_range", "use_cache", "id2label"),
    *("label2id", "num_labels", "problem_type", "output_attentions", "output_hidden_states", "return_dict"),
    *("task_specific_params", "finetuning_task", "tokenizer_class", "router_aux_loss_coef", "router_jitter_noise"),
)
"""Fields that do not change the numbers, but that transformers refuses with some values. It does not get them."""

ON_BY_DEFAULT = ("is_causal", "scale_attn_weights")
"""Switches that are on if a config file does not have them. Off changes the model, and is refused."""
REQUIRED = object()


class Given:
    """The fields of a config file. Records which of them are read."""

    def __init__(self, values: dict[str, Any], origin: str) -> None:
        self._values = values
        self._read = set()
        self.origin = origin
        self._asked: list[str] = []

    def __call__(self, name: str, default: Any = REQUIRED) -> Any:
        """The value of a field. If there is no default, the field must exist."""
        self._read.add(name)
        self._asked.append(name)
        if name not in self._values and default is REQUIRED:
            raise UserError(f"{self.origin} has no {name}; it is incomplete: fetch it again")
        return self._values.get(name, default)

    def one_of(self, name: str, known: Sequence[Any], default: Any = REQUIRED) -> Any:
        """The value of a field that must be one of the known values."""
        value = self(name, default)
        if value not in known:
            names = ", ".join(map(repr, known))
            raise UserError(f"{self.origin}: {name}={value!r} is not implemented; implemented: {names}")
        return value

    def through(self, setting: "Setting") -> dict[str, Any]:
        """The result of a setting for these fields. If it fails on a value, the error names the fields that it read."""
        self._asked = []
        try:
            return setting.read(self)
        except UserError:
            raise
        except Exception as error:
            given = ", ".join(f"{name}={self._values.get(name)!r}" for name in dict.fromkeys(self._asked))
            raise UserError(f"{self.origin}: {given} cannot be understood ({error}); correct it there") from error

    def check_all_read(self, defaults: dict[str, Any], ignore: Sequence[str] = ()) -> None:
        """Refuses fields that were not read, unless they have their default value or match `ignore`."""
        for name in ON_BY_DEFAULT:
            if not self._values.get(name, True) and name not in ignore:
                raise UserError(f"{self.origin}: {name}={self._values[name]!r} is not implemented")
        unread = {name: value for name, value in self._values.items() if self._says_more(name, value, defaults, ignore)}
        for name, value in unread.items():
            if name in defaults:
                raise UserError(
                    f"{self.origin}: {name}={value!r} is not implemented, and may change what this architecture "
                    "computes; use a checkpoint without it"
                )
        if unread:
            said = ", ".join(f"{name}={value!r}" for name, value in unread.items())
            flags = " ".join(f"--ignore {name}" for name in unread)
            verb = "are" if len(unread) > 1 else "is"
            them = "them" if len(unread) > 1 else "it"
            raise UserError(
                f"{self.origin}: {said} {verb} not implemented; if the model computes the same without {them}, "
                f"delete {them} there, or ignore {them}: ignore={list(unread)!r}, {flags}"
            )

    def _says_more(self, name: str, value: Any, defaults: dict[str, Any], ignore: Sequence[str]) -> bool:
        """Whether a field was not read and its value is not the architecture's default."""
        if name in self._read or any(fnmatch.fnmatch(name, pattern) for pattern in (*HARMLESS, *ignore)):
            return False
        return value != defaults[name] if name in defaults else bool(value)


class Setting(NamedTuple):
    """Some of our fields, and the fields of a config file with the same meaning."""

    read: Callable[[Given], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def same(ours: str, theirs: str = "", default: Any = REQUIRED) -> Setting:
    """A field with the same value in both. Only its name may differ."""
    theirs = theirs or ours
    return Setting(lambda given: {ours: given(theirs, default)}, lambda model: {theirs: getattr(model, ours)})


def fixed(**values: Any) -> Setting:
    """Fields with fixed values in an architecture. A model with other values does not belong to the architecture."""
    return Setting(lambda given: values, lambda model: {})


def only(name: str, *known: Any) -> Setting:
    """A field that is implemented only with these values. It may be missing, and it is not written."""

    def read(given: Given) -> dict[str, Any]:
        given.one_of(name, known, known[0])
        return {}

    return Setting(read, lambda model: {})


def converted(ours: str, theirs: str, read: Callable[[Any], Any], write: Callable[[Any], Any]) -> Setting:
    """A field whose value must be converted."""
    return Setting(lambda given: {ours: read(given(theirs))}, lambda model: {theirs: write(getattr(model, ours))})


def off_is_none(ours: str, theirs: str) -> Setting:
    """A number for which "off" is 0 in our config and null in theirs."""
    return converted(ours, theirs, lambda value: value or 0.0, lambda value: value or None)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def activation(name: str) -> Setting:
    """The activation function.

    Args:
      name: name of the field in the config file.
    """
    spelled = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
    return Setting(
        lambda given: {"activation": ACTIVATIONS[given.one_of(name, tuple(ACTIVATIONS))]},
        lambda model: {name: spelled[model.activation]},
    )


def biases(name: str, *ours: str) -> Setting:
    """One switch of theirs for several biases of ours."""
    return Setting(
        lambda given: dict.fromkeys(ours, bool(given(name, False))), lambda model: {name: getattr(model, ours[0])}
    )


OWN_HEAD_DIM = Setting(
    lambda given: {"head_dim": given("head_dim", None) or given("hidden_size") // given("num_attention_heads")},
    lambda model: {"head_dim": model.head_dim},
)
EVEN_HEAD_DIM = Setting(
    lambda given: {"head_dim": given("hidden_size") // given("num_attention_heads")}, lambda model: {}
)
KV_HEADS = Setting(
    lambda given: {"num_kv_heads": given("num_key_value_heads", None) or given("num_attention_heads")},
    lambda model: {"num_key_value_heads": model.num_kv_heads},
)
SHAPE = (
    same("vocab_size"),
    same("num_layers", "num_hidden_layers"),
    same("d_model", "hidden_size"),
    same("num_heads", "num_attention_heads"),
    same("max_seq_len", "max_position_embeddings"),
    same("tie_embeddings", "tie_word_embeddings"),
)


# Rotary positions.

SCALINGS = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
ROPE_FIELDS = {
    "none": {},
    "linear": {"factor": "rope_factor"},
    "llama3": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_len",
        "low_freq_factor": "rope_low",
        "high_freq_factor": "rope_high",
    },
    "yarn": {
        "factor": "rope_factor",
        "original_max_position_embeddings": "rope_original_len",
        "beta_slow": "rope_beta_slow",
        "beta_fast": "rope_beta_fast",
        "attention_factor": "rope_attention_factor",
    },
}
ALWAYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def _read_rope(rope: dict[str, Any], longest: int, origin: str) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    if kind not in tuple(SCALINGS):
        raise UserError(f"{origin}: rope_type={kind!r} is not implemented; implemented: {', '.join(SCALINGS)}")
    names = ROPE_FIELDS[SCALINGS[kind]]
    for name, value in rope.items():
        if name not in (*ALWAYS, "truncate", "original_max_position_embeddings", *names) and value:
            raise UserError(f"{origin}: {name}={value!r} of rope_type={kind!r} is not implemented")
    theta = _number(rope, "rope_theta", origin)
    if kind == "yarn" and not rope.get("truncate", True):  # unlike other switches, it is on by default
        raise UserError(f"{origin}: truncate={rope['truncate']!r} of rope_type={kind!r} is not implemented")
    if SCALINGS[kind] == "none":
        return {"rope_theta": theta}
    own = rope.get("attention_factor")
    if _number(rope, "factor", origin) == 1:
        if own not in (None, 1):
            raise UserError(f"{origin}: attention_factor={own!r} with factor=1 is not implemented")
        return {"rope_theta": theta}
    if own == 0:
        raise UserError(f"{origin}: attention_factor=0 makes rotated queries and keys 0, which is not implemented")
    given = {ours: _number(rope, theirs, origin) for theirs, ours in names.items() if rope.get(theirs) is not None}
    if "original_max_position_embeddings" in names:
        given.setdefault("rope_original_len", longest)
    return {"rope_theta": theta, "rope_scaling": SCALINGS[kind]} | given


def _number(rope: dict[str, Any], name: str, origin: str) -> int | float:
    """A number from the rope parameters. It stays an integer if it is a number of positions."""
    value = rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{origin}: {name}={value!r} in the rope parameters is not a number; correct it there")
    return value if name == "original_max_position_embeddings" else float(value)


def _written_rope(model: ModelConfig) -> dict[str, Any]:
    kind = next(theirs for theirs, ours in SCALINGS.items() if ours == model.rope_scaling)
    fields = {theirs: getattr(model, ours) for theirs, ours in ROPE_FIELDS[model.rope_scaling].items()}
    fields = {name: value for name, value in fields.items() if value}
    return {"rope_type": kind, "rope_theta": model.rope_theta} | fields


def _whole(given: Given) -> dict[str, Any]:
    rope = given("rope_parameters")
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1, 1.0):
        raise UserError(f"{given.origin}: partial_rotary_factor={share} is not implemented for this architecture")
    return _read_rope(rope, given("max_position_embeddings"), given.origin)


def _partial(given: Given) -> dict[str, Any]:
    rope = given("rope_parameters")
    name = "partial_rotary_factor"
    share = 1.0 if rope.get(name) is None else _number(rope, name, given.origin)
    return {"rope_fraction": share} | _read_rope(rope, given("max_position_embeddings"), given.origin)


ROPE = Setting(_whole, lambda model: {"rope_parameters": _written_rope(model)})
PARTIAL_ROPE = Setting(
    _partial,
    lambda model: {"rope_parameters": _written_rope(model) | {"partial_rotary_factor": model.rope_fraction}},
)


def _read_two_ropes(given: Given) -> dict[str, Any]:
    """Gemma 3: window layers have a separate base, and rope scaling does not apply to them."""
    ropes = given("rope_parameters")
    local = ropes["sliding_attention"]
    if local.get("rope_type", "default") != "default":
        raise UserError(f"{given.origin}: rope_type={local['rope_type']!r} of sliding_attention is not implemented")
    windows = "sliding_attention" in given("layer_types")
    full = _read_rope(ropes["full_attention"], given("max_position_embeddings"), given.origin)
    return full | ({"rope_theta_window": float(local["rope_theta"])} if windows else {})


TWO_ROPES = Setting(
    _read_two_ropes,
    lambda model: {
        "rope_parameters": {
            "full_attention": _written_rope(model),
            "sliding_attention": {"rope_type": "default", "rope_theta": model.rope_theta_window or model.rope_theta},
        }
    },
)


# Kinds of layers.


def shortest_pattern(layers: Sequence[str]) -> tuple[str, ...]:
    """The shortest tuple whose repetition gives these layers."""
    layers = tuple(layers)
    count = next(n for n in range(1, len(layers) + 1) if layers == (layers[:n] * len(layers))[: len(layers)])
    return layers[:count]


KINDS = {"full_attention": "full", "sliding_attention": "window"}


def _read_layers(given: Given, layers: Sequence[str], width: int | None) -> dict[str, Any]:
    unknown = next((layer for layer in layers if layer not in KINDS), None)
    if unknown is not None:
        raise UserError(f"{given.origin}: layer type {unknown!r} is not implemented; implemented: {', '.join(KINDS)}")
    kinds = [KINDS[layer] for layer in layers]
    return {"layer_pattern": shortest_pattern(kinds), "window": width or 0 if "window" in kinds else 0}


def _layer_types(model: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in KINDS.items()}
    window = {"sliding_window": model.window} if model.window else {}
    return {"layer_types": [theirs[layer] for layer in model.layers]} | window


LAYER_TYPES = Setting(
    lambda given: _read_layers(given, given("layer_types"), given("sliding_window", None)), _layer_types
)
SWITCHED_LAYER_TYPES = Setting(
    LAYER_TYPES.read,
    lambda model: _layer_types(model) | {"use_sliding_window": bool(model.window)},
)
"""Qwen2 and Qwen3: the window is used only if `use_sliding_window` is on."""


def _all_windows(given: Given) -> dict[str, Any]:
    width = given("sliding_window", None)
    return {"layer_pattern": ("window",) if width else ("full",), "window": width or 0}


EVERY_LAYER_WINDOWED = Setting(_all_windows, lambda model: {"sliding_window": model.window or None})
SWITCHED_WINDOW = Setting(
    _all_windows, lambda model: {"sliding_window": model.window or None, "use_sliding_window": bool(model.window)}
)


def _read_nope(given: Given) -> dict[str, Any]:
    if any(layer != "full_attention" for layer in given("layer_types", None) or ()):
        raise UserError(f"{given.origin}: windows (layer_types) together with no_rope_layers are not implemented")
    return {"layer_pattern": shortest_pattern(["full" if rope else "nope" for rope in given("no_rope_layers")])}


NO_ROPE_LAYERS = Setting(_read_nope, lambda model: {"no_rope_layers": [int(kind != "nope") for kind in model.layers]})


# Factors.

ATTENTION_SCALE = Setting(
    lambda given: {"attn_scale": float(given("query_pre_attn_scalar")) ** -0.5},
    lambda model: {"query_pre_attn_scalar": _whole_if_whole((model.attn_scale or model.head_dim**-0.5) ** -2)},
)
ROOT_EMBED_SCALE = Setting(lambda given: {"embed_scale": math.sqrt(given("hidden_size"))}, lambda model: {})


def _whole_if_whole(value: float) -> float | int:
    return round(value) if math.isclose(value, round(value), rel_tol=1e-9) else value
