"""Loads a model for inference: `load(SOURCE)`."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Arch, Config, MeshConfig, from_json
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.ancestry import origin_folder
from mtp_jax.runs.programs import bounded
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference."""

    config: Config
    params: Any = dataclasses.field(repr=False)
    """Parameters stacked over layers, in the dtype they were loaded as; None of a model for decoding alone."""
    tokenizer: Any
    """`encode_prompt(text)`, `encode_chat(messages)`, `decode(ids)`, `bos_id`, `eos_id`, `end_ids`; None where the
    model was trained on token files."""
    mesh: Mesh
    """Where the parameters lie."""
    origin: Any = dataclasses.field(default=None, repr=False)
    """The Hugging Face checkpoint that it was, for export; None where there was none."""
    decode_view: Any = dataclasses.field(default=None, repr=False)
    """What a model for decoding alone has in the place of `params`; None of any other."""

    @property
    def arch(self) -> Arch:
        """The model and its heads, as decoding and export know them."""
        return self.config.arch

    @property
    def trained_further(self) -> bool:
        """Whether a run of ours trained it from another model: its parameters are not those of `origin` any more."""
        return bool(self.config.train.init_from)

    @property
    def answers_in_one_pass(self) -> bool:
        """Whether it was trained to answer over dummies (`loss.teacherless`), and so continues no text."""
        return self.config.loss.teacherless >= 0

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """Float32 logits of every head at every position, [M, B, T, V], for inspection.

        Args:
          tokens_BT: token ids; every row is one document.
        """
        try:
            tokens_BT = np.asarray(tokens_BT)
        except (ValueError, OverflowError) as error:
            raise UserError(f"logits needs token ids in rows of one length: {error}") from error
        vocab = self.arch.model.vocab_size
        if tokens_BT.ndim != 2 or not tokens_BT.size:
            raise UserError(f"logits needs token ids of shape [batch, time], not {tokens_BT.shape}")
        if not np.issubdtype(tokens_BT.dtype, np.integer):
            raise UserError(f"logits needs whole numbers as token ids, not {tokens_BT.dtype}")
        if tokens_BT.min() < 0 or tokens_BT.max() >= vocab:
            raise UserError(
                f"logits got token ids {tokens_BT.min()}..{tokens_BT.max()}; the vocabulary is 0..{vocab - 1}"
            )
        return _logits(self.arch, self.stacked_params(), jax.device_put(tokens_BT.astype(np.int32)))

    def stacked_params(self) -> Any:
        """`params`.

        Raises:
          UserError: a model for decoding alone, or one that gave its parameters up.
        """
        leaves = jax.tree.leaves(self.params)
        if self.params is None or any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise UserError(
                "this model has no stacked parameters: it was loaded with decode_only=True, or `give_up_params` took "
                "them; load it anew without"
            )
        return self.params

    @functools.cached_property
    def decode_params(self) -> Any:
        """The unstacked view that the decoding engine runs on, made at first use."""
        return self.decode_view if self.params is None else _decode_view(self.arch, self.stacked_params())

    def with_chat_template(self, setting: str) -> "LoadedModel":
        """The same model with another chat template.

        Args:
          setting: `plain`, the path of a Jinja template, or a directory with a tokenizer that has one.

        Raises:
          UserError: no such template, or a model without a tokenizer.
        """
        if self.tokenizer is None:
            raise UserError("this model has no tokenizer, so a chat template has nothing to write for")
        other = dataclasses.replace(self, tokenizer=self.tokenizer.with_chat(setting))
        other.__dict__.update({name: value for name, value in self.__dict__.items() if name == "decode_params"})
        return other

    def give_up_params(self) -> "LoadedModel":
        """The same model for decoding alone, made of this one's arrays: the model is in memory once, not twice.

        The arrays of `params` are deleted one by one as the other model takes their contents over. Do not use this
        model afterwards: put the other in its place, as in `lm = lm.give_up_params()`. What needs stacked parameters
        (`logits`, evaluation, export, heads from a file) then raises a UserError.

        Returns:
          A model without `params`; a model that has none already returns itself.
        """
        if self.params is None:
            return self
        made = self.__dict__.get("decode_params")  # at an earlier use, where there was one
        view = _taken_apart(self.arch, self.stacked_params(), self.mesh) if made is None else made
        return dataclasses.replace(self, params=None, decode_view=view)


def _taken_apart(arch: Arch, params: Any, mesh: Mesh) -> Any:
    """`mtp.decode_view` of parameters whose arrays are deleted as soon as the view holds their contents."""
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
) -> LoadedModel:
    """Loads a model from a directory of ours, or as it is from a Hugging Face directory or a GGUF file.

    Args:
      source: the workdir of `mtp train`, `mtp quickstart` or `mtp import`; a Hugging Face directory or hub id; a GGUF
        file; or `smollm2`, SmolLM2-135M-Instruct, which is fetched the first time.
      dtype: `float32` or `bfloat16` for parameters and activations; None keeps what the config or the files say.
      mesh: devices to place the parameters on, by the table in `sharding`; None takes the default device.
      notify: receives a line for every broken checkpoint that was passed over, and about what is unusual in a Hugging
        Face checkpoint; standard error by default.
      ignore: of a Hugging Face checkpoint: patterns of config fields and tensor names to leave out of account.
      heads_from: of a Hugging Face checkpoint: a file or directory of heads for it (Medusa, EAGLE, CAFT).
      shipped_heads: whether `smollm2` gets the heads that the package holds for it (`mtp_jax/shipped`).
      decode_only: whether the model shall only decode. Its parameters are then in memory once, in the form that
        decoding runs on, and it has no `logits` and cannot be evaluated or exported.

    Raises:
      UserError: no such model, no whole checkpoint, an unknown dtype, or what `convert.reader.open_checkpoint` refuses.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}; use 'float32', 'bfloat16', or None for the config's own")
    mesh = mesh or sharding.make_mesh(MeshConfig())
    if is_run(pathlib.Path(source)):
        if ignore or heads_from is not None:
            raise UserError(f"{source} is a run of ours; ignore and heads_from belong to Hugging Face checkpoints")
        lm = _load_run(pathlib.Path(source), dtype, mesh, notify)
    else:
        lm = _load_checkpoint(source, dtype, mesh, notify, ignore, heads_from)
        if shipped_heads and not ignore and heads_from is None:
            from mtp_jax.convert.heads_file import with_shipped

            lm = with_shipped(lm, source, notify)
    return lm.give_up_params() if decode_only else lm


def is_run(directory: pathlib.Path) -> bool:
    """Whether a directory is read as a run of ours, and not as a Hugging Face checkpoint."""
    from mtp_jax.convert.reader import is_checkpoint

    return directory.is_dir() and not is_checkpoint(directory)


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


def _load_run(workdir: pathlib.Path, dtype: str | None, mesh: Mesh, notify: Callable[[str], None]) -> LoadedModel:
    # Checkpointing and tokenizers are slow to import; `import mtp_jax` stays free of them.
    from mtp_jax.convert.tokenizer import check_size, load_run_tokenizer
    from mtp_jax.runs.checkpoint import restore_params

    config = _read_config(workdir)
    if dtype is not None:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    token_order = config.has_token_order
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config.arch, jax.random.key(0), token_order=token_order))
    sharding.check_mesh(mesh, config.arch)
    params, _ = restore_params(workdir, sharding.abstract_params(mesh, boxed), notify=notify)
    origin = _origin(workdir, config)
    data = workdir / "data"
    trained = bool(config.train.init_from)
    tokenizer = load_run_tokenizer(data, origin.directory if origin is not None else None, trained)
    if tokenizer is None and config.data.tokenizer != "none":
        raise UserError(f"{data / 'tokenizer.json'} is missing; `mtp train` on this run makes it anew")
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
    """What the model, or the one that its training started from, was before it was imported; None if nothing."""
    from mtp_jax.convert.origin import read_origin

    folder = origin_folder(workdir, config)
    return None if folder is None else read_origin(folder)
