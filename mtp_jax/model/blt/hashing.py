"""Hashes of the last n bytes, as rows of an embedding table (Byte Latent Transformer, arXiv:2412.09871, section 3.2.1).

The hash of tokens x_0 .. x_{n-1}, the oldest first, is x_0 + x_1 p + ... + x_{n-1} p^(n-1), in signed 64-bit integers
that wrap around, modulo the number of rows. Released models need exactly these numbers. JAX computes with 32-bit
integers unless it is told otherwise. So the 64-bit number is kept as four limbs of 16 bits.

Before the first token of a document there are tokens with id 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

PRIMES = (
    *(1000000007, 5915587277, 1500450271, 3267000013, 5754853343, 4093082899),
    *(9576890767, 3628273133, 2860486313, 5463458053, 3367900313),
)
"""The base p of each hash function of the released models."""
LIMBS = 4
LIMB_BITS = 16


def hash_ids(tokens_BT: jax.Array, positions_BT: jax.Array, size: int, rows: int, function: int = 0) -> jax.Array:
    """The row that belongs to the last `size` tokens at every position, int32 [B, T].

    Args:
      tokens_BT: token ids, below `config.blt.MOST_TOKENS`.
      positions_BT: position of each token in its document.
      size: n, number of tokens of a hash, at most `config.blt.LONGEST_HASH`.
      rows: number of rows of the table, at most `config.blt.MOST_ROWS`.
      function: number of the hash function, which has its own prime. After the last prime, the first follows.
    """
    prime = PRIMES[function % len(PRIMES)]
    limbs = [jnp.zeros(tokens_BT.shape, jnp.uint32) for _ in range(LIMBS)]
    for back in range(size):
        token_BT = _before(tokens_BT, positions_BT, back).astype(jnp.uint32)
        power = pow(prime, size - 1 - back, 2**64)
        for i in range(LIMBS):
            limbs[i] += token_BT * jnp.uint32(power >> (LIMB_BITS * i) & (2**LIMB_BITS - 1))
    return _modulo(_carried(limbs), rows)


def _before(tokens_BT: jax.Array, positions_BT: jax.Array, back: int) -> jax.Array:
    """The token `back` positions before every position; 0 before the document."""
    moved_BT = jnp.pad(tokens_BT, ((0, 0), (back, 0)))[:, : tokens_BT.shape[1]]
    return jnp.where(positions_BT >= back, moved_BT, 0)


def _carried(limbs: list[jax.Array]) -> list[jax.Array]:
    """The limbs with 16 bits each, the lowest first. What exceeds 64 bits is dropped."""
    carry_BT = jnp.zeros_like(limbs[0])
    whole = []
    for limb_BT in limbs:
        # The sum of the products has 32 bits at most, so the carry is added to each half.
        low_BT = (limb_BT & (2**LIMB_BITS - 1)) + (carry_BT & (2**LIMB_BITS - 1))
        whole.append(low_BT & (2**LIMB_BITS - 1))
        carry_BT = (limb_BT >> LIMB_BITS) + (carry_BT >> LIMB_BITS) + (low_BT >> LIMB_BITS)
    return whole


def _modulo(limbs: list[jax.Array], rows: int) -> jax.Array:
    """The signed 64-bit number modulo `rows`, from 0 to rows - 1."""
    rest_BT = jnp.zeros_like(limbs[0])
    for limb_BT in reversed(limbs):
        # A byte at a time, because rows has up to 24 bits.
        for byte_BT in (limb_BT >> 8, limb_BT & 255):
            rest_BT = (rest_BT * 256 + byte_BT) % rows
    negative_BT = limbs[-1] >> (LIMB_BITS - 1) == 1
    wrapped_BT = (rest_BT + rows - np.uint32(2**64 % rows)) % rows
    return jnp.where(negative_BT, wrapped_BT, rest_BT).astype(jnp.int32)


def all_hash_ids(
    tokens_BT: jax.Array, positions_BT: jax.Array, sizes: tuple[int, ...], rows: int, functions: int
) -> jax.Array:
    """The rows of one table that holds the tables of all hashes, one after the other: int32 [B, T, W].

    The W hashes are those of the first function by size, then those of the second.
    """
    each = [(function, size) for function in range(functions) for size in sizes]
    ids = [hash_ids(tokens_BT, positions_BT, size, rows, function) for function, size in each]
    return jnp.stack([ids_BT + i * rows for i, ids_BT in enumerate(ids)], axis=-1)
