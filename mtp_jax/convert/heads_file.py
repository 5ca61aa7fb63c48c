"""A safetensors file that holds only heads, for a model that users get elsewhere.

    heads/blocks/attn/q, ...  draft_ids     parameters by path, in bfloat16 or float32
    metadata                                the `heads` section of the config; name and digest of the model they read

Heads are only useful for the model that they were trained on. So the file identifies this model by a digest of its
parameters. The package has such a file for `smollm2` in `mtp_jax/shipped`, which `mtp accelerate` made.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import override
from mtp_jax.convert.fetch import is_named
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.sharding import abstract_params
from mtp_jax.trees import by_path, digest_of

Opened = TypeVar("Opened")
"""A `loading.LoadedModel`. This file cannot import it, because `loading` imports this file."""
SHIPPED = pathlib.Path(__file__).parents[1] / "shipped"
SHIPPED_SHA256 = {"smollm2": "2b86144293ea0df972cdc1903ec5b6d62a212e6018da9a2755f7a0fd8777d112"}
"""SHA-256 of the files of heads in the package, by the name of the model."""


def write_heads(lm: Any, path: str | pathlib.Path, model: str, dtype: str = "bfloat16") -> None:
    """Writes the heads of a model to a file.

    Args:
      lm: a loaded model with heads and its stacked parameters.
      path: path of the file.
      model: name of the model that the heads belong to.
      dtype: dtype of the heads' parameters in the file.

    Raises:
      UserError: the model has no heads.
    """
    from safetensors.flax import save_file

    params = lm.stacked_params()
    if "heads" not in params:
        raise UserError("this model has no extra heads (heads.num_future=1), so there is nothing to write")
    tensors = {
        name: jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
        for name, leaf in by_path({name: params[name] for name in mtp.OF_HEADS if name in params}).items()
    }
    said = {"heads": json.dumps(dataclasses.asdict(lm.arch.heads)), "model": model, "digest": _digest(params)}
    save_file(tensors, path, said)


class OtherModel(UserError):
    """The heads belong to another model."""


def with_heads(lm: Opened, path: str | pathlib.Path, check: bool = True) -> Opened:
    """A model with the heads of a file instead of its own heads.

    Args:
      lm: a loaded model with its stacked parameters.
      path: a file that `write_heads` wrote.
      check: whether to check that the heads were trained on this model. The check reads all parameters.

    Raises:
      UserError: the file does not exist, or its heads belong to another model.
    """
    said, tensors = _read(pathlib.Path(path))
    params = {name: tree for name, tree in lm.stacked_params().items() if name not in mtp.OF_HEADS}
    if check and _digest(params) != said["digest"]:
        raise OtherModel(
            f"{path} holds heads for {said['model']}, but this model has other parameters, and heads fit only the "
            "model that they were trained on; load that model, unchanged and in its original dtype, or train heads for "
            "this one with mtp accelerate"
        )
    fields = json.loads(said["heads"])
    config = override(lm.config, {f"heads.{name}": value for name, value in fields.items()})
    boxed = mtp.abstract(config.arch)
    wanted = {name: tree for name, tree in abstract_params(lm.mesh, boxed).items() if name in mtp.OF_HEADS}
    by_name = by_path(wanted)
    if {name: leaf.shape for name, leaf in by_name.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UserError(f"the heads in {path} do not have the shapes of {said['model']}; give the file that fits")
    leaves = [jax.device_put(tensors[name].astype(leaf.dtype), leaf.sharding) for name, leaf in by_name.items()]
    params |= jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return dataclasses.replace(lm, config=config, params=params)


def _digest(params: Any) -> str:
    """The digest of the trunk."""
    return digest_of(mtp.trunk_params(params))


def _read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "flax") as file:
            said = file.metadata() or {}
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"the heads in {path} cannot be read: {error}; give a file that write_heads wrote") from error
    if missing := {"heads", "model", "digest"} - said.keys():
        raise UserError(
            f"{path} has no {', '.join(sorted(missing))} in its metadata; give a file that write_heads wrote"
        )
    return said, tensors


def with_shipped(lm: Opened, source: str | pathlib.Path, notify: Callable[[str], None]) -> Opened:
    """The model with the heads that the package has for its source. Without such heads it is returned unchanged.

    The hub has the original weights. The package index has a quantised file, which the heads were trained on. The heads
    are used with both, because both models predict nearly the same. `notify` is called if it is the other one.

    Raises:
      UserError: the file in the package is missing or was changed.
    """
    name = str(source)
    if name not in SHIPPED_SHA256 or not is_named(source):
        return lm
    path = SHIPPED / f"{name}.safetensors"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHIPPED_SHA256[name]:
        raise UserError(f"{path} is missing or was changed; install mtp_jax again")
    try:
        return with_heads(lm, path)
    except OtherModel:
        notify(f"{name}: its heads were trained on other weights of this model, so they may draft a little worse")
        return with_heads(lm, path, check=False)
