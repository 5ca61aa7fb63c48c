"""A head family from outside the package trains, evaluates and drafts: nothing in `mtp_jax/` is changed for it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import loaded
from reference.tiny import tiny_config

import mtp_jax
from mtp_jax import sharding
from mtp_jax.axes import EMBED, LAYERS
from mtp_jax.config import FACTS, FamilyFacts, MeshConfig
from mtp_jax.errors import UserError
from mtp_jax.model import heads
from mtp_jax.model.heads import FAMILIES, base
from mtp_jax.training.step import compile_steps, random_batch


def init(arch, key, trunk):
    return {"gain": base.weight(arch, key, (base.sets(arch), 1, arch.model.d_model), (LAYERS, None, EMBED))}


def train(arch, params, rows):
    return jax.vmap(lambda gain_1D: rows.tap_BTD * (1 + gain_1D[None]))(params["heads"]["gain"])


def draft(arch, params, cache, now):
    tap_B1D = base.at_index(now.tap_BQD, now.index_B)
    return base.propose_all(
        now, [tap_B1D * (1 + gain_1D[None]) for gain_1D in params["heads"]["gain"][: now.count]]
    ), cache


@pytest.fixture
def scaled():
    """Heads that scale what they read, one factor per dimension."""
    functions = types.SimpleNamespace(init=init, train=train, init_cache=lambda *_: (), draft=draft)
    heads.register("scaled", FamilyFacts(settings=("tap", "tap_norm")), functions)
    yield "scaled"
    del FACTS["scaled"], FAMILIES["scaled"]


def test_a_family_of_your_own(scaled):
    """A training step changes its parameters; the logits of head m are those of tap * (1 + gain_m); drafted tokens are
    those of plain decoding. Breaks where a file asks for a family by name."""
    model = {"vocab_size": 40, "d_model": 16, "head_dim": 8, "d_ff": 16, "num_layers": 1, "max_seq_len": 64}
    config = tiny_config(
        model=model, heads={"kind": scaled, "num_future": 3}, train={"batch_size": 2}, data={"seq_len": 16}
    )
    steps = compile_steps(config, sharding.make_mesh(MeshConfig()))
    state = steps.init(jax.random.key(0))
    before = np.asarray(state.params["heads"]["gain"])
    state, metrics = steps.train(state, random_batch(config))
    assert np.isfinite(metrics.loss)
    assert (np.asarray(state.params["heads"]["gain"]) != before).any(axis=(1, 2)).all()
    lm = loaded(config, jax.tree.map(jnp.asarray, jax.device_get(state.params)))
    ids = [3, 1, 4, 1, 5]
    logits_MBTV = lm.logits([ids])
    plain = mtp_jax.generate(lm, [ids], max_new_tokens=8, draft="none")
    drafted = mtp_jax.generate(lm, [ids], max_new_tokens=8, draft="heads")
    assert drafted.tokens == plain.tokens
    assert drafted.stats.drafted > 0
    table_VD = state.params["embed"]["table"]
    embedded_TD = table_VD[jnp.array(ids)]  # the tap of a model of one block
    scale_D = state.params["final_norm"]["scale"]
    state_TD = embedded_TD * (1 + state.params["heads"]["gain"][1])
    rms_T1 = jnp.sqrt(jnp.mean(state_TD**2, axis=-1, keepdims=True) + config.model.norm_eps)
    np.testing.assert_allclose(
        logits_MBTV[2, 0], (state_TD / rms_T1 * scale_D[None]) @ table_VD.T, rtol=1e-4, atol=1e-4
    )


def test_a_name_is_taken_once(scaled):
    """Another family of the same name is refused, and so is a setting that the row does not list."""
    with pytest.raises(UserError, match="there is already a head family 'scaled'"):
        heads.register("scaled", FamilyFacts(()), None)
    with pytest.raises(UserError, match=r"heads.layers=2 has no effect with heads.kind='scaled'"):
        tiny_config(heads={"kind": scaled, "layers": 2})
