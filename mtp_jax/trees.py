"""Trees of parameters by the paths of their leaves."""

import hashlib
from typing import Any

import jax
import numpy as np


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, as `blocks/attn/q`, in the order of flattening; key types are ignored, so that Orbax's dict for a
    named tuple and its list for a tuple count as the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digest_of(params: Any) -> str:
    """A digest of parameters: names, shapes, dtypes and every bit."""
    found = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(jax.device_get(leaf))
        found.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
