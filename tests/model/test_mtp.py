"""Equations of the training forward: no leakage, packed = unpacked, the LM without its heads, remat = no remat.

Each docstring names the line whose deletion breaks the test.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.families import KINDS, READS_TOKENS, SETTINGS, heads_of
from reference.jaxprs import equations, results
from reference.models import BLOCKS, random_params, rows, small_config
from reference.quick import fused_jit, quick_jit
from reference.tiers import sampled

from mtp_jax.losses.mtp import head_scale, mtp_loss
from mtp_jax.losses.targets import make_targets
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import lm, lora, mtp, trunk
from mtp_jax.model.block import Block, variables

apply = jax.jit(mtp.apply, static_argnums=0, static_argnames="everywhere")
FIRST, SECOND = [3, 1, 4, 1, 5], [9, 2, 6]

VARIANTS = (
    {name: small_config(heads=heads_of(name)) for name in SETTINGS}
    | {
        "tap-0": small_config(heads={"tap": 0}, model={"tie_embeddings": False}),
        "tap-top-normed": small_config(heads={"tap": 2, "tap_norm": True}, model={"qk_norm": True, "num_kv_heads": 1}),
        "masks, in windows": small_config(BLOCKS["as Gemma 3"], heads_of("masks")),
        "recursive, own LayerNorms": small_config(BLOCKS["as GPT-NeoX"], heads_of("recursive, own ends")),
        "registers, in windows": small_config(BLOCKS["as Gemma 3"], heads_of("registers")),
    }
    | {name: small_config(model) for name, model in BLOCKS.items()}
)

IN_WINDOWS = ("masks, in windows", "registers, in windows")
STATES = ("causal", "masks, in windows")
LAYOUTS = [(FIRST, SECOND), (SECOND, FIRST), (FIRST,), (SECOND,)]


@pytest.fixture(scope="module")
def batch():
    """Both documents packed in either order, and each alone: tokens, positions and segments, [4, 10] each."""
    return [
        np.concatenate(parts) for parts in zip(*(rows(*documents, length=10) for documents in LAYOUTS), strict=True)
    ]


@pytest.mark.parametrize("name", sampled(VARIANTS, *STATES))
def test_no_leakage(name):
    """With another embedding at u the state of head m at t keeps its bits for u > t (for u > t + m where heads read
    tokens) and for u in another document, and for every other u it changes, for every head m.

    Breaks without `segment_ids_BS` or `<= query_slots` in `attention`, if a family's `train` drops `segment_ids_BT`, or
    if `_shift` in a sequential head goes one position too far or over a document's end.
    """
    config, T = VARIANTS[name], 10
    params = random_params(config)
    # Four times the same row: the shape of `batch`, whose program serves this test too.
    tokens_BT, positions_BT, segments_BT = (np.tile(x_BT, (4, 1)) for x_BT in rows([0, 1, 2, 3], [4, 5, 6], length=T))
    tokens_BT[:] = np.arange(T)  # Every position has an embedding of its own, padding included.
    table_VD, away_D = np.asarray(params["embed"]["table"]), np.random.default_rng(1).standard_normal(16)

    def states_MTD(u=None):
        moved_VD = table_VD.copy()
        if u is not None:
            moved_VD[u] += away_D
        given = params | {"embed": {"table": moved_VD}}
        return np.asarray(apply(config.arch, given, tokens_BT, positions_BT, segments_BT))[:, 0]

    before_MTD = states_MTD()
    reached_MTU = np.stack([(states_MTD(u) != before_MTD).any(-1) for u in range(T)], axis=-1)
    np.testing.assert_array_equal(reached_MTU, expected_reach(config, tokens_BT, segments_BT))


@pytest.mark.parametrize("name", sampled(VARIANTS, "sequential", grid=("recursive", "masks")))
def test_no_gradient_leaks(name):
    """The same of gradients: d logits[m, t] / d embedding at u is exactly 0 for those u, and not 0 for every other u.
    (A random mix of the logits stands for all of them.)

    Breaks where a gradient is cut, and with all that leaks a state.
    """
    config, T = VARIANTS[name], 9
    params = random_params(config)
    tokens_BT, positions_BT, segments_BT = rows([0, 1, 2, 3], [4, 5, 6], length=T)
    tokens_BT = np.arange(T)[None, :]  # Every position has an embedding of its own, padding included.
    mix_V = np.random.default_rng(1).standard_normal(config.model.vocab_size).astype(np.float32)

    def mixed_MT(table_VD):
        # Only what goes in is asked about, not the unembedding of a tied model.
        hidden_MBTD = mtp.apply(
            config.arch, params | {"embed": {"table": table_VD}}, tokens_BT, positions_BT, segments_BT
        )
        return (mtp.logits(config.arch, params, hidden_MBTD) @ mix_V)[:, 0]

    grads_MTVD = quick_jit(jax.jacrev(mixed_MT))(params["embed"]["table"])
    reached_MTU = np.abs(grads_MTVD).max(-1)[:, :, :T] > 0
    np.testing.assert_array_equal(reached_MTU, expected_reach(config, tokens_BT, segments_BT))


def expected_reach(config, tokens_BT, segments_BT):
    """Which embeddings u of the first row the state of head m at t depends on, [M, T, U]."""
    T = tokens_BT.shape[1]
    same_TU = segments_BT[0][:, None] == segments_BT[0][None, :]
    trained_MBT = mtp.trained(config.arch, jnp.asarray(tokens_BT), jnp.asarray(segments_BT))
    reach_MTU = []
    for m in range(config.heads.num_future):
        ahead = m if config.heads.kind in READS_TOKENS else 0
        everywhere = config.heads.kind == "registers" or not m or trained_MBT is None
        state_T = np.ones(T, bool) if everywhere else np.asarray(trained_MBT[m, 0])
        reach_MTU.append(np.tril(np.ones((T, T), bool), ahead) & same_TU & state_T[:, None])
    return np.stack(reach_MTU)


STRIDES = ("standalone", "masks, every third")
"""Families with masks at some positions of a row only; which ones depends on the whole row."""


@pytest.mark.parametrize("name", sampled((name for name in VARIANTS if not name.startswith(STRIDES)), *STATES))
def test_packed_equals_unpacked(name, batch):
    """Two documents in one row, in either order, give every head the states that each document has alone.

    (Positions restart in each document, but rotary scores depend on distances alone: what this needs is the mask.)
    Breaks without the segment mask, or if a head is handed another's states.
    """
    hidden_MBTD = np.asarray(apply(VARIANTS[name].arch, random_params(VARIANTS[name]), *batch))
    for one, other in (
        (hidden_MBTD[:, 0, :5], hidden_MBTD[:, 2, :5]),
        (hidden_MBTD[:, 0, 5:8], hidden_MBTD[:, 3, :3]),
        (hidden_MBTD[:, 1, :3], hidden_MBTD[:, 3, :3]),
        (hidden_MBTD[:, 1, 3:8], hidden_MBTD[:, 2, :5]),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", sampled(VARIANTS, *STATES, grid=[*KINDS, "parallel, mixed tap", "tap-0", "registers, in windows"])
)
def test_dropping_the_heads_leaves_the_language_model(name, batch):
    """apply(params without heads) = apply(params)[:1], bit for bit. Heads differ from it and from each other.

    Breaks if anything that a head does reaches the next-token path, or if heads share their parameters.
    """
    config = VARIANTS[name]
    params = random_params(config)
    whole_MBTD = apply(config.arch, params, *batch)
    trunk = {key: value for key, value in params.items() if key != "heads"}
    np.testing.assert_array_equal(apply(config.arch, trunk, *batch), whole_MBTD[:1])
    gaps = [np.abs(one - other).max() for one, other in itertools.combinations(whole_MBTD, 2)]
    # Registers are one state for all heads; which of them it counts for differs by position.
    assert min(gaps if config.heads.kind != "registers" else gaps[: len(whole_MBTD) - 1]) > 0.1


@pytest.mark.grid
@pytest.mark.parametrize("kind", sampled(KINDS, "sequential", "masks", others="slow"))
def test_silent_heads_train_the_language_model(kind, batch):
    """w_m = 0 for m >= 1: loss and gradient of everything but the heads are those of the model without heads, bit for
    bit, and the heads' own gradient is exactly 0. Masks and registers go through the model's own blocks, which XLA may
    fuse in another way then: to 1e-5.

    Breaks if head weights are dropped from `head_scale`, or if a head's parameters reach the next-token path.
    """
    config, plain = small_config(heads=heads_of(kind)), small_config(heads={"kind": kind, "num_future": 1})
    params = random_params(config)
    trunk = {key: value for key, value in params.items() if key != "heads"}

    @functools.partial(fused_jit, static_argnums=(0, 1))
    def value_and_grad(config, head_weights, params):
        def loss(params):
            targets_MBT, weights_MBT = make_targets(batch[0], batch[2], config.heads.num_future)
            hidden_MBTD = mtp.apply(config.arch, params, *batch)
            scale_M = head_scale(jnp.sum(weights_MBT, (1, 2)), head_weights)
            spec = XentSpec(chunk_bytes=4 * 24 * 7)
            return mtp_loss(
                hidden_MBTD, mtp.unembeddings(config.arch, params), targets_MBT, weights_MBT, scale_M, spec
            )[0]

        return jax.value_and_grad(loss)(params)

    expected, expected_grads = value_and_grad(plain, (1.0,), trunk)
    loss, grads = value_and_grad(config, (1.0, 0.0, 0.0), params)
    jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf, 0), grads.pop("heads"))
    exact = {"rtol": 0, "atol": 0}
    near = {"rtol": 1e-5, "atol": 1e-7} if kind in ("masks", "registers") else exact
    np.testing.assert_allclose(loss, expected, **near)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **near), grads, expected_grads)


STARTS = {
    "copied last block": {"tap": -1, "init": "copy_block"},
    "zero blocks at the top": {"tap": 2, "init": "zero", "layers": 2},
    "zero chain": {"kind": "causal", "tap": 2, "init": "zero"},
    "zero chain from afar": {"kind": "anticausal", "tap": 2, "init": "zero"},
    "zero residual map": {"kind": "linear", "residual": True, "tap": 2, "init": "zero"},
    "medusa, as published": {"kind": "medusa", "tap": 2, "tap_norm": True, "norm": "none", "unembed": "own"},
    "zero sequence": {"kind": "sequential", "tap": 2, "init": "zero"},
    "zero recursion": {"kind": "recursive", "tap": 2, "init": "zero", "concat": "hidden_first", "chain": "post_norm"},
}


@pytest.mark.parametrize(
    "name",
    sampled(
        STARTS,
        "copied last block",
        grid=("zero blocks at the top", "zero residual map", "medusa, as published", "zero sequence"),
    ),
)
def test_heads_that_start_as_the_language_model(name):
    """logits of head m = those of head 0: with a copy of the last block over its input (Gloeckle's symmetry), and with
    heads that pass on the state that they read at the top.

    Breaks if heads read another state, miss the final norm, copy another block, or if `zero` leaves anything in.
    """
    config = small_config(heads=STARTS[name])
    params = quick_jit(functools.partial(mtp.init, config.arch))(jax.random.key(0))
    hidden_MBTD = apply(config.arch, params, *rows(FIRST, SECOND, length=10))
    logits_MBTV = mtp.logits(config.arch, params, hidden_MBTD)
    for m in range(1, config.heads.num_future):
        np.testing.assert_allclose(logits_MBTV[m], logits_MBTV[0], rtol=1e-4, atol=1e-4)


def test_copy_block_copies_the_block_that_it_names():
    """heads/blocks = block `init_block` for every head and layer. Breaks if `init_block` is ignored."""
    config = small_config(heads={"init": "copy_block", "init_block": -2, "layers": 2})
    params = quick_jit(functools.partial(mtp.init, config.arch))(jax.random.key(0))
    jax.tree.map(
        lambda own, trunk: np.testing.assert_array_equal(own, np.stack([trunk[0]] * 4)),
        params["heads"]["blocks"],
        params["blocks"],
    )


@pytest.mark.grid
@pytest.mark.parametrize(("model", "heads"), [(False, True), (True, False)])
def test_copied_blocks_keep_their_norms(model, heads):
    """A copy of the last block over its input is head 0, also where heads say 1 + w and the model w, or the reverse.

    Breaks if the scales are copied as they are.
    """
    config = small_config({"norm_plus_one": model}, {"init": "copy_block", "norm_plus_one": heads})
    params = quick_jit(functools.partial(mtp.init, config.arch))(jax.random.key(0))
    logits_MBTV = mtp.logits(config.arch, params, apply(config.arch, params, *rows(FIRST, SECOND, length=10)))
    np.testing.assert_allclose(logits_MBTV[1], logits_MBTV[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("length", "stride"), [(8, 3), (7, 4), (10, 10)])
def test_masks_stand_everywhere_in_turn(length, stride):
    """Over rows of random tokens every position is an anchor now and then, in a row every `stride`-th; elsewhere heads
    have no target. Breaks if the positions behind the last whole stride are left out.
    """
    config = small_config(heads={"kind": "masks", "mask_stride": stride})
    tokens_BT = np.random.default_rng(0).integers(0, 24, (200, length))
    trained_MBT = np.asarray(mtp.trained(config.arch, tokens_BT, np.ones_like(tokens_BT)))
    assert trained_MBT[0].all() and trained_MBT[1:].any((0, 1)).all()
    np.testing.assert_array_equal(trained_MBT[1], trained_MBT[2])
    gaps = [np.diff(np.flatnonzero(row)) for row in trained_MBT[1]]
    assert {int(gap) for row in gaps for gap in row} <= {stride}
    assert all(row.sum() >= length // stride for row in trained_MBT[1])


@pytest.mark.grid
@pytest.mark.parametrize("name", ["masks, every third position", "registers"])
def test_states_everywhere(name):
    """`everywhere` gives every head's own state at every position, and the states of training where those are.

    Breaks if training's choice of positions or distances gets into what is shown.
    """
    config, batch = small_config(heads=heads_of(name)), rows(FIRST, SECOND, length=10)
    params = random_params(config)
    here_MBT = np.asarray(mtp.trained(config.arch, batch[0], batch[2])) & (batch[2] > 0)
    whole_MBTD = apply(config.arch, params, *batch, everywhere=True)
    np.testing.assert_allclose(apply(config.arch, params, *batch)[here_MBT], whole_MBTD[here_MBT], rtol=1e-5, atol=1e-5)
    assert (np.abs(whole_MBTD[1] - whole_MBTD[2]).max(-1) > 1e-2)[batch[2] > 0].all()
    if name.startswith("masks"):
        every = small_config(heads={"kind": "masks"})
        np.testing.assert_allclose(whole_MBTD, apply(every.arch, params, *batch), rtol=1e-5, atol=1e-5)


@pytest.mark.grid
def test_norms_of_one_plus_w():
    """With every norm scale w - 1, `norm_plus_one` for model and heads gives the states of plain norms w.

    Breaks without `scale + 1`, or if the heads' own norms follow the model's setting.
    """
    own = {"kind": "sequential", "norm": "own"}
    plain = small_config(model={"qk_norm": True}, heads=own)
    shifted = small_config(model={"qk_norm": True, "norm_plus_one": True}, heads={**own, "norm_plus_one": True})
    params, batch = random_params(plain), rows(FIRST, SECOND, length=10)
    less = jax.tree_util.tree_map_with_path(lambda path, x: x - ("scale" in str(path)), params)
    np.testing.assert_allclose(
        apply(shifted.arch, less, *batch), apply(plain.arch, params, *batch), rtol=1e-5, atol=1e-5
    )
    fresh = quick_jit(functools.partial(mtp.init, shifted.arch))(jax.random.key(0))
    assert not np.any(fresh["heads"]["norm"]["scale"]) and not np.any(fresh["final_norm"]["scale"])


def test_mixed_tap():
    """The tap is sum_l softmax(w)_l h_l / rms(h_l) over the embedding and every block's output; with all the weight on
    one of them it is that state, normed. Breaks if the embedding or the last block is left out, or without softmax.
    """
    config, batch = small_config(heads={"kind": "linear", "tap_mix": True}), rows(FIRST, length=5)
    params = random_params(config)
    for layer in range(3):
        mix_L = jnp.full((3,), -100.0).at[layer].set(0.0)
        mixed = params | {"heads": params["heads"] | {"tap_mix": mix_L}}
        one = small_config(heads={"kind": "linear", "tap": layer, "tap_norm": True})
        unit = params | {"final_norm": {"scale": jnp.ones(16)}, "heads": {"map": params["heads"]["map"]}}
        expected = apply(one.arch, unit, *batch)[1:]
        np.testing.assert_allclose(
            apply(config.arch, mixed | {"final_norm": unit["final_norm"]}, *batch)[1:], expected, rtol=1e-4, atol=1e-4
        )


def test_tap_norm_is_the_final_norm():
    """With tap = 0 and a table that the final norm leaves alone, tap_norm changes nothing; with another scale, it does.

    Breaks if `tap_norm` applies a norm of its own or is ignored.
    """
    config = small_config(heads={"tap": 0})
    normed = small_config(heads={"tap": 0, "tap_norm": True})
    params, batch = random_params(config), rows(FIRST, length=5)
    scale_D = params["final_norm"]["scale"]
    table_VD = params["embed"]["table"] / jnp.sqrt(jnp.mean(params["embed"]["table"] ** 2, -1, keepdims=True))
    unit = params | {"embed": {"table": table_VD}}
    scaled = params | {"embed": {"table": table_VD * scale_D[None, :]}}
    heads_of_normed = apply(normed.arch, unit, *batch)[1:]
    np.testing.assert_allclose(heads_of_normed, apply(config.arch, scaled, *batch)[1:], rtol=1e-4, atol=1e-4)


@functools.partial(quick_jit, static_argnums=0)
def value_and_grad(config, params, batch):
    """A scalar of all heads' states and its gradient."""
    return jax.value_and_grad(lambda params: jnp.sum(jnp.sin(mtp.apply(config.arch, params, *batch))))(params)


@pytest.mark.grid
def test_lora_adds_to_every_matrix_behind_the_gate():
    """A block with LoRA factors = the block with W + alpha / R A B, behind `lora_from`, and the bare block before it.

    Breaks without alpha / R, with the factors of one matrix left out, or without the gate.
    """
    config = small_config(heads={"kind": "masks", "lora_rank": 3, "lora_alpha": 5.0})
    first = lambda tree: jax.tree.map(lambda leaf: leaf[0], tree)  # noqa: E731
    params = mtp.with_constants(config.arch, random_params(config))
    block, factors = first(params["blocks"]), first(params["heads"]["lora"])
    assert {layer: set(pairs) for layer, pairs in factors.items()} == {
        "attn": {"q", "k", "v", "o"},
        "mlp": {"gate", "up", "down"},
    }
    merged = {layer: dict(tree) for layer, tree in block.items()}
    for layer, pairs in factors.items():
        for name, pair in pairs.items():
            merged[layer][name] += (5 / 3 * pair["a"] @ pair["b"]).reshape(merged[layer][name].shape)
    x_BTD = np.random.default_rng(0).standard_normal((1, 4, 16)).astype(np.float32)
    positions_BT, given = np.arange(4)[None], lora.collection(factors, 5.0)

    @functools.partial(quick_jit, static_argnums=0)
    def run(module, given):
        return module.apply(given, x_BTD, positions_BT, None)

    whole, bare = (run(Block(config.model), variables(tree)) for tree in (merged, block))
    actual = run(Block(config.model), variables(block) | given)
    np.testing.assert_allclose(actual, whole, rtol=1e-5, atol=1e-6)
    gated = run(Block(config.model, lora_from=3), variables(block) | given)
    np.testing.assert_array_equal(gated[:, :3], bare[:, :3])
    assert not np.allclose(gated[:, 3], bare[:, 3])


@pytest.mark.grid
@pytest.mark.parametrize(
    "heads", sampled([{"tap": 0}, {"kind": "masks"}], {"tap": 0}, others="slow"), ids=["blocks", "masks"]
)
def test_remat_changes_no_number(heads):
    """Value and gradient under every policy equal those without. (No block below the tap: one scan less.)

    Breaks if the rematerialised function reads anything that changes between its two runs.
    """
    heads, batch = heads | {"num_future": 2}, rows(FIRST, SECOND, length=10)
    params = random_params(small_config(heads=heads))
    plain = value_and_grad(small_config(heads=heads), params, batch)
    for remat in lm.REMAT_POLICIES:
        other = value_and_grad(small_config({"remat": remat}, heads), params, batch)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), other, plain)


@pytest.mark.grid
def test_remat_recomputes_what_it_says():
    """Matrix products in the gradient's trace, per block: a block has 7 with parameters and 2 of attention.

    none: 9 forward, 18 backward, 7 of them in a second form for accelerators, of which one runs. dots: attention's 2
    again, because its result is not kept. block and offload: all but the last one again, whose result only the next
    block needs; offload keeps what blocks read in the host's memory, and the others nothing. Breaks without the policy
    in `rematerialised`, and if `linear` hides its product from the policy.
    """
    batch, blocks = rows(FIRST, length=5), 3  # Below the tap, above it, heads: one scanned body each.

    def products(remat):
        config = small_config(model={"remat": remat})
        params = random_params(config)
        traced = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(mtp.apply(config.arch, params, *batch))))(params)
        kinds = [equation.primitive.name for equation in equations(traced)]
        moved = {str(result.memory_space) for result in results(traced) if hasattr(result, "memory_space")}
        return kinds.count("dot_general"), any("Host" in space for space in moved)

    assert {remat: products(remat) for remat in ("none", *lm.REMAT_POLICIES)} == {
        "none": (blocks * 34, False),
        "dots": (blocks * (34 + 2), False),
        "block": (blocks * (34 + 8), False),
        "offload": (blocks * (34 + 8), True),
    }


@pytest.mark.grid
def test_remat_of_masks_recomputes_what_it_says():
    """The same for the two streams of masks: 7 products with parameters each, and of attention 2 for the tokens and 4
    for the masks; weight gradients stand there in two forms. Breaks if masks have a policy of their own.
    """
    batch = rows(FIRST, length=5)

    def products(remat):
        config = small_config(model={"remat": remat}, heads={"kind": "masks"})
        params = random_params(config)
        traced = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(mtp.apply(config.arch, params, *batch))))(params)
        return sum(equation.primitive.name == "dot_general" for equation in equations(traced))

    assert (products("none"), products("dots")) == (3 * 20 + 14, 3 * 20 + 14 + 6)


def test_softcap_and_unembedding():
    """logits = c tanh(h W^T / c) in float32, with W the embedding if tied and the unembedding if not.

    Breaks without the soft cap in `trunk.project`, or if an untied model multiplies by its embedding.
    """
    for model, name in (({"logit_softcap": 2.0}, "embed"), ({"tie_embeddings": False}, "unembed")):
        config = small_config(model=model | {"dtype": "bfloat16"})
        params = random_params(config)
        hidden_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 16)), jnp.bfloat16)
        table_VD = np.asarray(params[name]["table"].astype(jnp.bfloat16), np.float64)
        expected_BTV = np.asarray(hidden_BTD, np.float64) @ table_VD.T
        if config.model.logit_softcap:
            expected_BTV = 2 * np.tanh(expected_BTV / 2)
        actual_BTV = trunk.logits(config.arch, params, hidden_BTD)
        assert actual_BTV.dtype == jnp.float32
        np.testing.assert_allclose(actual_BTV, expected_BTV, rtol=1e-5, atol=1e-5)


def test_norm_statistics_are_float32():
    """norm(x) = scale x / sqrt(mean(x^2) + eps), rounded to bfloat16 once, at the end.

    Breaks without `astype(jnp.float32)` of x or of the scale, or without eps (x = 0).
    """
    config = small_config(model={"dtype": "bfloat16", "norm_eps": 1e-2})
    params = random_params(config)
    x_BTD = np.random.default_rng(0).standard_normal((2, 3, 16)) * np.array([1e3, 1e-3])[:, None, None]
    x_BTD = jnp.asarray(x_BTD, jnp.bfloat16).at[0, 0].set(0)
    x64 = np.asarray(x_BTD, np.float64)
    scale_D = np.asarray(params["final_norm"]["scale"], np.float64)
    expected_BTD = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-2) * scale_D
    actual_BTD = lm.final_norm(config.model, params, x_BTD)
    assert actual_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual_BTD, np.float64), expected_BTD, rtol=2**-8, atol=1e-9)
