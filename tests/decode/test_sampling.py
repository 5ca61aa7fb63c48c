"""greedy = argmax. Each docstring names the line of `sampling.py` whose deletion breaks the test."""

import jax
import numpy as np
import pytest

from mtp_jax.decode.sampling import greedy

SHAPES = ((1,), (7,), (3, 1), (4, 40), (2, 3, 40), (3, 2, 5, 11), (2, 0, 5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "constant", "infinite"])
def test_is_argmax(shape, kind):
    """greedy(z) = argmax(z), the lowest index of equal maxima, as int32. Breaks without `[1]`, `[..., 0]` or k = 1."""
    rng = np.random.default_rng(len(shape))
    logits = {
        "normal": lambda: rng.standard_normal(shape),
        "ties": lambda: rng.integers(0, 3, shape),  # most maxima stand several times
        "constant": lambda: np.full(shape, -2.5),
        "infinite": lambda: rng.choice([-np.inf, 1.0, np.inf], shape),
    }[kind]().astype(np.float32)
    chosen = jax.jit(greedy)(logits)
    assert chosen.dtype == np.int32
    np.testing.assert_array_equal(chosen, np.argmax(logits, axis=-1))
