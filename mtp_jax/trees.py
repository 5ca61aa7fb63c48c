"""Trees of parameters by the paths of their leaves."""

from typing import Any

import jax


def by_path(tree: Any) -> dict[str, Any]:
    """Leaves by path, as `blocks/attn/q`, in the order of flattening; key types are ignored, so that Orbax's dict for a
    named tuple and its list for a tuple count as the same."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
