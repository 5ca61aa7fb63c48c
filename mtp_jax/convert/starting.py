"""Makes configs of runs that start from the model of another run, or from a model with a short name."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from mtp_jax.config import Config, LoraConfig, OptimConfig, TrainConfig, override
from mtp_jax.convert import fetch
from mtp_jax.runs.progress import say
from mtp_jax.training.start import config_of

Notify = Callable[[str], None]


def start_from(source: str | pathlib.Path, **sections: dict[str, Any]) -> Config:
    """The config of a run that starts from the model of another run, or of an import.

    Model, tokenizer and heads are those of the source, so only new settings must be given:

        config = mtp_jax.start_from(
            "runs/qwen", data={"source": "my/text/*.txt", "seq_len": 512}, train={"steps": 2000, "trainable": "heads"}
        )

    Args:
      source: the workdir of `mtp train` or `mtp import`, or `smollm2`.
      sections: fields that differ from the source, by section. New heads (`heads=...`) start as `heads.init` says.
        Without an `optim` section, the learning rate is 1e-4 if only heads are trained and 1e-5 for the whole model,
        constant after warm-up, without weight decay. These values are low, so that training does not damage the model.

    Raises:
      UserError: there is no such directory, a section or field is unknown, or the schema refuses a value.
    """
    directory = run_of(source, say).expanduser().absolute()
    start = config_of(directory, "start_from")
    tokenizer = directory / "data" / "tokenizer.json"
    heads_only = TrainConfig(trainable=sections.get("train", {}).get("trainable", "all")).heads_only
    settled = {
        # The template is next to the tokenizer, so it needs no setting.
        "data": {"tokenizer": str(tokenizer) if tokenizer.is_file() else "none", "chat_template": ""},
        "train": {"init_from": str(directory), "init_heads": "new" if "heads" in sections else "same"},
        "optim": {"learning_rate": 1e-4 if heads_only else 1e-5, "schedule": "constant", "weight_decay": 0.0},
    }
    if start.heads.num_future == 1 and "heads" not in sections:
        settled["train"]["init_heads"] = "new"
    fresh = dataclasses.replace(start, optim=OptimConfig(), train=TrainConfig(), lora=LoraConfig())
    changes = {name: settled.get(name, {}) | sections.get(name, {}) for name in (*settled, *sections)}
    flat = {f"{section}.{field}": value for section, fields in changes.items() for field, value in fields.items()}
    return override(fresh, flat)


def with_run(config: Config, notify: Notify) -> Config:
    """The config with paths in the place of the short name of a model: the directory of its run in `train.init_from`,
    and the file of its tokenizer in `data.tokenizer`."""
    changes = {}
    if fetch.is_named(config.train.init_from):
        changes["train.init_from"] = str(run_of(config.train.init_from, notify))
    if fetch.is_named(config.data.tokenizer):
        changes["data.tokenizer"] = str(run_of(config.data.tokenizer, notify) / "data" / "tokenizer.json")
    return override(config, changes) if changes else config


def run_of(source: str | pathlib.Path, notify: Notify) -> pathlib.Path:
    """The directory of a source. A model with a short name is imported into the cache the first time."""
    if not fetch.is_named(source):
        return pathlib.Path(source)
    name = str(source)
    file = fetch.model(name, notify)
    with fetch.locked(name, notify) as folder:
        run = folder / "run"
        if not (run / "config.json").is_file():
            from mtp_jax.convert.importer import import_model

            notify(f"{name}: importing it into {run}, so that training can start from it")
            import_model(file, run, notify=notify)
    return run
