"""Patches of bytes: where they begin, and that a prefix has the patches of the whole row."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.errors import UserError
from mtp_jax.model.blt.patching import PatchRule, entropy_segments, fit_threshold, patch_ends, patch_ids, patch_starts
from mtp_jax.model.blt.slots import in_slots

T = 40
RULES = [
    PatchRule("global", threshold=1.0),
    PatchRule("global", threshold=1.2, max_length=3),
    PatchRule("relative", threshold=0.2),
    PatchRule("relative", threshold=0.4, max_length=4, reset_at_newline=True),
    PatchRule("static", stride=3),
    PatchRule("space"),
    PatchRule("space", max_length=5, byte_offset=4),
]
TEXT = "the cat,  sat\non the ä mat, and (then) it"


def row(rule):
    """Entropies and bytes of one row."""
    tokens_BT = np.frombuffer(TEXT.encode()[:T], np.uint8)[None].astype(np.int32) + rule.byte_offset
    entropy_BT = np.random.default_rng(3).uniform(0, 2, (1, T)).astype(np.float32)
    return jnp.asarray(entropy_BT), jnp.asarray(tokens_BT)


def slow_starts(entropy_T, tokens_T, rule):
    """The rule of one document, byte by byte, as its docstring says it."""
    starts = [True, True]
    begin = 1
    like_space = [not (0 <= t < 256) or (t < 128 and not chr(t).isalnum()) or t >= 0xC0 for t in tokens_T]
    for t in range(2, len(entropy_T) + 1):
        old = tokens_T[t - 1]
        if rule.kind == "global":
            start = entropy_T[t - 1] > rule.threshold
        elif rule.kind == "relative":
            start = entropy_T[t - 1] - entropy_T[t - 2] > rule.threshold
        elif rule.kind == "static":
            start = (t - 1) % rule.stride == 0
        else:
            start = not 0 <= old < 256 or (like_space[t - 1] and not like_space[t - 2])
        start |= rule.reset_at_newline and old == 10
        start |= bool(rule.max_length) and t - begin == rule.max_length
        begin = t if start else begin
        starts.append(bool(start))
    return starts


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_starts_are_those_of_the_slow_rule(rule):
    """starts = the rule applied byte by byte. Breaks with a shift by one, without the first two bytes, without
    `max_length`, or with the wrong side of a threshold."""
    entropy_BT, tokens_BT = row(rule)
    starts_BT = patch_starts(entropy_BT, rule, None, tokens_BT)
    bytes_T = np.asarray(tokens_BT[0]) - rule.byte_offset
    assert starts_BT.shape == (1, T + 1)
    assert list(np.asarray(starts_BT[0])) == slow_starts(np.asarray(entropy_BT[0]), bytes_T, rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_prefix_has_the_patches_of_the_row(rule):
    """f(x_<i) = f(x)_<i, with the byte after the prefix. Breaks if a start reads the entropy of its own byte's
    successor, or a quantile of the row."""
    entropy_BT, tokens_BT = row(rule)
    whole_BT = np.asarray(patch_starts(entropy_BT, rule, None, tokens_BT))
    for i in (1, 2, 7, 23):
        prefix_BT = patch_starts(entropy_BT[:, :i], rule, None, tokens_BT[:, :i])
        np.testing.assert_array_equal(prefix_BT, whole_BT[:, : i + 1])


@pytest.mark.parametrize("rule", RULES[2:6:3], ids=str)
def test_a_row_that_is_cut_reads_what_the_whole_row_reads(rule):
    """reads(x_<i) = reads(x)_<i, also if byte i - 1 ends no patch: the end of a row is no end of a patch. So the last
    byte of a prefix reads the same patch in plain decoding, in verification and in training. Breaks if a row that is
    cut ends its last patch."""
    entropy_BT, tokens_BT = row(rule)
    ends_BT = patch_ends(entropy_BT, rule, None, tokens_BT)
    whole_BT = in_slots(ends_BT, jnp.ones_like(tokens_BT), T).reads_BT
    for i in np.flatnonzero(~np.asarray(ends_BT)[0])[[1, 6]] + 1:
        ends_Bi = patch_ends(entropy_BT[:, :i], rule, None, tokens_BT[:, :i])
        reads_Bi = in_slots(ends_Bi, jnp.ones_like(ends_Bi, int), i).reads_BT
        np.testing.assert_array_equal(reads_Bi, whole_BT[:, :i])


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_documents_of_a_packed_row_have_their_own_patches(rule):
    """ends(packed) = ends of every document alone; every document begins a patch. Breaks without the segment ids in
    `first_bytes`."""
    entropy_BT, tokens_BT = row(rule)
    cuts = (0, 1, 3, 20, T)
    segment_ids_BT = np.zeros((1, T), np.int32)
    for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
        segment_ids_BT[:, begin:end] = number + 1
    packed_BT = np.asarray(patch_ends(entropy_BT, rule, segment_ids_BT, tokens_BT))
    alone = [
        patch_ends(entropy_BT[:, begin:end], rule, None, tokens_BT[:, begin:end])
        for begin, end in itertools.pairwise(cuts)
    ]
    np.testing.assert_array_equal(packed_BT, np.concatenate(alone, axis=1))
    starts_BT = np.asarray(patch_starts(entropy_BT, rule, segment_ids_BT, tokens_BT))
    assert starts_BT[0, list(cuts[:-1])].all()
    ids_BT = np.asarray(patch_ids(starts_BT))[:, :-1]
    for number in range(ids_BT.max() + 1):
        assert len(set(segment_ids_BT[ids_BT == number])) == 1


def test_ids_of_a_written_table():
    """The table of the module's docstring."""
    starts_BT = patch_starts(None, PatchRule("space"), None, jnp.asarray([list(b"the cat")]))
    assert starts_BT[0].astype(int).tolist() == [1, 1, 0, 0, 1, 0, 0, 0]
    entropy_BT = jnp.asarray([[0.0, 0, 0, 9, 0, 0, 9]])
    starts_BT = patch_starts(entropy_BT, PatchRule("global", threshold=1.0))
    assert starts_BT[0].astype(int).tolist() == [1, 1, 0, 0, 1, 0, 0, 1]
    assert patch_ids(starts_BT)[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 3]


def test_lines_of_the_entropy_model():
    """With the reset a line is a segment, and its newline the first byte of it. Breaks if the newline ends the old
    line."""
    tokens_BT = jnp.asarray([list(b"ab\ncd\n\ne")])
    segment_ids_BT = jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2]])
    plain = entropy_segments(PatchRule(), tokens_BT, segment_ids_BT)
    assert plain[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    reset = entropy_segments(PatchRule(reset_at_newline=True), tokens_BT, segment_ids_BT)
    assert reset[0].tolist() == [1, 1, 2, 2, 3, 4, 5, 5]


@pytest.mark.parametrize(
    "rule", [PatchRule("global"), PatchRule("relative"), PatchRule("global", max_length=6)], ids=str
)
def test_fitted_threshold_gives_the_mean_length(rule):
    """bytes / patches at the fitted threshold is the wanted mean, within one patch. Breaks with the share of starts in
    place of their inverse, or if padding is counted."""
    rng = np.random.default_rng(0)
    entropy_BT = rng.gamma(1.0, 1.0, (4, 512)).astype(np.float32)
    segment_ids_BT = np.repeat([[1] * 300 + [2] * 112 + [0] * 100], 4, axis=0)
    for mean in (1.7, 2.6):
        fitted = fit_threshold(entropy_BT, mean, rule, segment_ids_BT)
        starts_BT = np.asarray(patch_starts(entropy_BT, fitted, segment_ids_BT))[:, :412]
        assert abs(4 * 412 / starts_BT.sum() - mean) < 0.02
        assert fitted.max_length == rule.max_length


def test_what_is_refused():
    """One line each. Breaks without the check that the line is about."""
    for fields, message in (
        ({"kind": "bpe"}, "model.patches.kind is 'bpe'; choose one of 'global', 'relative', 'static', 'space'"),
        ({"kind": "static"}, "model.patches.stride is 0; it must be at least 1"),
        ({"stride": 4}, "model.patches.stride=4 has no effect without model.patches.kind='static'"),
        ({"kind": "space", "threshold": 1.0}, "model.patches.threshold=1.0 has no effect without"),
        ({"kind": "static", "stride": 4, "max_length": 2}, "model.patches.max_length=2 has no effect without another"),
        ({"max_length": -1}, "model.patches.max_length is -1; use 0 for no limit, or 1 and more"),
        ({"byte_offset": -1}, "model.patches.byte_offset is -1; it must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            PatchRule(**fields)
    with pytest.raises(UserError, match="patches of kind 'global' need entropies; give entropy_BT"):
        patch_starts(None, PatchRule())
    with pytest.raises(UserError, match="patches with kind 'space' need the bytes; give tokens_BT"):
        patch_starts(jnp.zeros((1, 3)), PatchRule("space"))
    with pytest.raises(UserError, match="patches with reset_at_newline=True need the bytes; give tokens_BT"):
        patch_starts(jnp.zeros((1, 3)), PatchRule(reset_at_newline=True))
    with pytest.raises(UserError, match="patches of kind 'static' have no threshold; use 'global' or 'relative'"):
        fit_threshold(jnp.zeros((1, 3)), 2.0, PatchRule("static", stride=2))
    with pytest.raises(
        UserError, match=r"no threshold gives a mean patch length of 9.0: these entropies allow 1.00 to"
    ):
        fit_threshold(jnp.asarray([[0.0, 1, 2, 3]]), 9.0, PatchRule())
