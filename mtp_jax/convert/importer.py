"""`mtp import`: a Hugging Face checkpoint as a directory of ours, with fresh heads if wanted."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.checkpoint import CONFIG, Checkpoints
from mtp_jax.config import Config, HeadsConfig, MeshConfig, to_json
from mtp_jax.convert import forms
from mtp_jax.convert.origin import ORIGIN, keep_origin, origin_of
from mtp_jax.convert.reader import Notify, open_checkpoint, read_params, to_stderr
from mtp_jax.convert.tokenizer import check_size, load_hub_tokenizer
from mtp_jax.data.tokenize import load_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.integrity import whole_directory
from mtp_jax.model import mtp


class _NoData:
    """An import has read no data."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("an imported model has no data position; train.init_from starts from it")


def import_model(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    heads: HeadsConfig | None = None,
    form: tuple[str, dict[str, Any]] | None = None,
    heads_from: str | pathlib.Path | None = None,
    dtype: str | None = None,
    ignore: Sequence[str] = (),
    seed: int = 0,
    mesh: Mesh | None = None,
    notify: Notify = to_stderr,
) -> Config:
    """Makes a model directory of ours from a checkpoint; `load`, `mtp generate` and `train.init_from` take it.

    Args:
      source: a Hugging Face directory or hub id, or one in Meta's layout.
      out: the directory to make; it must not exist, or be empty.
      heads: fresh heads to add, in place of those of the checkpoint; the next-token path keeps every bit.
      form: fresh heads as a form of `convert.forms` needs them: its name, and more settings of `HeadsConfig`.
      heads_from: a file or directory of trained heads, in a form of `convert.forms`.
      dtype: `float32` or `bfloat16`; None keeps that of the files.
      ignore: patterns of config fields and tensor names to leave out of account; such tensors travel along to export.
      seed: of fresh heads.
      mesh: devices to make it on; None takes the default one.
      notify: receives lines about what was found.

    Returns:
      The config of the model.

    Raises:
      UserError: see `convert.reader.open_checkpoint`; nothing half-written is left.
    """
    if (heads is not None) + (form is not None) + (heads_from is not None) > 1:
        raise UserError("fresh heads (heads, form) and heads_from exclude one another; choose one of them")
    with whole_directory(out) as directory:
        checkpoint = open_checkpoint(source, dtype, ignore=ignore, heads_from=heads_from, notify=notify)
        check_size(load_hub_tokenizer(checkpoint.directory), checkpoint.config, checkpoint.directory)
        config, mesh = checkpoint.config, mesh or sharding.make_mesh(MeshConfig())
        params = read_params(checkpoint, mesh, notify)
        if form is not None:
            heads = forms.preset(form[0], config.model, **form[1])
        if heads is not None:
            params = {name: tree for name, tree in params.items() if name != "heads"}
            config = dataclasses.replace(config, heads=heads)
            sharding.check_mesh(mesh, config)
            params["heads"] = _fresh_heads(config, mesh, params, seed)
            notify(f"added {heads.num_future - 1} {heads.kind} heads, untrained")
        place = _save_tokenizer(directory, checkpoint.directory, pathlib.Path(out), notify)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=place))
        (directory / CONFIG).write_text(to_json(config) + "\n")
        keep_origin(origin_of(checkpoint), directory / ORIGIN)
        with Checkpoints(directory, keep=1, notify=notify) as checkpoints:
            checkpoints.save(0, {"params": params}, _NoData())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    notify(f"{out}: {checkpoint.architecture.model_type}, {count / 1e6:,.1f} million parameters")
    return config


def _fresh_heads(config: Config, mesh: Mesh, trunk: Any, seed: int) -> Any:
    """Heads as `heads.init` says, on the mesh."""
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config, jax.random.key(0)))
    shardings = sharding.param_shardings(mesh, boxed)["heads"]

    @functools.partial(jax.jit, out_shardings=shardings)
    def made(trunk: Any) -> Any:
        return mtp.init(config, jax.random.key(seed), trunk)["heads"]

    return made(trunk)


def _save_tokenizer(directory: pathlib.Path, source: pathlib.Path, out: pathlib.Path, notify: Notify) -> str:
    """Keeps the tokenizer where training looks for it; returns what `data.tokenizer` is to be."""
    if not (source / "tokenizer.json").is_file():
        return "none"
    try:
        tokenizer = load_tokenizer(source)
    except UserError as error:
        notify(f"training needs another tokenizer: {error}")
        return "none"
    (directory / "data").mkdir()
    tokenizer.save(directory / "data" / "tokenizer.json")
    return str(out.absolute() / "data" / "tokenizer.json")
