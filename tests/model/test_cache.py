"""Equations of the cache: each row is written at its own cursor, and nothing else changes.

Each docstring names the line whose deletion breaks the test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.model.cache import LayerCache, _all_at_once, _row_by_row, grow_caches, init_cache, write_cache


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_write_equals_numpy_assignment(dtype):
    """cache[b, start_b : start_b + Q] = new[b] for keys and values, the last start at slots - Q included.

    Breaks if all rows share a start, if keys and values are swapped, or without the cast to the cache's dtype.
    """
    rng = np.random.default_rng(0)
    k_BQKH, v_BQKH = (jnp.asarray(rng.standard_normal((3, 2, 2, 4)), jnp.float32) for _ in range(2))
    cache = write_cache(init_cache(3, 6, 2, 4, dtype), k_BQKH, v_BQKH, jnp.array([0, 3, 4]))
    for actual, new in zip(cache, (k_BQKH, v_BQKH), strict=True):
        expected = np.zeros((3, 2, 6, 4), dtype)
        for b, start in enumerate((0, 3, 4)):
            expected[b, :, start : start + 2] = new[b].swapaxes(0, 1).astype(dtype)
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)


def test_every_backend_writes_alike():
    """What runs on a CPU = what runs elsewhere, for rows with starts of their own."""
    rng = np.random.default_rng(1)
    draw = lambda slots: LayerCache(*(jnp.asarray(rng.standard_normal((3, 2, slots, 4)), jnp.float32) for _ in "kv"))  # noqa: E731
    cache, new, start_B = draw(9), draw(3), jnp.array([0, 6, 2])
    jax.tree.map(np.testing.assert_array_equal, _row_by_row(cache, new, start_B), _all_at_once(cache, new, start_B))


def test_rollback_is_the_cursor():
    """The module's picture: writing e f g h at 4, then G i j k at 6, leaves a b c d e f G i j k.

    Breaks if a write clears or shifts anything outside its own slots.
    """
    letters = lambda text: jnp.array([ord(c) for c in text], jnp.float32)[None, :, None, None]  # noqa: E731
    cache = init_cache(1, 12, 1, 1, jnp.float32)
    for text, start in (("abcd", 0), ("efgh", 4), ("Gijk", 6)):
        cache = write_cache(cache, letters(text), letters(text.upper()), jnp.array([start]))
    shown = LayerCache(*("".join(chr(int(x)) for x in np.ravel(part)[:10]) for part in cache))
    assert shown == LayerCache("abcdefGijk", "ABCDEFGIJK")


def test_grown():
    """Every LayerCache of a tree keeps what it holds and gains zeros; what is large enough, or none, stays as it is."""
    small, large = (init_cache(1, slots, 1, 2, jnp.float32) for slots in (3, 9))
    small = jax.tree.map(lambda x: x + 1, small)
    tree = grow_caches({"a": (small,), "b": large, "c": jnp.arange(3)}, 5)
    assert (tree["a"][0].slots, tree["b"].slots) == (5, 9)
    np.testing.assert_array_equal(tree["a"][0].v_BKSH[0, 0, :, 0], [1, 1, 1, 0, 0])
    assert tree["c"].tolist() == [0, 1, 2]
