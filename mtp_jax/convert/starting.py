"""Makes configs of runs that start from the model of another run, or from a checkpoint, which is imported first."""

import dataclasses
import hashlib
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

from mtp_jax.config import Config, LoraConfig, OptimConfig, RLConfig, TrainConfig, override
from mtp_jax.convert import fetch
from mtp_jax.convert.adapters import is_adapter
from mtp_jax.convert.layouts import recognised
from mtp_jax.errors import UserError
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
      source: the workdir of `mtp train` or `mtp import`, a Hugging Face directory, a GGUF file, a directory with an
        adapter of PEFT, or `smollm2`. A source that is not a run is imported into the cache the first time.
      sections: fields that differ from the source, by section. New heads (`heads=...`) start as `heads.init` says. With
        adapters (`lora=...`), they alone are trained, unless `train` says otherwise. Without an `optim` section, the
        learning rate is 1e-4 if only heads or adapters are trained and 1e-5 for the whole model, constant after
        warm-up, without weight decay. These values are low, so that training does not damage the model.

    Raises:
      UserError: there is no such directory, a section or field is unknown, or the schema refuses a value.
    """
    directory = run_of(source, say).expanduser().absolute()
    start = config_of(directory, "start_from")
    tokenizer = directory / "data" / "tokenizer.json"
    adapters = sections.get("lora", {}).get("rank", 0) > 0
    trainable = sections.get("train", {}).get("trainable", "lora" if adapters else "all")
    gentle = 1e-4 if adapters or TrainConfig(trainable=trainable).heads_only else 1e-5
    settled = {
        # The template is next to the tokenizer, so it needs no setting.
        "data": {"tokenizer": str(tokenizer) if tokenizer.is_file() else "none", "chat_template": ""},
        "train": {
            "init_from": str(directory),
            "init_heads": "new" if "heads" in sections else "same",
            "trainable": trainable,
        },
        "optim": {"learning_rate": gentle, "schedule": "constant", "weight_decay": 0.0},
    }
    if start.heads.num_future == 1 and "heads" not in sections:
        settled["train"]["init_heads"] = "new"
    fresh = dataclasses.replace(start, optim=OptimConfig(), train=TrainConfig(), lora=LoraConfig(), rl=RLConfig())
    changes = {name: settled.get(name, {}) | sections.get(name, {}) for name in (*settled, *sections)}
    flat = {f"{section}.{field}": value for section, fields in changes.items() for field, value in fields.items()}
    return override(fresh, flat)


def with_run(config: Config, notify: Notify) -> Config:
    """The config with paths in the place of the short name of a model or of a checkpoint: the directory of its run in
    `train.init_from`, and for a short name the file of its tokenizer in `data.tokenizer`."""
    changes = {}
    if fetch.is_named(config.train.init_from) or _is_checkpoint(config.train.init_from):
        changes["train.init_from"] = str(run_of(config.train.init_from, notify))
    if fetch.is_named(config.data.tokenizer):
        changes["data.tokenizer"] = str(run_of(config.data.tokenizer, notify) / "data" / "tokenizer.json")
    return override(config, changes) if changes else config


def run_of(source: str | pathlib.Path, notify: Notify) -> pathlib.Path:
    """The directory of a source as a run. A checkpoint, or a model with a short name, is imported into the cache the
    first time, and again if this version cannot read the config that another one wrote."""
    if fetch.is_named(source):
        name = str(source)
        file = fetch.model(name, notify)
    elif _is_checkpoint(source):
        file = pathlib.Path(source).expanduser().absolute()
        name = f"imports/{file.name}-{_stamp(file)}"
    else:
        return pathlib.Path(source)
    with fetch.locked(name, notify) as folder:
        run = folder / "run"
        _remove_unreadable(run, str(source), notify)
        if not (run / "config.json").is_file():
            from mtp_jax.convert.importer import import_model

            notify(f"{source}: importing it into {run}, so that training can start from it")
            import_model(file, run, notify=notify)
    return run


def _remove_unreadable(run: pathlib.Path, source: str, notify: Notify) -> None:
    """Removes an import from the cache if this version cannot read its config."""
    if not (run / "config.json").is_file():
        return
    try:
        config_of(run, source)
    except UserError as error:
        notify(f"{source}: its import in the cache, by another version, cannot be read ({error}); it is made again")
        # The directory goes in one step, so that a kill leaves no half of it.
        with tempfile.TemporaryDirectory(dir=run.parent, prefix=fetch.SCRATCH) as scratch:
            run.rename(pathlib.Path(scratch) / "run")


def _is_checkpoint(source: str | pathlib.Path) -> bool:
    """Whether a source is a checkpoint of another project, or an adapter, on this disk."""
    path = pathlib.Path(source).expanduser()
    return bool(str(source)) and path.exists() and (recognised(path) is not None or is_adapter(path))


def _stamp(path: pathlib.Path) -> str:
    """A short name for the files of a checkpoint, from their names, sizes and times."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest()
