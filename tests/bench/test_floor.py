"""What a decoding step must read, counted by hand: the denominator of every ratio to the floor."""

import pytest
from reference.blt import blt_config
from reference.models import small_config

from mtp_jax.bench.floor import bytes_touched

TABLE, BLOCK = 24 * 16, 1952
LORA = 3 * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
CACHE = 2 * 5 * 2 * 4  # keys and values of 5 tokens in 2 heads of width 4
HEADS = {
    "parallel": ({}, 2 * (BLOCK + CACHE) + TABLE),
    "parallel, one of two": ({}, BLOCK + CACHE + TABLE),
    "anticausal, one of two": ({"kind": "anticausal"}, 2 * (BLOCK + CACHE) + TABLE),
    "linear": ({"kind": "linear"}, 2 * 256 + TABLE),
    "medusa, own tables": ({"kind": "medusa", "unembed": "own"}, 2 * (256 + 16 + TABLE)),
    "sequential": ({"kind": "sequential"}, 2 * (BLOCK + 512 + 32 + CACHE + TABLE)),
    "recursive": ({"kind": "recursive"}, 2 * (BLOCK + 512 + 32 + CACHE + TABLE)),
    "masks": ({"kind": "masks"}, 2 * 16 + TABLE),
    "masks, with LoRA": ({"kind": "masks", "lora_rank": 3}, 2 * 16 + 2 * LORA + TABLE),
}


def test_bytes_of_experts():
    """A step reads every expert of every block, chosen or not, and the routers; heads with blocks do so too.

    Breaks if only the experts that a token takes are counted.
    """
    experts = {"num_experts": 3, "experts_per_token": 2, "d_ff": 8}
    attention_and_norms = BLOCK - 3 * 16 * 24
    block = attention_and_norms + 16 * 3 + 3 * 3 * 16 * 8
    plain, drafted = bytes_touched(small_config(experts), 1, 5, 2)
    assert plain == 4 * (2 * (block + CACHE) + TABLE)
    assert drafted - plain == 4 * (2 * (block + CACHE) + TABLE)


@pytest.mark.parametrize("name", HEADS)
def test_bytes_of_a_round(name):
    """A step reads blocks, unembedding and cache; a round also the heads that draft, with what they go through.

    Breaks if a recursive module counts once for all depths, the unembedding once for a chain of tokens, or if masks
    read the model a second time.
    """
    heads, added = HEADS[name]
    count = 1 if "one of two" in name else 2
    plain, drafted = bytes_touched(small_config(heads=heads), 1, 5, count)
    assert plain == 4 * (2 * (BLOCK + CACHE) + TABLE)
    assert drafted - plain == 4 * added


def test_a_byte_latent_transformer_has_no_floor():
    """Its steps may leave out the latent transformer, so bytes are not counted. Breaks without the check."""
    assert bytes_touched(blt_config(), 1, 5, 0) is None
