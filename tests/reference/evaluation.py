"""Held-out rows and evaluations that several tests read; each is computed once."""

import functools

import numpy as np
from reference.decoding import CONFIG, loaded, loud_params, model
from reference.tiny import tiny_config

from mtp_jax.data.pack import PackedRows
from mtp_jax.eval.report import evaluate

LENGTHS = (40, 3, 61, 1, 90, 47)
TEXT_BYTES = 1000


def heldout():
    """Six documents, one of them a single token; the fifth repeats itself."""
    tokens = np.random.default_rng(3).integers(0, CONFIG.model.vocab_size, sum(LENGTHS))
    starts = np.cumsum([0, *LENGTHS[:-1]])
    tokens[starts[4] : starts[5]] = np.arange(LENGTHS[4]) % 3
    return PackedRows(tokens, starts, CONFIG.data.seq_len, TEXT_BYTES)


@functools.cache
def evaluation(name="random"):
    """Of one of `reference.decoding.model`, which has no tokenizer: its samples are lists of ids as text."""
    return evaluate(model(name), heldout())


class Letters:
    """Token i is the letter i."""

    eos_id = 0
    end_ids = (0,)

    def decode(self, ids):
        return "".join(chr(0x41 + i) for i in ids)


@functools.cache
def without_heads():
    """A plain language model, num_future = 1, with a tokenizer; and its evaluation."""
    config = tiny_config(model={"vocab_size": CONFIG.model.vocab_size}, heads={"num_future": 1})
    lm = loaded(config, loud_params(config), Letters())
    return lm, evaluate(lm, heldout())
