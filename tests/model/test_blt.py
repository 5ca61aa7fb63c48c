"""The Byte Latent Transformer: what a byte may depend on, and that caches and packing change nothing."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.blt import MODEL, blt_config, blt_params
from reference.models import rows

from mtp_jax.cli.common import parse_over
from mtp_jax.config import Config, PatchRule, from_json, override, to_json
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.model.blt.model import entropies, latents, patches_of
from mtp_jax.model.blt.slots import in_slots
from mtp_jax.model.given import NewTokens, TokenRows

T = 24
Q = 3
CONFIG = blt_config()
PARAMS = blt_params(CONFIG)
TOKENS = np.random.default_rng(4).integers(0, 256, T).astype(np.int32)


class Levels(NamedTuple):
    """What the model computes on its way, by byte, and by patch."""

    entropy_BT: Any
    taps: Any
    """The state of the encoder, and those of the layers of the decoder."""
    latent_BXkD: Any


@functools.partial(jax.jit, static_argnums=0)
def states(model, params, tokens_BT, positions_BT, segment_ids_BT):
    """Head 0's states [B, T, D] of the whole forward pass, the patches, and the levels."""
    arch = blt_config(model=dict(model)).arch
    ready = mtp.with_constants(arch, params)
    given = TokenRows(trunk.embed(arch, ready, tokens_BT), tokens_BT, positions_BT, segment_ids_BT)
    state_BTD, taps = trunk.run(arch, ready, given, trunk.everywhere(arch))
    patches = patches_of(arch.model, ready, tokens_BT, segment_ids_BT)
    entropy_BT = entropies(arch.model, ready, tokens_BT, segment_ids_BT)
    levels = Levels(entropy_BT, taps, latents(arch.model, ready, taps[0], patches))
    return trunk.final_norm(arch, ready, state_BTD), patches, levels


def whole(tokens_BT, positions_BT=None, segment_ids_BT=None, model=()):
    """`states` of T + 1 rows, so that all tests have one program; further rows repeat the first."""
    B = len(tokens_BT)
    arrays = (
        tokens_BT,
        np.tile(np.arange(T), (B, 1)) if positions_BT is None else positions_BT,
        np.ones((B, T)) if segment_ids_BT is None else segment_ids_BT,
    )
    padded = [np.concatenate([x, np.repeat(x[:1], T + 1 - B, axis=0)]).astype(np.int32) for x in arrays]
    return jax.tree.map(lambda x: np.asarray(x)[:B], states(model, PARAMS, *padded))


def test_no_byte_depends_on_a_later_one():
    """At every level of a row with byte j changed: entropies, states of the encoder and of all layers of the decoder
    are those of the row at all t < j, borders at all t <= j, and latents for all patches that ended before j; byte j
    itself changes state[j]; and the row has patches of several lengths. Breaks if a byte reads the latent of its own
    unfinished patch, in which its target is, if a patch attends to all bytes, or if an end reads the entropy of the
    byte after."""
    changed_BT = np.tile(TOKENS, (T + 1, 1))
    changed_BT[np.arange(T), np.arange(T)] = (TOKENS + 101) % 256
    hidden_BTD, patches, levels = whole(changed_BT)
    lengths = np.bincount(patches.ids_BT[-1])
    assert len(set(lengths.tolist())) > 2
    assert (patches.ids_BT[:-1] != patches.ids_BT[-1]).any()
    assert len(levels.taps) == 3
    for j in range(T):
        for level_BT in (levels.entropy_BT, *levels.taps, hidden_BTD):
            np.testing.assert_allclose(level_BT[j, :j], level_BT[-1, :j], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(patches.starts_BT[j, : j + 1], patches.starts_BT[-1, : j + 1])
        done = patches.ids_BT[-1, j] if j else 0
        np.testing.assert_allclose(levels.latent_BXkD[j, :done], levels.latent_BXkD[-1, :done], rtol=1e-5, atol=1e-5)
        assert np.abs(hidden_BTD[j, j] - hidden_BTD[-1, j]).max() > 1e-3


def test_every_byte_sees_the_patches_before_it():
    """A change in byte 0 reaches the last state through the latent transformer: the encoder's window is shorter, and
    without the latents' part the decoder would be the only way. Breaks if `reads_BT` is -1 or 0 everywhere."""
    _, patches, _ = whole(TOKENS[None])
    ids_T = patches.ids_BT[0]
    ends_T = np.append(ids_T[1:] > ids_T[:-1], False)
    np.testing.assert_array_equal(patches.reads_BT[0, :-1], np.where(ends_T, ids_T, ids_T - 1)[:-1])


def test_documents_of_a_packed_row_do_not_see_each_other():
    """state(packed) = state(each document alone), at every byte. Breaks without the segment ids in the entropy model,
    the encoder or the latent transformer, or with hashes across documents."""
    a, b = TOKENS[:11].tolist(), TOKENS[11:20].tolist()
    packed, *alone = (rows(*documents, length=T) for documents in ((a, b), (a,), (b,)))
    hidden_BTD, patches, _ = whole(*(np.concatenate(arrays) for arrays in zip(packed, *alone, strict=True)))
    np.testing.assert_allclose(hidden_BTD[0, :11], hidden_BTD[1, :11], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(hidden_BTD[0, 11:20], hidden_BTD[2, :9], rtol=1e-5, atol=1e-5)
    assert patches.ids_BT[0, 11] > patches.ids_BT[0, 10]


@functools.partial(jax.jit, static_argnums=0)
def step(count, params, tokens_BQ, start_B, caches):
    """`count` new bytes of every row."""
    del count
    view = mtp.decode_view(CONFIG.arch, params)
    new = NewTokens(trunk.embed(CONFIG.arch, view, tokens_BQ), tokens_BQ, start_B)
    state_BQD, _, caches = trunk.decode(CONFIG.arch, view, new, caches)
    return trunk.final_norm(CONFIG.arch, view, state_BQD), caches


def test_cached_states_are_those_of_the_whole_row():
    """state(cached) = state(whole), at every split point, with rows at different places, and after Q - 1 rejected bytes
    of which some ended patches. Breaks with patches that are counted from the round, without the running maximum of
    the bytes before, with the keys of too few bytes, or with a latent that is not written again."""
    tokens_BT = np.stack([TOKENS, TOKENS[::-1]])
    hidden_BTD, *_ = whole(tokens_BT)
    wrong_BT = (tokens_BT + 77) % 256
    caches = trunk.init_caches(CONFIG.arch, 2, T + Q)
    start_B = np.array([0, 0])
    accepted = ((3, 1), (1, 2), (2, 3), (1, 1), (3, 3))
    for kept_B in (*accepted, *accepted, *accepted):
        padded_BT = np.pad(tokens_BT, ((0, 0), (0, Q)))
        new_BQ = np.stack([padded_BT[b, at : at + Q] for b, at in enumerate(start_B)])
        for b, kept in enumerate(kept_B):
            new_BQ[b, kept:] = np.pad(wrong_BT, ((0, 0), (0, Q)))[b, start_B[b] + kept : start_B[b] + Q]
        state_BQD, caches = step(Q, PARAMS, jnp.asarray(new_BQ), jnp.asarray(start_B), caches)
        for b, kept in enumerate(kept_B):
            end = min(start_B[b] + kept, T)
            got_QD = np.asarray(state_BQD)[b, : end - start_B[b]]
            np.testing.assert_allclose(got_QD, hidden_BTD[b, start_B[b] : end], rtol=1e-4, atol=1e-4)
        start_B = np.minimum(start_B + np.array(kept_B), T)
    assert (start_B == T).all()


@pytest.mark.grid
def test_an_entropy_model_that_starts_anew_at_newlines():
    """state(cached) = state(whole) with `reset_at_newline`, in two pieces; and entropies after a newline do not depend
    on the line before. Breaks if a query of the cache sees the bytes before its line, or without `entropy_segments`."""
    rule = PatchRule("relative", threshold=0.03, max_length=5, reset_at_newline=True)
    config = blt_config(model={"patches": rule})
    tokens_BT = np.stack([TOKENS, TOKENS])
    tokens_BT[:, [4, 13]] = 10
    tokens_BT[1, :4] = (TOKENS[:4] + 9) % 256

    @jax.jit
    def both(params):
        ready = mtp.with_constants(config.arch, params)
        view = mtp.decode_view(config.arch, params)
        positions_BT = jnp.tile(jnp.arange(T)[None], (2, 1))
        x_BTD = trunk.embed(config.arch, ready, tokens_BT)
        given = TokenRows(x_BTD, tokens_BT, positions_BT, jnp.ones_like(positions_BT))
        caches = trunk.init_caches(config.arch, 2, T)
        pieces = []
        for begin in (0, T // 2):
            where = slice(begin, begin + T // 2)
            new = NewTokens(x_BTD[:, where], tokens_BT[:, where], jnp.full((2,), begin))
            *piece, caches = trunk.decode(config.arch, view, new, caches)
            pieces.append(piece[0])
        entropy_BT = entropies(config.model, ready, jnp.asarray(tokens_BT), given.segment_ids_BT)
        return trunk.run(config.arch, ready, given)[0], jnp.concatenate(pieces, axis=1), entropy_BT

    whole_BTD, cached_BTD, entropy_BT = both(PARAMS)
    np.testing.assert_allclose(cached_BTD, whole_BTD, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(entropy_BT[0, 4:], entropy_BT[1, 4:], rtol=1e-5)
    assert np.abs(entropy_BT[0, :4] - entropy_BT[1, :4]).max() > 1e-3


def test_patches_of_a_written_table():
    """Slots, reads and positions of two documents; then with too few slots: patches after the last one are left out,
    their bytes read the last patch of their document, or none."""
    ends_BT = np.array([[1, 0, 1, 0, 1, 0, 1, 1, 0]], bool)
    segment_ids_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    full = in_slots(jnp.asarray(ends_BT), jnp.asarray(segment_ids_BT), 8)
    assert full.ids_BT[0].tolist() == [0, 1, 1, 2, 3, 4, 4, 5, 6]
    assert full.reads_BT[0].tolist() == [0, 0, 1, 1, 3, 3, 4, 5, 5]
    assert full.end_BX[0, :7].tolist() == [0, 2, 3, 4, 6, 7, 8]
    assert full.positions_BX[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert full.segment_ids_BX[0].tolist() == [1, 1, 1, 2, 2, 2, 2, -1]
    assert in_slots(ends_BT, segment_ids_BT, 5).reads_BT[0].tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 4]
    few = in_slots(ends_BT, segment_ids_BT, 2)
    assert few.reads_BT[0].tolist() == [0, 0, 1, 1, -1, -1, -1, -1, -1]
    assert few.end_BX[0].tolist() == [0, 2]


def test_too_few_slots_change_no_earlier_byte():
    """state with X = 8 slots = state with T slots, up to the first byte whose patch has none, and is finite after it.
    Breaks if bytes without a slot are added to the last patch."""
    exact_BTD, patches, _ = whole(TOKENS[None])
    few_BTD, *_ = whole(TOKENS[None], model=(("slots_per_byte", 0.2),))
    assert MODEL.slots(T) == T
    first = int(np.argmax(patches.ids_BT[0] == 8))
    assert 0 < first < T
    np.testing.assert_allclose(few_BTD[0, :first], exact_BTD[0, :first], rtol=1e-5, atol=1e-5)
    assert np.isfinite(few_BTD).all()
    assert np.abs(few_BTD[0, first + 1 :] - exact_BTD[0, first + 1 :]).max() > 1e-3


def test_config_of_parts():
    """JSON, an override and a flag of a command reach into the parts and keep their types; an unknown field of a part
    has one line. Breaks if `override` knows two names of a path only."""
    assert from_json(to_json(CONFIG)) == CONFIG
    changed = override(CONFIG, {"model.latent.num_layers": 3, "model.patches.threshold": 1.5})
    assert (changed.model.latent.num_layers, changed.model.patches.threshold) == (3, 1.5)
    flags = ["--model.latent.num-layers", "3"]
    assert parse_over(CONFIG, Config, flags, "x", "x")[1].model.latent.num_layers == 3
    with pytest.raises(UserError, match=r"config.model.latent: unknown key 'num_layer'; did you mean 'num_layers'"):
        override(CONFIG, {"model.latent.num_layer": 3})
    with pytest.raises(UserError, match=r"config.model: unknown key 'vocab_size.x'"):
        override(CONFIG, {"model.vocab_size.x": 3})


def test_what_is_refused():
    """One line each. Breaks without the check that the line is about."""
    for fields, message in (
        ({"slots_per_byte": 0.0}, "model.slots_per_byte is 0.0; it must be above 0 and at most 1"),
        ({"hash_sizes": (1,)}, "model.hash_sizes has 1; a hash is of 2 to 16 bytes"),
        ({"hash_sizes": (3, 3)}, "model.hash_sizes=(3, 3) has a size twice"),
        ({"hash_sizes": ()}, "model.hash_rows=64 has no effect without model.hash_sizes"),
        ({"hash_rows": 2**25}, "model.hash_rows=33554432 is above 16777216"),
        ({"vocab_size": 5000}, "model.vocab_size=5000 is above 4096, which hashes of tokens do not allow"),
        ({"kind": "other"}, "model.kind is 'other'; a BltConfig has 'blt'"),
        ({"patches": PatchRule("space")}, "model.entropy is set, but patches of kind 'space' need no entropies"),
        (
            {"patches": PatchRule("global", reset_at_newline=True, byte_offset=4)},
            "model.patches.byte_offset=4, but byte 0 is id 0 of data.tokenizer='bytes'; set byte_offset=0",
        ),
    ):
        with pytest.raises(UserError) as error:
            blt_config(model=fields)
        assert message in str(error.value)
    for part, fields, message in (
        ("latent", {"dtype": "bfloat16"}, "model.latent.dtype='bfloat16' has no effect; set model.dtype"),
        ("encoder", {"logit_scale": 2.0}, "model.encoder has logit_scale, which has no effect in a stack of blocks"),
        ("encoder", {"d_model": 24}, "model.encoder.d_model=24 differs from model.decoder.d_model=16"),
    ):
        with pytest.raises(UserError) as error:
            blt_config(model={part: type(MODEL.latent)(**fields)})
        assert message in str(error.value)
