"""Starts a run from the model of another run: `train.init_from`."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax

from mtp_jax import sharding
from mtp_jax.config import Config, HeadsConfig, ModelConfig, TrunkConfig, from_json
from mtp_jax.config.checks import require
from mtp_jax.errors import UserError
from mtp_jax.model import lora, mtp
from mtp_jax.runs.checkpoint import restore_params

FREE_OF_HEADS = ("tap", "tap_norm")
"""Settings of heads that may differ: the state that they read. All their parameters stay as they are."""
FREE = ("dtype", "param_dtype", "remat", "attention", "max_seq_len")
"""Settings of the model that may differ: how it is computed, and the largest length of a row."""


def config_of(source: str | pathlib.Path, who: str = "train.init_from") -> Config:
    """The config in a run's directory.

    Args:
      source: the directory.
      who: name of the setting that gives the directory, for error messages.

    Raises:
      UserError: the directory holds no run.
    """
    path = pathlib.Path(source).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"{who}={str(source)!r} has no config.json; give the workdir of `mtp train` or `mtp import`")
    text = path.read_text(encoding="utf-8")
    if '"model_type"' in text:
        raise UserError(
            f"{who}={str(source)!r} is a Hugging Face checkpoint; give it to mtp_jax.start_from, or "
            "convert it first with mtp import"
        )
    return from_json(text, str(path))


def check_start(config: Config) -> Config:
    """Checks that the run in `train.init_from` has the model of the config.

    Returns:
      The config of that run.

    Raises:
      UserError: the directory holds no run, or a run with another model or other heads.
    """
    source = config.train.init_from
    other = config_of(source)
    _check_same("model", other.model, config.model, source)
    if config.train.init_heads == "same":
        require(
            other.heads.num_future > 1 or config.heads.num_future == 1,
            f"train.init_heads='same', but the run of train.init_from={source!r} has no heads; train them first with "
            "train.trainable='heads', or use init_heads='new'",
        )
        _check_same("heads", other.heads, config.heads, source)
    return other


def remarks(config: Config, other: Config, paths: Iterable[str]) -> list[str]:
    """What is unusual about the heads of a run that starts from another one, in words.

    Args:
      config: config of the new run.
      other: config of the run that it starts from.
      paths: paths of the parameters of the new run.
    """
    train = config.train
    of_heads = [path for path in paths if path.startswith("heads/")]
    if train.init_heads == "same" and of_heads:
        return [
            f"heads.{name}={getattr(config.heads, name)}, but the heads have learned with {getattr(other.heads, name)}"
            for name in FREE_OF_HEADS
            if getattr(config.heads, name) != getattr(other.heads, name)
        ]
    if of_heads and not any(map(train.learns, of_heads)):
        return [f"train.trainable={train.trainable!r} trains no head, and the heads are new: they stay as they start"]
    return []


def parameters_to_start_from(
    config: Config, corpus: pathlib.Path, abstract_params: dict[str, Any], notify: Callable[[str], None]
) -> dict[str, Any]:
    """Parameters of the newest whole checkpoint of `train.init_from`, by top-level name.

    Args:
      config: config of the new run, which `check_start` has accepted.
      corpus: directory of its corpus, with the tokenizer.
      abstract_params: shapes, dtypes and shardings of its parameters.
      notify: is called with a line of text about what is loaded.

    Raises:
      UserError: there is no whole checkpoint, or the tokenizers differ.
    """
    settings = config.train
    source = pathlib.Path(config.train.init_from).expanduser()
    tokenizers = [directory / "tokenizer.json" for directory in (source / "data", corpus)]
    theirs = tokenizers[0].read_bytes() if tokenizers[0].is_file() else b""
    ours = tokenizers[1].read_bytes() if tokenizers[1].is_file() else b""
    if theirs != ours:
        use = str(tokenizers[0]) if theirs else "none"
        raise UserError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer of train.init_from={settings.init_from!r}; "
            f"use data.tokenizer={use!r}"
        )
    wanted = {
        name: tree
        for name, tree in abstract_params.items()
        if name not in mtp.OF_TRAINING and (name not in mtp.OF_HEADS or settings.init_heads == "same")
    }
    other = config_of(source)
    if other.lora.rank:
        wanted["lora"] = _adapters(other, wanted)
    params, step = restore_params(source, wanted, notify=notify)
    params = lora.merge(params, other.lora)
    notify(f"starting from {source}, step {step}" + (", heads too" if "heads" in params else ""))
    return params


def frozen_models(config: Config, abstract_params: dict[str, Any], notify: Callable[[str], None]) -> dict[str, Any]:
    """Parameters of the frozen models of a trunk, by top-level name: those of the run in `train.entropy_from`.

    Args:
      config: config of the new run.
      abstract_params: shapes, dtypes and shardings of its parameters.
      notify: is called with a line of text about what is loaded.

    Raises:
      UserError: the directory holds no run, a run of another model or tokenizer, or no whole checkpoint.
    """
    source = config.train.entropy_from
    other = config_of(source, "train.entropy_from")
    read = {}
    for name, model in config.model.frozen_models.items():
        theirs = other.model
        require(
            isinstance(theirs, ModelConfig) and not other.lora.rank,
            f"train.entropy_from={source!r} is a run of another kind; give a decoder LM that was trained without lora",
        )
        names = [field.name for field in dataclasses.fields(model) if field.name not in FREE]
        changed = [one for one in names if getattr(theirs, one) != getattr(model, one)]
        if changed:
            ours = ", ".join(f"model.{name}.{one}={getattr(model, one)!r}" for one in changed)
            has = ", ".join(f"{one}={getattr(theirs, one)!r}" for one in changed)
            raise UserError(f"{ours}, but the run of train.entropy_from={source!r} has {has}; use the same values")
        require(
            other.data.tokenizer == config.data.tokenizer,
            f"data.tokenizer={config.data.tokenizer!r}, but the run of train.entropy_from={source!r} has "
            f"{other.data.tokenizer!r}; the entropy model reads the same bytes, so use one tokenizer",
        )
        read[name], step = restore_params(pathlib.Path(source).expanduser(), abstract_params[name], notify=notify)
        notify(f"entropy model from {source}, step {step}")
    return read


def _adapters(other: Config, wanted: dict[str, Any]) -> dict[str, Any]:
    """Shapes of the adapters of a run, on the devices of the parameters that are wanted of it. If its heads are not
    wanted, their adapters are left out."""
    mesh = jax.tree.leaves(wanted)[0].sharding.mesh
    boxed = mtp.abstract(other.arch, adapters=other.lora)["lora"]
    return sharding.abstract_params(mesh, {name: tree for name, tree in boxed.items() if name in wanted})


def _check_same(section: str, old: TrunkConfig | HeadsConfig, new: TrunkConfig | HeadsConfig, source: str) -> None:
    if type(old) is not type(new):
        raise UserError(
            f"{section} is a {type(new).__name__}, but the run of train.init_from={source!r} has a "
            f"{type(old).__name__}; start from a run of the same kind of model"
        )
    free = FREE_OF_HEADS if section == "heads" else FREE
    names = [field.name for field in dataclasses.fields(old) if field.name not in free]
    changed = [
        (name, getattr(old, name), getattr(new, name)) for name in names if getattr(old, name) != getattr(new, name)
    ]
    if changed:
        ours = ", ".join(f"{section}.{name}={after!r}" for name, _, after in changed)
        theirs = ", ".join(f"{section}.{name}={before!r}" for name, before, _ in changed)
        raise UserError(
            f"{ours}, but the run of train.init_from={source!r} has {theirs}; use the same values, or "
            "mtp_jax.start_from, which copies them"
        )
