"""`mtp import`: makes a model directory of ours from a checkpoint, with new heads if wanted."""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Arch, Config, HeadsConfig, MeshConfig, to_json
from mtp_jax.convert import forms
from mtp_jax.convert.adapter_reader import added, tokenizer_of
from mtp_jax.convert.adapters import base_of, is_adapter, open_adapter
from mtp_jax.convert.head_writer import choose_form
from mtp_jax.convert.origin import Origin, keep_origin, origin_of
from mtp_jax.convert.reader import Checkpoint, Notify, open_checkpoint, read_params
from mtp_jax.convert.tokenizer import HubTokenizer, check_size, save_for_training
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.ancestry import ORIGIN, note_start
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.runs.integrity import whole_directory
from mtp_jax.runs.progress import say
from mtp_jax.runs.workdir import CONFIG


class _NoData:
    """The data position of an import, which has read no data."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("an imported model has no data position; train.init_from starts from it")


def import_model(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    heads: HeadsConfig | None = None,
    form: str | None = None,
    head_settings: Mapping[str, Any] | None = None,
    heads_from: str | pathlib.Path | None = None,
    base: str | pathlib.Path | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    mesh: Mesh | None = None,
    notify: Notify = say,
) -> Config:
    """Makes a model directory of ours from a checkpoint; `load`, `mtp generate` and `train.init_from` read it.

    Args:
      source: a Hugging Face directory or hub id, a directory in Meta's layout, a GGUF file, a directory with an adapter
        of PEFT, or `smollm2`.
      out: the directory to make; it must be empty or not exist.
      heads: new heads, instead of those of the checkpoint. The trunk keeps every bit.
      form: adds new heads with the settings of this form of `convert.forms`. Export then writes them in this form.
      head_settings: with `form`: more fields of `HeadsConfig`, such as `num_future`.
      heads_from: a file or directory of trained heads, in a form of `convert.forms`.
      base: the checkpoint that an adapter is added to. None is the one that the adapter names.
      dtype: `float32` or `bfloat16`; None keeps the dtype of the files.
      ignore: patterns of config fields and tensor names to ignore. Export writes the ignored tensors again.
      seed: seed for new heads.
      mesh: devices that hold the parameters; None uses the default mesh.
      notify: is called with lines of text about what was found.

    Returns:
      The config of the model.

    Raises:
      UserError: see `convert.reader.open_checkpoint`. Then no partial directory is left.
    """
    if (heads is not None) + (form is not None) + (heads_from is not None) > 1:
        raise UserError("heads, form and heads_from cannot be combined; give only one of them")
    if 1 in ((head_settings or {}).get("num_future"), heads and heads.num_future):
        raise UserError("num_future=1 is a model without extra heads; leave heads out, or use num_future=2 or more")
    mesh = mesh or sharding.make_mesh(MeshConfig())
    with whole_directory(out) as directory:
        read = functools.partial(open_checkpoint, dtype=dtype, ignore=ignore, heads_from=heads_from, notify=notify)
        checkpoint, arch, params, tokenizer = _read(source, base, read, mesh, notify)
        if form is not None:
            heads = forms.preset(form, arch.model, **(head_settings or {}))
        if heads is not None and heads.draft_vocab:
            raise UserError(
                f"heads.draft_vocab={heads.draft_vocab} needs training text, but an import has none; set it in the run "
                "that trains the heads, with train.init_from and train.init_heads='new'"
            )
        if heads is not None:
            params = {name: tree for name, tree in params.items() if name != "heads"}
            arch = dataclasses.replace(arch, heads=heads)
            sharding.check_mesh(mesh, arch)
            params["heads"] = _fresh_heads(arch, mesh, params, seed)
            came = f" instead of {checkpoint.arch.heads.num_future - 1}" if checkpoint.form else ""
            notify(f"added {heads.num_future - 1} {heads.kind} head(s), untrained{came}")
        place = _save_tokenizer(directory, tokenizer, pathlib.Path(out), notify)
        config = Config.around(arch, place)
        (directory / CONFIG).write_text(to_json(config) + "\n")
        origin = dataclasses.replace(origin_of(checkpoint), wanted=form or "")
        keep_origin(origin, directory / ORIGIN)
        note_start(directory, str(source), has_origin=True, changed=is_adapter(source))
        _warn_of_export(arch, origin, notify)
        with Checkpoints(directory, keep=1, notify=notify) as checkpoints:
            checkpoints.save(0, {"params": params}, _NoData())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    notify(f"{out}: {checkpoint.architecture.model_type}, {count / 1e6:,.1f} million parameters")
    return config


def _read(
    source: str | pathlib.Path,
    base: str | pathlib.Path | None,
    read: Callable[[str | pathlib.Path], Checkpoint],
    mesh: Mesh,
    notify: Notify,
) -> tuple[Checkpoint, Arch, Any, HubTokenizer | None]:
    """A checkpoint with its model, its parameters and its tokenizer. An adapter is added to its base."""
    adapter = open_adapter(source) if is_adapter(source) else None
    if base is not None and adapter is None:
        raise UserError(f"base={str(base)!r} is for an adapter, but {source} is not a directory with one; leave it out")
    checkpoint = read(source if adapter is None else base_of(source, base))
    tokenizer = checkpoint.tokenizer()
    arch = checkpoint.arch
    params = read_params(checkpoint, mesh, notify)
    if adapter is not None:
        arch, params = added(adapter, arch, params, origin_of(checkpoint), keep=False)
        tokenizer = tokenizer_of(adapter, arch, checkpoint.arch, tokenizer)
        notify(f"added the adapter in {source} to {checkpoint.directory}")
    check_size(tokenizer, arch, checkpoint.directory, notify)
    return checkpoint, arch, params, tokenizer


def _fresh_heads(arch: Arch, mesh: Mesh, trunk: Any, seed: int) -> Any:
    """New heads on the mesh, initialised as `heads.init` says."""
    boxed = mtp.abstract(arch)
    shardings = sharding.param_shardings(mesh, boxed)["heads"]

    @functools.partial(jax.jit, out_shardings=shardings)
    def made(trunk: Any) -> Any:
        return mtp.init(arch, jax.random.key(seed), trunk)["heads"]

    return made(trunk)


def _warn_of_export(arch: Arch, origin: Origin, notify: Notify) -> None:
    """Tells the user before training, not after it, if no form of other projects can hold the heads."""
    try:
        choose_form(arch, origin, None)
    except UserError as error:
        notify(f"note for `mtp export`: {error}")


def _save_tokenizer(directory: pathlib.Path, tokenizer: HubTokenizer | None, out: pathlib.Path, notify: Notify) -> str:
    """Writes the tokenizer to the place where training reads it. Returns the value for `data.tokenizer`."""
    if tokenizer is None:
        return "none"
    (directory / "data").mkdir()
    try:
        save_for_training(tokenizer, directory / "data" / "tokenizer.json")
    except UserError as error:
        shutil.rmtree(directory / "data")
        notify(f"training cannot use this tokenizer: {error}")
        return "none"
    return str(out.absolute() / "data" / "tokenizer.json")
