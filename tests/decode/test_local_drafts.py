"""The local decoder of a Byte Latent Transformer drafts alone (BLT-S), and changes no byte."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.blt import blt_config, blt_params
from reference.decoding import CONFIG as DECODER_LM
from reference.decoding import loaded, slow_greedy, slow_sampled

import mtp_jax
from mtp_jax.config import ModelConfig, PatchRule
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode.checks import checked_caches
from mtp_jax.decode.drafters import LOCAL_DRAFTS, Drafter, Drafts, make_drafter
from mtp_jax.decode.options import Options
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.model.blt.decoding import ended
from mtp_jax.model.blt.model import embed, run_patches
from mtp_jax.model.blt.slots import in_slots
from mtp_jax.model.given import NewTokens, TokenRows

CONFIG = blt_config()
TEXT = [3, 101, 44, 101, 59, 7, 230, 44]
PROMPTS = [TEXT[:length] for length in (1, 2, 3, 4, 6, 8)]
"""Prompts that end at the end of a patch, and at other places of it."""
NEW = 14
S = 17
"""Slots, a number that no other axis has."""


def kept(stats):
    """Drafts that were accepted."""
    return sum(count * rounds for count, rounds in enumerate(stats.histogram))


def test_greedy_bytes_are_those_of_the_whole_forward():
    """bytes(local draft) = arg-max of the whole forward, byte by byte, for prompts of six lengths in one batch; and
    some drafts are right, some wrong. A stream, which returns to the host after every round, ends with the same. Breaks
    if the draft's entries count as those of the model, or if a round reads them."""
    params = blt_params(CONFIG)
    lm = loaded(CONFIG, params, bytes_tokenizer())
    expected = [slow_greedy(CONFIG, params, prompt, NEW) for prompt in PROMPTS]
    assert min(len(set(tokens)) for tokens in expected) > 4
    given = {"max_new_tokens": NEW, "draft": "local", "num_draft": 3}
    drafted = mtp_jax.generate(lm, PROMPTS, **given)
    assert drafted.tokens == expected
    assert 0 < kept(drafted.stats) < drafted.stats.drafted
    *pieces, streamed = mtp_jax.stream(lm, PROMPTS, **given)
    assert streamed.tokens == expected
    assert streamed.stats.histogram == drafted.stats.histogram
    assert len(pieces) > len(PROMPTS)


BY_ENTROPY = {"entropy": CONFIG.model.entropy}
CASES = {
    "every byte is a patch": (PatchRule("global", threshold=0.0), 1, BY_ENTROPY),
    "global": (PatchRule("global", threshold=4.95, max_length=5), 8, BY_ENTROPY),
    "one long patch": (PatchRule("global", threshold=9.0), 4, BY_ENTROPY),
    "relative": (PatchRule("relative", threshold=0.03, max_length=5, reset_at_newline=True), 16, BY_ENTROPY),
    "static": (PatchRule("static", stride=4), 2, {}),
    "space": (PatchRule("space", max_length=6), 5, {}),
}


@pytest.mark.grid
@pytest.mark.parametrize("case", CASES)
def test_sampled_bytes_for_every_rule(case):
    """bytes(local draft, sampled) = one whole forward per byte with the same noise, for six rules and 1 to 16 drafts.
    Breaks as above, or if drafts are drawn with other noise: then hardly any is accepted."""
    rule, num_draft, fields = CASES[case]
    config = blt_config(model={"patches": rule, "entropy": ModelConfig()} | fields)
    params = blt_params(config)
    options = Options(temperature=1.0, seed=3)
    drawn = [slow_sampled(config, params, prompt, NEW, options, row=b) for b, prompt in enumerate(PROMPTS)]
    given = {"max_new_tokens": NEW, "draft": "local", "num_draft": num_draft}
    drafted = mtp_jax.generate(loaded(config, params), PROMPTS, **given, options=options)
    assert drafted.tokens == drawn
    assert kept(drafted.stats) > 0


def test_drafts_are_those_of_bytes_without_further_borders():
    """states(draft) = states of the whole row in which no byte from the newest one on ends its patch, after a text that
    ends inside a patch and one that ends with it; and the caches of all bytes before stay as they are. Breaks if a
    later draft reads a patch that its own bytes seem to end, or with a hash that misses the drafts before."""
    arch = CONFIG.arch
    count = 3
    lengths_B = np.array([3, 4])
    params = blt_params(CONFIG)
    rows_BT = jnp.asarray([TEXT, TEXT])

    @jax.jit
    def both(params):
        view = mtp.decode_view(arch, params)
        ready = mtp.with_constants(arch, params)
        read = NewTokens(trunk.embed(arch, view, rows_BT), rows_BT, jnp.zeros((2,), jnp.int32))
        caches = trunk.decode(arch, view, read, trunk.init_caches(arch, 2, S))[2]
        newest_B1 = jnp.take_along_axis(rows_BT, lengths_B[:, None], axis=1)
        new = NewTokens(trunk.embed(arch, view, newest_B1), newest_B1, jnp.asarray(lengths_B))

        def propose(states_BPD, first):
            return Guess((newest_B1 + 7 * (first + 1)) % 256, states_BPD)

        guess, after = trunk.draft(arch, view, new, caches, count, propose)
        slot_S = jnp.arange(S)[None]
        own_BS = (slot_S >= lengths_B[:, None]) & (slot_S < lengths_B[:, None] + count)
        guessed_BS = newest_B1 + 7 * (slot_S - lengths_B[:, None])
        text_BS = jnp.where(own_BS, guessed_BS % 256, jnp.pad(rows_BT, ((0, 0), (0, S - len(TEXT)))))
        ends_BS = ended(arch.model, caches.of_bytes) & (slot_S < lengths_B[:, None])
        whole_BSD = without_borders(arch.model, ready, text_BS, ends_BS)
        at_BP = lengths_B[:, None] + jnp.arange(count)[None]
        wanted_BPD = jnp.take_along_axis(whole_BSD, at_BP[..., None], axis=1)
        return guess, wanted_BPD, ends_BS, caches, after

    guess, wanted_BPD, ends_BS, caches, after = both(params)
    assert np.asarray(ends_BS)[[0, 1], lengths_B - 1].tolist() == [False, True]
    np.testing.assert_allclose(guess.states_BPD, wanted_BPD, rtol=1e-4, atol=1e-4)
    for old, new in zip(jax.tree.leaves(caches), jax.tree.leaves(after), strict=True):
        of_slots = old.shape.index(S, 1) - 1
        for b, length in enumerate(lengths_B):
            before = [jax.lax.slice_in_dim(leaf[b], 0, int(length), axis=of_slots) for leaf in (old, new)]
            np.testing.assert_array_equal(*before)


class Guess(NamedTuple):
    """What `propose` returns in the test."""

    tokens_BP: jax.Array
    states_BPD: jax.Array


def without_borders(model, params, tokens_BT, ends_BT):
    """The last states of whole rows with given ends of patches."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    ones_BT = jnp.ones_like(tokens_BT)
    patches = in_slots(ends_BT, ones_BT, tokens_BT.shape[1])
    rows = TokenRows(embed(model, params, tokens_BT), tokens_BT, positions_BT, ones_BT)
    return run_patches(model, params, rows, patches, ())[0]


def test_what_is_refused():
    """One line each. Breaks without the check that the line is about."""
    assert make_drafter("local", CONFIG.arch).num_draft == LOCAL_DRAFTS
    assert make_drafter("local", CONFIG.arch, 0).name == "none"
    with pytest.raises(UserError, match=r"draft='local', but this model has no local decoder, as a Byte Latent"):
        make_drafter("local", DECODER_LM.arch)
    with pytest.raises(UserError, match=r"num_draft=65 with draft='local'; use 0..64"):
        make_drafter("local", CONFIG.arch, 65)
    drafter = Drafter("mine", 1, tuple, tuple)
    caches = {"a": jnp.zeros((1, 2))}
    with pytest.raises(UserError, match=r"drafter 'mine' returns caches of another form than DraftContext.caches"):
        checked_caches(drafter, Drafts(jnp.zeros((1, 1), int), caches={"a": jnp.zeros((1, 3))}), caches)
    assert checked_caches(drafter, Drafts(jnp.zeros((1, 1), int)), caches) is caches
