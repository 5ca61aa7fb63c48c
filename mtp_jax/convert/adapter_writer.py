"""`mtp export --adapter`: writes the adapters of a run in the layout of PEFT, without the weights that stood still."""

import dataclasses
import functools
import json
import pathlib
from typing import Any, NamedTuple

import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Config, MeshConfig
from mtp_jax.config.lora import adapted
from mtp_jax.convert import mapping
from mtp_jax.convert.adapter_reader import EMBED, base_digest
from mtp_jax.convert.adapters import CONFIG_NAME, PREFIX, RECORD, SIDES, TENSORS, entry_of, pieces_of
from mtp_jax.convert.files import Entry, write_file
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.mapping import Piece
from mtp_jax.convert.origin import Origin, read_origin
from mtp_jax.convert.reader import Notify
from mtp_jax.convert.tokenizer import load_run_tokenizer, save_for_transformers
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.ancestry import imported_from, origin_folder
from mtp_jax.runs.checkpoint import restore_params
from mtp_jax.runs.integrity import whole_directory
from mtp_jax.runs.progress import say
from mtp_jax.training.start import config_of
from mtp_jax.trees import by_path


class _Run(NamedTuple):
    """The run that is exported."""

    config: Config
    entry: Architecture
    origin: Origin | None
    params: Any
    groups: dict[str, list[Piece]]
    """Pieces of the trunk by tensor."""

    @property
    def adapted(self) -> dict[str, list[Piece]]:
        """The pieces that have an adapter, by module."""
        paths = adapted(self.config.lora, self.config.model, self.config.heads)
        found = {name: [piece for piece in group if piece.path in paths] for name, group in self.groups.items()}
        return {name.removesuffix(".weight"): group for name, group in found.items() if group}

    @property
    def trained(self) -> list[str]:
        """Modules of the trunk that were trained as a whole."""
        learned = [name for name, group in self.groups.items() if any(map(self._learns, group))]
        return list(dict.fromkeys(name.rpartition(".")[0] for name in learned))

    def _learns(self, piece: Piece) -> bool:
        return self.config.train.learns(piece.path)


def export_adapter(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    base: str | None = None,
    notify: Notify = say,
) -> None:
    """Writes the adapters of a run as a directory that PEFT loads on the run's base.

    Parameters of the model that the run has trained without an adapter, such as the embedding, are in it as
    `modules_to_save`. Heads and their adapters are not in it.

    Args:
      source: the workdir of a run with `lora`.
      out: the directory to make; it must be empty or not exist.
      base: name or directory of the base, for `base_model_name_or_path`. None is the checkpoint that was imported, if
        no run has changed it, or else the run that this one started from.
      notify: is called with lines of text about what was written.

    Raises:
      UserError: the run has no adapters of the model, or PEFT's layout cannot hold what it has trained.
    """
    workdir = pathlib.Path(source)
    run = _open(workdir, notify)
    config = run.config
    modules = run.adapted
    if not modules:
        raise UserError(
            f"{source} has adapters only in heads, which PEFT's layout cannot hold (lora.targets="
            f"{config.lora.targets!r}); use --merge, which writes the heads too"
        )
    both = [name for name in run.trained if name in modules]
    if both:
        raise UserError(
            f"train.trainable={config.train.trainable!r} has trained parts of {both[0]} without its adapter, and the "
            "layout of PEFT cannot hold both; use --merge"
        )
    named = base or _base_of(workdir, config, notify)
    with whole_directory(out) as directory:
        if run.origin is not None:
            run.origin.layout.copy_sidecars(directory)
        elif config.data.tokenizer != "none":
            save_for_transformers(load_run_tokenizer(workdir / "data", None, True), directory)
        write_file(directory / TENSORS[0], [*_factors(run, modules), *_whole(run)])
        fields = json.dumps(_fields(run, modules, named), indent=2)
        (directory / CONFIG_NAME).write_text(fields + "\n")
        paths = sorted(path for path in by_path(mtp.trunk_params(run.params)) if not config.train.learns(path))
        record = {"version": 1, "base": named, "digest": base_digest(run.params, paths), "paths": paths}
        (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    heads = "; the heads are not in it, `mtp export --merge` writes them" if config.heads.num_future > 1 else ""
    notify(f"{out}: an adapter of rank {config.lora.rank} for {named}, {len(modules)} modules{heads}")


def _open(workdir: pathlib.Path, notify: Notify) -> _Run:
    """Reads the parameters of the trunk and of its adapters."""
    config = config_of(workdir, "export_adapter")
    if not config.lora.rank:
        raise UserError(f"{workdir} was trained without adapters (lora.rank=0); leave --adapter out")
    folder = origin_folder(workdir, config)
    origin = None if folder is None else read_origin(folder)
    entry, _ = entry_of(config.arch, origin)
    boxed = mtp.abstract(config.arch, adapters=config.lora)
    wanted = sharding.abstract_params(sharding.make_mesh(MeshConfig()), boxed)
    wanted = {name: tree for name, tree in wanted.items() if name not in mtp.OF_HEADS}
    params, _ = restore_params(workdir, wanted, notify=notify)
    return _Run(config, entry, origin, params, pieces_of(entry, config.arch, params))


def _base_of(workdir: pathlib.Path, config: Config, notify: Notify) -> str:
    """The checkpoint that was imported, if no run has changed the trunk since; else the run that this one started from.

    Raises:
      UserError: the run did not start from a model.
    """
    if not config.train.init_from:
        raise UserError(
            f"{workdir} started from random parameters, so nobody else has the base of its adapter; use --merge, or "
            "give the name of the base (--base)"
        )
    first = pathlib.Path(config.train.init_from).expanduser()
    current = first
    while (current / "config.json").is_file():
        source = config_of(current)
        named = None if source.train.init_from else imported_from(current)
        if named is not None:
            return named
        if not source.train.heads_only or not source.train.init_from:
            break
        current = pathlib.Path(source.train.init_from).expanduser()
    notify(f"the base of the adapter is {first}; write it with `mtp export` for PEFT, and name it with --base")
    return str(first)


def _factors(run: _Run, modules: dict[str, list[Piece]]) -> list[Entry]:
    """A and B of every module. A fused module has those of its parts next to each other: its rank is their sum."""
    leaves = by_path(run.params["lora"])
    R = run.config.lora.rank
    entries = []
    for module, group in modules.items():
        name = f"{module}.weight"
        outer, inner = mapping.tensor_shapes(run.groups[name])[name]
        rank = R * len(group)
        a_of = functools.partial(_made_a, leaves, group)
        b_of = functools.partial(_made_b, leaves, group, (outer, rank))
        for side, shape, make in zip(SIDES, ((rank, inner), (outer, rank)), (a_of, b_of), strict=True):
            entries.append(Entry(PREFIX + module + side, shape, np.dtype(np.float32), make))
    return entries


def _made_a(leaves: dict[str, Any], group: list[Piece]) -> np.ndarray:
    return np.concatenate([np.asarray(leaves[f"{piece.path}/a"][piece.at]).T for piece in group])


def _made_b(leaves: dict[str, Any], group: list[Piece], shape: tuple[int, int]) -> np.ndarray:
    whole_OR = np.zeros(shape, np.float32)
    R = shape[1] // len(group)
    for i, piece in enumerate(group):
        rows = slice(None) if piece.rows is None else piece.rows
        whole_OR[rows, i * R : (i + 1) * R] = np.asarray(leaves[f"{piece.path}/b"][piece.at]).T
    return whole_OR


def _whole(run: _Run) -> list[Entry]:
    """The tensors of the modules that were trained as a whole."""
    pieces = [piece for name, group in run.groups.items() if name.rpartition(".")[0] in run.trained for piece in group]
    dtype = np.dtype(run.config.model.param_dtype)
    entries = mapping.entries(pieces, mtp.trunk_params(run.params), lambda name: dtype)
    # PEFT copies the module that it trains, so a tied unembedding needs a second copy.
    tied = [one for one in entries if one.name == run.entry.embed and run.config.model.tie_embeddings]
    copies = [dataclasses.replace(one, name=run.entry.unembed) for one in tied]
    return [dataclasses.replace(one, name=PREFIX + one.name) for one in entries + copies]


def _fields(run: _Run, modules: dict[str, list[Piece]], base: str) -> dict[str, Any]:
    """The fields of adapter_config.json."""
    lora = run.config.lora
    saved = list(run.trained)
    if run.config.model.tie_embeddings and run.config.train.learns(EMBED):
        saved.append(run.entry.unembed.removesuffix(".weight"))
    fused = {_suffix(module, run.groups, modules): len(group) for module, group in modules.items() if len(group) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": _whole_number(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": sorted({_suffix(module, run.groups, modules) for module in modules}),
        "rank_pattern": {name: lora.rank * count for name, count in fused.items()},
        "alpha_pattern": {name: _whole_number(lora.alpha * count) for name, count in fused.items()},
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _whole_number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _suffix(module: str, groups: dict[str, list[Piece]], adapted: Any = ()) -> str:
    """The shortest end of a module's name that no module without an adapter has."""
    others = [name.removesuffix(".weight") for name in groups if name.removesuffix(".weight") not in adapted]
    parts = module.split(".")
    ends = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
    return next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
