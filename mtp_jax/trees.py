"""Functions on trees of parameters: leaves by path, and a digest."""

import hashlib
from typing import Any

import jax
import numpy as np


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, such as `blocks/attn/q`, in flattening order.

    Key types are ignored, so that paths are the same after Orbax turned a named tuple into a dict or a tuple into a
    list.
    """
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
