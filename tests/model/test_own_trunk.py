"""A trunk from outside the package, which is no decoder LM, trains and decodes with heads: nothing in `mtp_jax/` is
changed for it."""

import dataclasses
import functools
import types
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import loaded, loud_params, scripted, slow_greedy, with_script
from reference.models import random_params, rows, small_config
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.axes import EMBED, LAYERS, VOCAB
from mtp_jax.cli.common import parse_over
from mtp_jax.config import SECTIONS, Config, MeshConfig, ModelConfig, differences, from_json, override, to_json
from mtp_jax.cost.flops import step_flops
from mtp_jax.decode.state import slots_of
from mtp_jax.errors import UserError
from mtp_jax.model import lm, mtp, trunk
from mtp_jax.model.cache import fewest_slots, grow_caches, init_cache
from mtp_jax.model.given import NewTokens, TokenRows
from mtp_jax.model.trunk import TRUNKS
from mtp_jax.training.start import _check_same
from mtp_jax.training.step import compile_steps, random_batch

T = 12


@dataclasses.dataclass(frozen=True)
class RunningMean:
    """A `model` section: each layer adds a map of the mean of all states so far."""

    kind: str = "running_mean"
    vocab_size: int = 40
    num_layers: int = 2
    d_model: int = 16
    max_seq_len: int = 64
    dtype: str = "float32"
    param_dtype: str = "float32"
    logit_scale: float = 0.5
    logit_softcap: float = 20.0
    is_stack = False
    split_fields = ("vocab_size",)
    unembedding_path = "words"
    frozen_models = types.MappingProxyType({})
    stacks = types.MappingProxyType({})

    @property
    def block(self):
        """Blocks of heads."""
        return ModelConfig(d_model=self.d_model, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16)

    def forward_flops(self, tokens, seq_len):
        return 2 * tokens * self.num_layers * self.d_model**2


class Sums(NamedTuple):
    """A layer's cache: the sum of the states up to every position, so that going back is moving the cursor."""

    sum_BSD: jax.Array

    @property
    def slots(self):
        return self.sum_BSD.shape[1]

    def enlarged(self, slots):
        return Sums(jnp.pad(self.sum_BSD, ((0, 0), (0, slots - self.slots), (0, 0))))


def init(model, key):
    V, D, L = model.vocab_size, model.d_model, model.num_layers
    table_VD, w_LDD = jax.random.normal(key, (V, D)), jax.random.normal(key, (L, D, D)) / D
    return {
        "words": nn.LogicallyPartitioned(table_VD, (VOCAB, EMBED)),
        "blocks": {"w": nn.LogicallyPartitioned(w_LDD, (LAYERS, None, EMBED))},
        "end_norm": {"scale": nn.LogicallyPartitioned(jnp.ones(D), (EMBED,))},
    }


def with_constants(model, params):
    return params


def embed(model, params, tokens_BT):
    return params["words"][tokens_BT]


def run(model, params, given, taps):
    x_BTD, _, positions_BT, segment_ids_BT = given
    seen_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    seen_BTS &= jnp.tril(jnp.ones(seen_BTS.shape[1:], bool))[None]
    mean_BTS = seen_BTS / (positions_BT[..., None] + 1)
    states = [x_BTD]
    for w_DD in params["blocks"]["w"]:
        states.append(states[-1] + mean_BTS @ states[-1] @ w_DD)
    return states[-1], tuple(states[tap] for tap in taps)


def final_norm(model, params, x):
    rms = jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    return x / rms * params["end_norm"]["scale"].reshape((1,) * (x.ndim - 1) + (-1,))


def unembedding(model, params):
    return jnp.roll(params["words"], 7, axis=0)  # not the embedding, so that greedy output does not repeat one token


def decode_view(model, params, replace):
    return params | {"blocks": [{"w": w_DD} for w_DD in replace(tuple, params["blocks"]["w"])]}


def init_caches(model, batch, slots):
    return [Sums(jnp.zeros((batch, slots, model.d_model))) for _ in range(model.num_layers)]


def decode(model, view, new, caches, taps):
    x_BQD, _, start_B = new
    states, written = [x_BQD], []
    write = jax.vmap(lambda old_SD, new_QD, start: jax.lax.dynamic_update_slice(old_SD, new_QD, (start, 0)))
    count_BQ1 = start_B[:, None, None] + 1 + jnp.arange(x_BQD.shape[1])[None, :, None]
    for layer, cache in zip(view["blocks"], caches, strict=True):
        before_B1D = jnp.take_along_axis(cache.sum_BSD, jnp.maximum(start_B - 1, 0)[:, None, None], axis=1)
        before_B1D = jnp.where(start_B[:, None, None] > 0, before_B1D, 0)
        sum_BQD = before_B1D + jnp.cumsum(states[-1], axis=1)
        written.append(Sums(write(cache.sum_BSD, sum_BQD, start_B)))
        states.append(states[-1] + sum_BQD / count_BQ1 @ layer["w"])
    return states[-1], tuple(states[tap] for tap in taps), written


NAMES = (init, with_constants, embed, run, final_norm, unembedding, decode_view, init_caches, decode)
FUNCTIONS = types.SimpleNamespace(**{function.__name__: function for function in NAMES})


@pytest.fixture
def section():
    """The section of a registered trunk."""
    trunk.register(RunningMean, FUNCTIONS)
    yield RunningMean
    del SECTIONS["running_mean"], TRUNKS[RunningMean]


def own_config(section, **heads):
    whole = tiny_config(heads={"num_future": 3, **heads}, train={"batch_size": 2}, data={"seq_len": 16})
    return dataclasses.replace(whole, model=section())


def test_a_trunk_of_your_own(section):
    """A training step changes all of its parameters; head 0's logits are those of the formula, written out; tokens with
    heads' drafts and with drafts that are right 0, 1 or 2 times = tokens of plain decoding = arg-max of the whole
    forward, token by token. Breaks where a caller of the trunk takes a function of `lm` instead; in the trunk above,
    without the sum that stands before the round."""
    config = own_config(section, tap=1, unembed="own")
    steps = compile_steps(config, sharding.make_mesh(MeshConfig()))
    state = steps.init(jax.random.key(0))
    before = jax.device_get(state.params)
    state, _ = steps.train(state, random_batch(config))
    changed = jax.tree.map(lambda old, new: bool((old != np.asarray(new)).any()), before, state.params)
    assert all(jax.tree.leaves(changed))

    params = loud_params(config)
    model = loaded(config, params)
    ids = [3, 1, 4, 1, 5]
    x_TD = np.asarray(params["words"])[ids]
    for w_DD in np.asarray(params["blocks"]["w"]):
        x_TD = x_TD + np.cumsum(x_TD, axis=0) / np.arange(1, 6)[:, None] @ w_DD
    x_TD = x_TD / np.sqrt(np.mean(x_TD**2, axis=1, keepdims=True)) * np.asarray(params["end_norm"]["scale"])
    logits_TV = 20 * np.tanh(0.5 * x_TD @ np.roll(params["words"], 7, axis=0).T / 20)
    np.testing.assert_allclose(model.logits([ids])[0, 0], logits_TV, rtol=1e-4, atol=1e-4)

    prompts = [ids, [7, 30]]
    slow = [slow_greedy(config, params, prompt, 14) for prompt in prompts]
    assert min(len(set(tokens)) for tokens in slow) > 2
    assert mtp_jax.generate(model, prompts, max_new_tokens=12, draft="none").tokens == [row[:12] for row in slow]
    drafted = mtp_jax.generate(model, prompts, max_new_tokens=12, draft="heads")
    assert drafted.tokens == [row[:12] for row in slow]
    assert drafted.stats.drafted > 0
    truth = [prompt + tokens for prompt, tokens in zip(prompts, slow, strict=True)]
    right = with_script(model, truth, [[0, 2, 1, 0, 2], [1, 0, 0, 2, 2]])
    assert mtp_jax.generate(right, prompts, max_new_tokens=12, draft=scripted(2)).tokens == [row[:12] for row in slow]


def test_caches_of_your_own_grow():
    """A trunk's own caches are enlarged together with the `LayerCache`s of heads, keep their entries, and say how many
    slots there are. Breaks if `grow_caches` looks for `LayerCache` alone."""
    small = init_caches(RunningMean(), 1, 3), init_cache(1, 4, 1, 2, jnp.float32)
    small = jax.tree.map(jnp.ones_like, small)
    assert fewest_slots(small, otherwise=7) == 3
    (sums, _), layer = grow_caches(small, 5)
    assert (sums.slots, layer.slots, fewest_slots(small[:0], otherwise=7)) == (5, 5, 7)
    np.testing.assert_array_equal(sums.sum_BSD[0, :, 0], [1, 1, 1, 0, 0])
    # A trunk without caches: those of the heads decide when to grow. Breaks if `slots_of` asks the trunk's alone.
    state = types.SimpleNamespace(caches=(), drafter_cache=(layer,), hook_caches=(), tokens_BS=np.zeros((1, 64)))
    assert slots_of(state) == 5


def test_config_of_your_own(section, tmp_path):
    """JSON, an override and the flags of a command keep the section's type; two sections differ in all of their fields;
    a run starts from its own kind. Breaks without `section_type` in `_build`, or where `parse_over` takes the fields of
    `ModelConfig`."""
    config = own_config(section)
    assert from_json(to_json(config)) == config
    assert override(config, {"model.num_layers": 3}).model == section(num_layers=3)
    assert parse_over(config, Config, ["--model.num-layers", "3"], "x", "x")[1].model == section(num_layers=3)
    differ = differences(tiny_config(), config)
    assert {"model.kind: absent -> running_mean", "model.d_ff: 24 -> absent"} <= set(differ)
    with pytest.raises(
        UserError, match=r"model is a RunningMean, but the run of train.init_from='x' has a ModelConfig"
    ):
        _check_same("model", ModelConfig(), section(), "x")
    alone = own_config(section, num_future=1)
    tokens = 2 * 16
    assert step_flops(alone, 2, 16) == 3 * (section().forward_flops(tokens, 16) + 2 * tokens * 16 * 40)
    with pytest.raises(UserError, match=r"model.kind='running_mean' cannot be exported"):
        mtp_jax.export_model(loaded(config, {}), tmp_path / "out", notify=str)


def test_what_is_refused(section):
    """One line each. Breaks without the check that the line is about."""
    with pytest.raises(UserError, match=r"heads.kind='masks' runs its tokens through the model's blocks, and Runn"):
        own_config(section, kind="masks")
    with pytest.raises(UserError, match=r"heads.init='copy_block' copies a block of the model, and RunningMean has no"):
        own_config(section, init="copy_block")
    with pytest.raises(UserError, match=r"model.block.dtype='float32' differs from model.dtype='bfloat16'"):
        dataclasses.replace(tiny_config(), model=section(dtype="bfloat16"))
    with pytest.raises(UserError, match=r"model.block.num_kv_heads=1 does not divide over mesh.tensor=2 devices"):
        dataclasses.replace(own_config(section), mesh=MeshConfig(tensor=2))
    with pytest.raises(UserError, match="there is already a trunk 'running_mean'; use another name"):
        trunk.register(RunningMean, FUNCTIONS)
    with pytest.raises(UserError, match="ModelConfig has no field `kind` with a name as default"):
        trunk.register(ModelConfig, FUNCTIONS)
    other = dataclasses.make_dataclass("Other", [("kind", str, "other")], bases=(RunningMean,), frozen=True)
    with pytest.raises(UserError, match="trunk 'other' has no function 'init'; it needs init, with_constants, embed"):
        trunk.register(other, types.SimpleNamespace())
    with pytest.raises(UserError, match="no trunk has a model section of type Other"):
        mtp.init(dataclasses.replace(own_config(section), model=other()).arch, jax.random.key(0))
    with pytest.raises(UserError, match=r"config.model.kind is 'other', which is no registered trunk \(registered: "):
        from_json('{"model": {"kind": "other"}}')


@pytest.mark.parametrize("taps", [(2, 0, 1), ()])
def test_states_at_several_taps(taps):
    """The decoder LM's states at taps, in their order: those of `run` over a row = those of `decode` in two pieces; the
    last is that of the whole stack. Breaks without `sorted` in `cuts_at`, or if `decode` cuts the caches elsewhere."""
    config = small_config()
    params = random_params(config)
    tokens_BT, positions_BT, segment_ids_BT = rows(range(1, T + 1), length=T)

    @jax.jit
    def both(params):
        arch = config.arch
        ready = mtp.with_constants(arch, params)
        x_BTD = trunk.embed(arch, ready, tokens_BT)
        whole = trunk.run(arch, ready, TokenRows(x_BTD, tokens_BT, positions_BT, segment_ids_BT), taps)
        stack_BTD = lm.run_blocks(arch.model, ready["blocks"], x_BTD, positions_BT, segment_ids_BT)
        view, caches, pieces = mtp.decode_view(arch, params), trunk.init_caches(arch, 1, T), []
        for begin, end in ((0, 5), (5, T)):
            new = NewTokens(x_BTD[:, begin:end], tokens_BT[:, begin:end], jnp.array([begin]))
            *piece, caches = trunk.decode(arch, view, new, caches, taps)
            pieces.append(piece)
        return whole, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *pieces), x_BTD, stack_BTD

    (state_BTD, states), (decoded_BTD, decoded), x_BTD, stack_BTD = both(params)
    np.testing.assert_allclose(state_BTD, stack_BTD, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(decoded_BTD, state_BTD, rtol=1e-5, atol=1e-5)
    assert len(states) == len(decoded) == len(taps)
    for tap, one_BTD, other_BTD in zip(taps, states, decoded, strict=True):
        np.testing.assert_allclose(other_BTD, one_BTD, rtol=1e-5, atol=1e-5)
        if tap != 1:
            np.testing.assert_allclose(one_BTD, x_BTD if tap == 0 else state_BTD, rtol=1e-6, atol=1e-6)


def test_a_mix_of_states_needs_no_function(monkeypatch):
    """The mix that is made of the states at all taps = the one that the decoder LM sums up on the way, in training and
    in decoding. Breaks if `mix` leaves out the norm, or `everywhere` the last place."""
    config = small_config(heads={"tap_mix": True})
    arch = config.arch
    params = random_params(config)
    tokens_BT, positions_BT, segment_ids_BT = rows(range(1, T + 1), length=T)

    def mixes():
        ready, view = mtp.with_constants(arch, params), mtp.decode_view(arch, params)
        x_BTD, weight_L = trunk.embed(arch, ready, tokens_BT), jnp.array([0.5, 0.2, 0.3])
        given = TokenRows(x_BTD, tokens_BT, positions_BT, segment_ids_BT)
        _, whole_BTD = trunk.run_mixed(arch, ready, given, weight_L)
        caches = trunk.init_caches(arch, 1, T)
        new = NewTokens(x_BTD, tokens_BT, jnp.array([0]))
        states = trunk.decode(arch, view, new, caches, trunk.everywhere(arch))[1]
        return whole_BTD, trunk.mix(arch, states, weight_L)

    summed = jax.jit(mixes)()
    needed = types.SimpleNamespace(**{name: getattr(lm, name) for name in trunk.FUNCTIONS})
    monkeypatch.setitem(TRUNKS, ModelConfig, needed)
    made = jax.jit(functools.partial(mixes))()
    for one_BTD, other_BTD in zip(summed, made, strict=True):
        np.testing.assert_allclose(other_BTD, one_BTD, rtol=1e-5, atol=1e-5)
