"""Heads in a file of their own, for a model that others have: one safetensors file.

    heads/blocks/attn/q, ...  draft_ids     parameters by path, in bfloat16 or float32
    metadata                                the `heads` section of the config; name and digest of the model they read

Heads are of use to the very model that they were trained on and to no other. So the file says which that is, by a
digest of its parameters. The package holds such a file for `smollm2` in `mtp_jax/shipped`; `mtp accelerate` made it.
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
"""A `loading.LoadedModel`, which is made above this file."""
OF_HEADS = ("heads", "draft_ids")
SHIPPED = pathlib.Path(__file__).parents[1] / "shipped"
SHIPPED_SHA256 = {"smollm2": "2b86144293ea0df972cdc1903ec5b6d62a212e6018da9a2755f7a0fd8777d112"}
"""Files of heads in the package, by the name of their model."""


def write_heads(lm: Any, path: str | pathlib.Path, model: str, dtype: str = "bfloat16") -> None:
    """Writes the heads of a model to a file.

    Args:
      lm: a loaded model with heads and its stacked parameters.
      path: of the file.
      model: what to call the model that they belong to.
      dtype: of the heads' parameters in the file.

    Raises:
      UserError: a model without heads.
    """
    from safetensors.flax import save_file

    params = lm.stacked_params()
    if "heads" not in params:
        raise UserError("this model has no extra heads (heads.num_future=1), so there are none to write")
    tensors = {
        name: jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)
        for name, leaf in by_path({name: params[name] for name in OF_HEADS if name in params}).items()
    }
    said = {"heads": json.dumps(dataclasses.asdict(lm.arch.heads)), "model": model, "digest": _digest(params)}
    save_file(tensors, path, said)


class OtherModel(UserError):
    """Heads for another model."""


def with_heads(lm: Opened, path: str | pathlib.Path, check: bool = True) -> Opened:
    """A model with the heads of a file, in place of its own.

    Args:
      lm: a loaded model with its stacked parameters.
      path: what `write_heads` wrote.
      check: whether to compare the model with the one that the heads were trained on, which reads all of it.

    Raises:
      UserError: no such file, or heads for another model.
    """
    said, tensors = _read(pathlib.Path(path))
    params = {name: tree for name, tree in lm.stacked_params().items() if name not in OF_HEADS}
    if check and _digest(params) != said["digest"]:
        raise OtherModel(
            f"{path} holds heads for {said['model']}, whose parameters are others than those of this model; heads are "
            "of no use to another model. Load that one, as it came and in its own dtype, or train heads for this one: "
            "mtp accelerate"
        )
    fields = json.loads(said["heads"])
    config = override(lm.config, {f"heads.{name}": value for name, value in fields.items()})
    boxed = jax.eval_shape(lambda: mtp.init_boxed(config.arch, jax.random.key(0)))
    wanted = {name: tree for name, tree in abstract_params(lm.mesh, boxed).items() if name in OF_HEADS}
    by_name = by_path(wanted)
    if {name: leaf.shape for name, leaf in by_name.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UserError(f"{path} holds heads of other shapes than {said['model']} has; is it the right model?")
    leaves = [jax.device_put(tensors[name].astype(leaf.dtype), leaf.sharding) for name, leaf in by_name.items()]
    params |= jax.tree.unflatten(jax.tree.structure(wanted), leaves)
    return dataclasses.replace(lm, config=config, params=params)


def _digest(params: Any) -> str:
    """Of the model alone."""
    return digest_of({name: tree for name, tree in params.items() if name not in (*OF_HEADS, "token_order")})


def _read(path: pathlib.Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "flax") as file:
            said = file.metadata() or {}
            tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} holds no heads that can be read: {error}; give what write_heads wrote") from error
    if missing := {"heads", "model", "digest"} - said.keys():
        raise UserError(f"{path} does not say its {', '.join(sorted(missing))}; give what write_heads wrote")
    return said, tensors


def with_shipped(lm: Opened, source: str | pathlib.Path, notify: Callable[[str], None]) -> Opened:
    """The model of a source with the heads that the package holds for it; as it is where it holds none.

    The hub has the model's own weights, the package index those of a smaller file, which the heads were trained on.
    They go onto either, because both say nearly the same; `notify` is told.

    Raises:
      UserError: the file in the package was changed.
    """
    name = str(source)
    if name not in SHIPPED_SHA256 or not is_named(source):
        return lm
    path = SHIPPED / f"{name}.safetensors"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHIPPED_SHA256[name]:
        raise UserError(f"{path} is missing or not the file that belongs there; install mtp_jax again")
    try:
        return with_heads(lm, path)
    except OtherModel:
        notify(f"{name}: its heads were trained on another form of this model; they may draft a little worse")
        return with_heads(lm, path, check=False)
