"""A run that starts from the model of another one: `train.init_from`."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from mtp_jax.checkpoint import restore_params
from mtp_jax.config import Config, HeadsConfig, ModelConfig, from_json
from mtp_jax.errors import UserError

FREE = ("dtype", "param_dtype", "remat", "max_seq_len")
"""Settings of the model that may change: how it is computed, and for how long rows."""
AUXILIARY = ("token_order",)
"""Parameters that serve training only."""


def parameters_to_start_from(
    config: Config, workdir: pathlib.Path, abstract_params: dict[str, Any], notify: Callable[[str], None]
) -> dict[str, Any]:
    """Parameters of the newest whole checkpoint of `train.init_from`, by top-level name.

    Args:
      config: the new run's.
      workdir: its directory, with the tokenizer of its corpus.
      abstract_params: shapes, dtypes and shardings of its parameters.
      notify: receives a line about what is loaded.

    Raises:
      UserError: no run there, or one of another model, other heads or another tokenizer.
    """
    settings, source = config.train, pathlib.Path(config.train.init_from)
    path = source / "config.json"
    if not path.is_file():
        raise UserError(f"train.init_from={settings.init_from!r} has no config.json; give the workdir of `mtp train`")
    other = from_json(path.read_text(encoding="utf-8"), str(path))
    _check_same("model", other.model, config.model, source)
    if settings.init_heads == "same":
        _check_same("heads", other.heads, config.heads, source)
    tokenizers = [directory / "data" / "tokenizer.json" for directory in (source, workdir)]
    theirs, ours = (path.read_bytes() if path.is_file() else b"" for path in tokenizers)
    if theirs != ours:
        use = str(tokenizers[0]) if theirs else "none"
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer of train.init_from={settings.init_from!r}; "
            f"use data.tokenizer={use!r}"
        )
    wanted = {
        name: tree
        for name, tree in abstract_params.items()
        if name not in AUXILIARY and (name != "heads" or settings.init_heads == "same")
    }
    params, step = restore_params(source, wanted, notify=notify)
    notify(f"starting from {source}, step {step}" + (", heads too" if "heads" in params else ""))
    return params


def _check_same(
    section: str, old: ModelConfig | HeadsConfig, new: ModelConfig | HeadsConfig, source: pathlib.Path
) -> None:
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before != after and field.name not in FREE:
            raise UserError(
                f"{section}.{field.name}={after!r}, but the run of train.init_from={str(source)!r} has {before!r}; "
                f"use {section}.{field.name}={before!r}"
            )
