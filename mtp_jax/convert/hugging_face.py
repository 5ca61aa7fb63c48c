"""Hugging Face's config.json: how transformers reads it, and how we write it. The `Writing` of this layout."""

import copy
import dataclasses
import json
import pathlib
from typing import Any

from mtp_jax.config import Arch, ModelConfig, TrunkConfig
from mtp_jax.convert import files, forms, spellings
from mtp_jax.convert.architectures import ENTRIES
from mtp_jax.convert.layout import Architecture, differing
from mtp_jax.convert.leaving import Came, Leaving
from mtp_jax.convert.settings import UNTOLD, shortest_pattern
from mtp_jax.data.chat import quiet_transformers
from mtp_jax.errors import UserError
from mtp_jax.model.heads.base import sets

CONFIG_NAME = "config.json"

# Reading.


def normalised(raw: dict[str, Any], origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a config as the installed transformers reads them, with defaults filled in; and the defaults."""
    quiet_transformers()
    from transformers import CONFIG_MAPPING
    from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

    kind = CONFIG_MAPPING[raw["model_type"]]
    before = get_verbosity()
    set_verbosity_error()  # it warns about its own defaults
    try:
        defaults = kind().to_dict()
        return kind.from_dict(_told(raw, defaults)).to_dict(), defaults
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{origin} is refused by transformers: {reason}") from error
    finally:
        set_verbosity(before)


def _told(raw: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Copies of the fields that transformers gets. It writes into them, so they must be copies.

    transformers is strict about types. So fields that change no number are left out, and fields with null for "off".
    """
    empty = {name for name, value in raw.items() if value is None and not defaults.get(name)}
    return {n: copy.deepcopy(value) for n, value in raw.items() if n not in empty and not files.matches(n, UNTOLD)}


# Writing.


def architecture(raw: dict[str, Any]) -> Architecture:
    """See `leaving.Writing`."""
    return ENTRIES[raw["model_type"]]


def describe(arch: Arch, came: Came | None) -> tuple[Architecture, dict[str, Any]]:
    """See `leaving.Writing`.

    The architecture is the first one for which writing and reading again gives the same model. So an architecture that
    does not fit, or that writes a wrong field, is not chosen.
    """
    model = arch.model
    if isinstance(model, ModelConfig):
        model = dataclasses.replace(model, layer_pattern=shortest_pattern(model.layers))
    if came is not None:
        raw = dict(came.raw)
        before = _read_back(came.architecture, raw)
        if before is not None and (changed := differing(before, model)) in ([], ["tie_embeddings"]):
            return came.architecture, raw | ({"tie_word_embeddings": model.tie_embeddings} if changed else {})
    nearest: tuple[list[str], str] | None = None
    for entry in ENTRIES.values():
        if not isinstance(model, entry.section):
            continue
        try:
            names = {"architectures": [entry.class_name], "model_type": entry.model_type}
            raw = names | NO_TOKENS | entry.write(model)
        except (KeyError, UserError):
            continue
        back = _read_back(entry, raw)
        different = None if back is None else differing(back, model)
        if different == []:
            return entry, raw
        if different is not None and (nearest is None or len(different) < len(nearest[0])):
            nearest = different, entry.model_type
    reason = f"; the closest is {nearest[1]}, without {', '.join(f'model.{n}' for n in nearest[0])}" if nearest else ""
    raise UserError(f"no known Hugging Face architecture can hold this model{reason}")


def _read_back(entry: Architecture, raw: dict[str, Any]) -> TrunkConfig | None:
    try:
        return entry.read(*normalised(raw, CONFIG_NAME), CONFIG_NAME, ("*",))
    except UserError:
        return None


def write(directory: pathlib.Path, leaving: Leaving, shard_bytes: int) -> dict[str, Any]:
    """See `leaving.Writing`."""
    files.write(directory, leaving.entries, shard_bytes)
    raw = _config_fields(leaving)
    (directory / CONFIG_NAME).write_text(json.dumps(raw, indent=2) + "\n")
    return raw


def _config_fields(leaving: Leaving) -> dict[str, Any]:
    """The fields of config.json: the original ones if nothing changed, otherwise fields for transformers 4 and 5."""
    raw = with_head_fields(leaving.raw, leaving.form, leaving.arch)
    # Of the largest tensor; loaders use it for all.
    dtype = max(leaving.entries, key=lambda one: one.nbytes).dtype.name
    named = [name for name in spellings.DTYPES if name in raw] or spellings.DTYPES
    raw = raw | dict.fromkeys(named, dtype)
    if leaving.came is None:
        raw |= _token_fields(leaving.tokenizer)
    elif raw == leaving.came and not leaving.trained_further:
        return raw
    return raw | spellings.older(raw, leaving.architecture.older)


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""These fields are always written, because every architecture has other defaults for them."""


def _token_fields(tokenizer: Any) -> dict[str, int | None]:
    """The special tokens of a tokenizer of ours."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


COUNTS = {"deepseek": "num_nextn_predict_layers", "mimo": "num_nextn_predict_layers", "qwen": "mtp_num_hidden_layers"}
HEAD_FIELDS = ("num_mtp_layers", "mtp_layer_types", "mtp_hidden_states_first", *COUNTS.values())


def with_head_fields(raw: dict[str, Any], form: str, arch: Arch) -> dict[str, Any]:
    """The fields of config.json with those of the heads in the checkpoint. Fields of earlier heads are removed."""
    depths = sets(arch)
    fields = {}
    if form == "mtp":
        kind = forms.attention_type(arch)
        fields = {"num_mtp_layers": depths, "mtp_layer_types": [kind] * depths}
        fields |= {"mtp_hidden_states_first": True} if arch.heads.concat == "hidden_first" else {}
    elif form in COUNTS:
        # The Qwen families have different names for this field.
        known = [name for name in (COUNTS["deepseek"], COUNTS["qwen"]) if form == "qwen" and name in raw]
        fields = dict.fromkeys(known or [COUNTS[form]], depths)
    return {name: value for name, value in raw.items() if name not in HEAD_FIELDS} | fields
