"""Loads a trained model for inference: `load(SOURCE)`."""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Config, MeshConfig, from_json
from mtp_jax.errors import UserError
from mtp_jax.model import mtp


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready for inference."""

    config: Config
    params: Any
    """Parameters stacked over layers, in the dtype they were loaded as."""
    tokenizer: Any
    """`encode_prompt(text)`, `decode(ids)`, `bos_id`, `eos_id`; None where the model was trained on token files."""
    mesh: Mesh
    """Where the parameters lie."""

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """Float32 logits of every head at every position, [M, B, T, V], for inspection.

        Args:
          tokens_BT: token ids; every row is one document.
        """
        try:
            tokens_BT = np.asarray(tokens_BT)
        except (ValueError, OverflowError) as error:
            raise UserError(f"logits needs token ids in rows of one length: {error}") from error
        vocab = self.config.model.vocab_size
        if tokens_BT.ndim != 2 or not tokens_BT.size:
            raise UserError(f"logits needs token ids of shape [batch, time], not {tokens_BT.shape}")
        if not np.issubdtype(tokens_BT.dtype, np.integer):
            raise UserError(f"logits needs whole numbers as token ids, not {tokens_BT.dtype}")
        if tokens_BT.min() < 0 or tokens_BT.max() >= vocab:
            raise UserError(
                f"logits got token ids {tokens_BT.min()}..{tokens_BT.max()}; the vocabulary is 0..{vocab - 1}"
            )
        return _logits(self.config, self.params, jnp.asarray(tokens_BT, jnp.int32))

    @functools.cached_property
    def decode_params(self) -> Any:
        """The unstacked view that the decoding engine runs on, made at first use."""
        return jax.jit(mtp.decode_view, static_argnums=0)(self.config, self.params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: Config, params: Any, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
    hidden_MBTD = mtp.apply(config, params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT), everywhere=True)
    return mtp.logits(config, params, hidden_MBTD)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load(
    source: str | pathlib.Path,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    notify: Callable[[str], None] = _to_stderr,
) -> LoadedModel:
    """Loads a model from a training directory.

    Args:
      source: the workdir of `mtp train` or `mtp quickstart`.
      dtype: `float32` or `bfloat16` for parameters and activations; None keeps what the config says.
      mesh: devices to place the parameters on, by the table in `sharding`; None takes the default device.
      notify: receives a line for every broken checkpoint that was passed over; standard error by default.

    Raises:
      UserError: not a training directory, no whole checkpoint, or an unknown dtype.
    """
    # Checkpointing and tokenizers are slow to import; `import mtp_jax` stays free of them.
    from mtp_jax.checkpoint import restore_params
    from mtp_jax.data.tokenize import load_tokenizer

    workdir = pathlib.Path(source)
    path = workdir / "config.json"
    if not path.is_file():
        what = "has no config.json" if workdir.is_dir() else "is not a directory"
        raise UserError(f"{workdir} {what}; give the workdir of `mtp train` or `mtp quickstart`")
    try:
        config = from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r}; use 'float32', 'bfloat16', or None for the config's own")
    if dtype is not None:
        model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
        config = dataclasses.replace(config, model=model)
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config, jax.random.key(0)))
    mesh = mesh or sharding.make_mesh(MeshConfig())
    sharding.check_mesh(mesh, config)
    shardings = sharding.param_shardings(mesh, boxed)
    abstract = sharding.place_abstract(nn.meta.unbox(boxed), shardings)
    params, _ = restore_params(workdir, abstract, notify=notify)
    tokenizer_path = workdir / "data" / "tokenizer.json"
    if not tokenizer_path.is_file() and config.data.tokenizer != "none":
        raise UserError(f"{tokenizer_path} is missing; `mtp train` on this run makes it anew")
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path.is_file() else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{tokenizer_path} has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}; "
            "it is not the tokenizer of this run"
        )
    return LoadedModel(config, params, tokenizer, mesh)
