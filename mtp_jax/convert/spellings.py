"""Adds the config fields that transformers 4, vLLM and llama.cpp's converter read to those of transformers 5.

transformers 5 has everything about rotary positions in `rope_parameters`. transformers 4 does not know this field: it
uses defaults instead, and silently computes other logits. So a config file that we write has these settings twice.
"""

from collections.abc import Mapping
from typing import Any

DTYPES = ("dtype", "torch_dtype")
"""Names of the field for the weights' dtype: since transformers 4.56, and before."""


def older(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that transformers 4 reads, made from those of transformers 5, without fields that the file has.

    Args:
      raw: fields of a config file.
      names: fields that have a special name for this architecture in transformers 4: from the usual name in
        transformers 4, or the name in transformers 5, to the special name.
    """
    fields = _rope(raw.get("rope_parameters") or {}, names)
    fields |= {old: raw[name] for name, old in names.items() if name in raw}
    fields |= dict.fromkeys(DTYPES, raw.get("dtype", raw.get("torch_dtype")))
    return {name: value for name, value in fields.items() if name not in raw}


def _rope(rope: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Fields for rotary positions. If window layers have a separate base, it becomes `rope_local_base_freq`."""
    if not rope:
        return {}
    whole = rope.get("full_attention", rope)
    scaling = {name: value for name, value in whole.items() if name not in ("rope_theta", "partial_rotary_factor")}
    stretched = scaling.get("rope_type", "default") != "default"
    fields = {
        "rope_theta": whole["rope_theta"],
        "rope_scaling": {names.get(name, name): value for name, value in scaling.items()} if stretched else None,
    }
    if "partial_rotary_factor" in whole:
        fields["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if "sliding_attention" in rope:
        fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return {names.get(name, name): value for name, value in fields.items()}
