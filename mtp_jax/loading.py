"""Loads a model for inference: `load(SOURCE)`."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Arch, Config, MeshConfig, from_json
from mtp_jax.errors import UserError
from mtp_jax.model import lora, mtp
from mtp_jax.model.token_rows import token_rows
from mtp_jax.runs.ancestry import origin_folder
from mtp_jax.runs.programs import bounded
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference."""

    config: Config
    params: Any = dataclasses.field(repr=False)
    """Parameters stacked over layers, in the dtype in which they were loaded. None for a model that only decodes."""
    tokenizer: Any
    """Has `encode_prompt(text)`, `encode_chat(messages)`, `decode(ids)`, `bos_id`, `eos_id` and `end_ids`. None if the
    model was trained on token files."""
    mesh: Mesh
    """The devices that hold the parameters."""
    origin: Any = dataclasses.field(default=None, repr=False)
    """The Hugging Face checkpoint that the model comes from, for export. None if there is none."""
    decode_view: Any = dataclasses.field(default=None, repr=False)
    """The parameters of a model that only decodes. It has them in place of `params`. None for any other model."""

    @property
    def arch(self) -> Arch:
        """The sections of the config that describe the model and its heads."""
        return self.config.arch

    @property
    def trained_further(self) -> bool:
        """Whether one of our runs trained the model further, so that its parameters differ from those of `origin`."""
        return bool(self.config.train.init_from)

    @property
    def answers_in_one_pass(self) -> bool:
        """Whether it was trained with `loss.teacherless`: it answers in one pass and cannot continue a text."""
        return self.config.loss.teacherless >= 0

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """Float32 logits of every head at every position, [M, B, T, V], for inspection.

        Args:
          tokens_BT: token ids; every row is one document.
        """
        rows_BT = token_rows("logits", tokens_BT, self.arch.model.vocab_size)
        return _logits(self.arch, self.stacked_params(), jax.device_put(rows_BT))

    def stacked_params(self) -> Any:
        """`params`.

        Raises:
          UserError: the model was loaded for decoding only, or `give_up_params` has taken its parameters.
        """
        leaves = jax.tree.leaves(self.params)
        if self.params is None or any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise UserError(
                "this model has no stacked parameters: it was loaded with decode_only=True, or `give_up_params` took "
                "them; load it again without these"
            )
        return self.params

    @functools.cached_property
    def decode_params(self) -> Any:
        """The unstacked parameters that the decoding engine uses. They are made when they are first needed."""
        return self.decode_view if self.params is None else _decode_view(self.arch, self.stacked_params())

    def with_chat_template(self, setting: str) -> "LoadedModel":
        """The same model with another chat template.

        Args:
          setting: `plain`, the path of a Jinja template, or a directory with a tokenizer that has one.

        Raises:
          UserError: there is no such template, or the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so it cannot use a chat template; give it token ids")
        other = dataclasses.replace(self, tokenizer=self.tokenizer.with_chat(setting))
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name == "decode_params"})
        return other

    def give_up_params(self) -> "LoadedModel":
        """Turns the model into one that only decodes, so that its parameters are in memory once and not twice.

        Each array of `params` is deleted when the new model has its contents. Do not use the old model afterwards:
        write `lm = lm.give_up_params()`. Whatever needs stacked parameters (`logits`, evaluation, export, heads from a
        file) then raises a UserError.

        Returns:
          A model without `params`. If the model has no `params` already, the model itself.
        """
        if self.params is None:
            return self
        view = self.__dict__.get("decode_params")  # set if `decode_params` was used before
        if view is None:
            view = _taken_apart(self.arch, self.stacked_params(), self.mesh)
        else:
            shared = {id(leaf) for leaf in jax.tree.leaves(view)}
            for leaf in jax.tree.leaves(self.stacked_params()):
                if isinstance(leaf, jax.Array) and id(leaf) not in shared:
                    leaf.delete()
        return dataclasses.replace(self, params=None, decode_view=view)


def _taken_apart(arch: Arch, params: Any, mesh: Mesh) -> Any:
    """`mtp.decode_view` of parameters. Each array is deleted as soon as the view has its contents."""
    uses = collections.Counter(id(leaf) for leaf in jax.tree.leaves(params))

    def give_up(change: Callable[[jax.Array], Any], leaf: jax.Array) -> Any:
        result = jax.block_until_ready(jax.jit(change)(leaf))
        if isinstance(leaf, jax.Array) and uses[id(leaf)] < 2:
            leaf.delete()
        return result

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        made_here = jax.tree_util.DictKey("constants") in path
        return jax.device_put(leaf, sharding.replicated(mesh)) if made_here else leaf

    return jax.tree_util.tree_map_with_path(place, mtp.decode_view(arch, params, give_up))


_decode_view = bounded(statics=(0,))(mtp.decode_view)


@bounded(statics=(0,), weights=1)
def _logits(arch: Arch, params: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_MBTD = mtp.apply(arch, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), everywhere=True)
    return mtp.logits(arch, params, hidden_MBTD)


def load(
    source: str | pathlib.Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    notify: Callable[[str], None] = say,
    *,
    ignore: Sequence[str] = (),
    heads_from: str | pathlib.Path | None = None,
    shipped_heads: bool = False,
    decode_only: bool = False,
    base: str | pathlib.Path | None = None,
) -> LoadedModel:
    """Loads a model from a workdir, a Hugging Face directory, a GGUF file or an adapter.

    Args:
      source: the workdir of `mtp train`, `mtp rl`, `mtp quickstart` or `mtp import`, or WORKDIR@STEP for another
        checkpoint that a run keeps; a Hugging Face directory or hub id; a GGUF file; a directory with an adapter of
        PEFT; or `smollm2`, which is SmolLM2-135M-Instruct and is fetched the first time.
      dtype: `float32` or `bfloat16`, for parameters and activations. None keeps the dtypes of the config or the files.
      mesh: devices for the parameters, which are placed by the table in `sharding`. None is the default device.
      notify: function that receives a line for each broken checkpoint that is skipped, and for anything unusual in a
        Hugging Face checkpoint. By default the lines go to standard error.
      ignore: patterns of config fields and tensor names to ignore in a Hugging Face checkpoint.
      heads_from: file or directory of heads (Medusa, EAGLE, CAFT) for a Hugging Face checkpoint.
      shipped_heads: whether `smollm2` gets the heads that come with the package (`mtp_jax/shipped`).
      decode_only: whether the model is used only for decoding. Its parameters are then in memory once, in the form that
        decoding uses. It has no `logits` and cannot be evaluated or exported.
      base: the model that an adapter is added to, as another source. None is the one that the adapter names.

    Raises:
      UserError: the model does not exist, has no complete checkpoint, or is refused by
        `convert.reader.open_checkpoint`; or the dtype is unknown.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}; use 'float32', 'bfloat16', or None for the config's own")
    mesh = mesh or sharding.make_mesh(MeshConfig())
    own_base = base_of_adapter(source, base)
    if own_base is not None:
        from mtp_jax.convert.adapter_reader import with_adapter

        options = {"ignore": ignore, "heads_from": heads_from, "shipped_heads": shipped_heads}
        lm = with_adapter(load(own_base, dtype, mesh, notify, **options), source, keep=False)
        return lm.give_up_params() if decode_only else lm
    workdir, step = split_step(source)
    if is_run(workdir):
        if ignore or heads_from is not None:
            raise UserError(
                f"{source} is a run of mtp_jax; ignore and heads_from are for Hugging Face checkpoints, leave them out"
            )
        lm = _load_run(workdir, step, dtype, mesh, notify)
    else:
        lm = _load_checkpoint(source, dtype, mesh, notify, ignore, heads_from)
        if shipped_heads and not ignore and heads_from is None:
            from mtp_jax.convert.heads_file import with_shipped

            lm = with_shipped(lm, source, notify)
    return lm.give_up_params() if decode_only else lm


def base_of_adapter(source: str | pathlib.Path, base: str | pathlib.Path | None) -> str | pathlib.Path | None:
    """The base of a source that is an adapter; None for a source of another kind."""
    from mtp_jax.convert.adapters import base_of, is_adapter

    if is_adapter(source):
        return base_of(source, base)
    if base is not None:
        raise UserError(f"base={str(base)!r} is for an adapter, but {source} is not a directory with one; leave it out")
    return None


def is_run(directory: pathlib.Path) -> bool:
    """Whether a directory is a run of mtp_jax, and not a Hugging Face checkpoint."""
    from mtp_jax.convert.reader import is_checkpoint

    return directory.is_dir() and not is_checkpoint(directory)


def split_step(source: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The directory and the step of `WORKDIR@STEP`. Any other source is its own directory, and has no step."""
    workdir, at, step = str(source).rpartition("@")
    named = bool(at) and step.isascii() and step.isdigit() and not pathlib.Path(source).exists()
    return (
        (pathlib.Path(workdir), int(step)) if named and is_run(pathlib.Path(workdir)) else (pathlib.Path(source), None)
    )


def _load_checkpoint(
    source: str | pathlib.Path,
    dtype: str | None,
    mesh: Mesh,
    notify: Callable[[str], None],
    ignore: Sequence[str],
    heads_from: str | pathlib.Path | None,
) -> LoadedModel:
    from mtp_jax.convert.origin import origin_of
    from mtp_jax.convert.reader import open_checkpoint, read_params
    from mtp_jax.convert.tokenizer import check_size

    checkpoint = open_checkpoint(source, dtype, ignore=ignore, heads_from=heads_from, notify=notify)
    tokenizer = checkpoint.tokenizer()
    check_size(tokenizer, checkpoint.arch, checkpoint.directory, notify)
    config = Config.around(checkpoint.arch, str(checkpoint.directory))
    return LoadedModel(config, read_params(checkpoint, mesh, notify), tokenizer, mesh, origin_of(checkpoint))


def _load_run(
    workdir: pathlib.Path, step: int | None, dtype: str | None, mesh: Mesh, notify: Callable[[str], None]
) -> LoadedModel:
    # Imported here, because checkpointing and tokenizers are slow to import and `import mtp_jax` shall be fast.
    from mtp_jax.convert.tokenizer import check_size, load_run_tokenizer
    from mtp_jax.runs.checkpoint import restore_params

    config = _read_config(workdir)
    if dtype is not None:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    boxed = mtp.abstract(config.arch, token_order=config.has_token_order, adapters=config.lora)
    sharding.check_mesh(mesh, config.arch)
    params, _ = restore_params(workdir, sharding.abstract_params(mesh, boxed), step, notify=notify)
    params = lora.merge(params, config.lora)
    origin = _origin(workdir, config)
    data = workdir / "data"
    trained = bool(config.train.init_from)
    tokenizer = load_run_tokenizer(data, origin.directory if origin is not None else None, trained)
    if tokenizer is None and config.data.tokenizer != "none":
        raise UserError(f"{data / 'tokenizer.json'} is missing; `mtp train` on this run makes it again")
    check_size(tokenizer, config.arch, workdir, notify)
    return LoadedModel(config, params, tokenizer, mesh, origin)


def _read_config(workdir: pathlib.Path) -> Config:
    from mtp_jax.convert.reader import check_kind

    path = workdir / "config.json"
    if not path.is_file():
        check_kind(workdir)
        raise UserError(
            f"{workdir} has no config.json; give the workdir of `mtp train`, `mtp quickstart` or `mtp import`, or a "
            "Hugging Face directory"
        )
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _origin(workdir: pathlib.Path, config: Config) -> Any:
    """The checkpoint that the run, or the run that it started from, was imported from. None if it was not imported."""
    from mtp_jax.convert.origin import read_origin

    folder = origin_folder(workdir, config)
    return None if folder is None else read_origin(folder)
