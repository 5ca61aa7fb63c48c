"""Heads over a part of the vocabulary: `heads.draft_vocab`. Each docstring names the line whose deletion breaks it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.models import random_params
from reference.quick import quick_jit
from reference.stepping import batch_of, run
from reference.tiers import sampled
from reference.tiny import tiny_config, write_text

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import HeadsConfig, MeshConfig
from mtp_jax.data.draft_vocab import DraftVocab
from mtp_jax.data.pack import PackedRows
from mtp_jax.errors import UserError
from mtp_jax.losses.mtp import head_scale
from mtp_jax.losses.targets import draft_targets, make_targets
from mtp_jax.model import heads, mtp, trunk
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training import loop
from mtp_jax.training.console import RunConsole
from mtp_jax.training.objectives import batch_targets, total_loss, xent_spec

HEADS = {"kind": "sequential", "draft_vocab": 16}
LONG = {"fsdp": 2, "context": 2, "tensor": 2}
SIZE = {"model": {"vocab_size": 40, "num_layers": 1}, "data": {"seq_len": 12}, "train": {"batch_size": 3}}


def test_targets_by_hand():
    """Of the tokens 0..5 the heads predict 4, 1 and 5, at the places 0, 1 and 2. Head 0 keeps ids and weights.

    Breaks without `* there_MBT`, or if head 0 is changed too.
    """
    place_V = jnp.array([3, 1, 3, 3, 0, 2])
    targets_MBT = jnp.array([[[4, 2, 1]], [[4, 2, 1]], [[5, 0, 0]]])
    weights_MBT = jnp.array([[[1.0, 1, 1]], [[1, 1, 1]], [[1, 1, 0]]])
    ids, weights = draft_targets(targets_MBT, weights_MBT, place_V, 3)
    assert ids.tolist() == [[[4, 2, 1]], [[0, 0, 1]], [[2, 0, 0]]]
    assert weights.tolist() == [[[1, 1, 1]], [[1, 0, 1]], [[1, 0, 0]]]


def naive_loss(config, params, batch):
    """The definition: every head's logits over all tokens, of which those of the draft vocabulary are kept."""
    hidden_MBTD = mtp.apply(config.arch, params, batch["tokens"], batch["positions"], batch["segment_ids"])
    targets_MBT, weights_MBT = make_targets(batch["tokens"], batch["segment_ids"], config.heads.num_future)
    table_VD = trunk.unembedding(config.arch, params)
    ids_v, mix, total = params["draft_ids"], config.loss.distil_mix, 0.0
    for m, (hidden_BTD, target_BT, weight_BT) in enumerate(zip(hidden_MBTD, targets_MBT, weights_MBT, strict=True)):
        if m and config.heads.unembed == "own":
            log_q = jax.nn.log_softmax(hidden_BTD @ params["heads"]["unembed"]["table"][m - 1].T)
        else:
            z_BTV = hidden_BTD @ table_VD.T
            log_q = jax.nn.log_softmax(z_BTV[..., ids_v] if m else z_BTV)
        if m:
            weight_BT *= jnp.isin(target_BT, ids_v)
            target_BT = jnp.argmax(target_BT[..., None] == ids_v[None, None], axis=-1)
        term_BT = -jnp.take_along_axis(log_q, target_BT[..., None], axis=-1)[..., 0]
        if m and config.loss.distil == "kl":
            ahead_BTD = jax.lax.stop_gradient(jnp.pad(hidden_MBTD[0, :, m:], ((0, 0), (0, m), (0, 0))))
            log_p = jax.nn.log_softmax((ahead_BTD @ jax.lax.stop_gradient(table_VD).T)[..., ids_v])
            term_BT = (1 - mix) * term_BT + mix * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        total += jnp.sum(weight_BT * term_BT) / jnp.sum(weight_BT)
    return total


CASES = [("shared", "none"), ("shared", "kl"), ("own", "kl")]


@pytest.mark.parametrize(("unembed", "distil"), sampled(CASES, ("shared", "kl")))
def test_loss_and_gradient_are_those_of_the_kept_logits(unembed, distil):
    """Loss and every gradient = the definition's: softmax, targets and teacher over the N tokens alone. The weight of
    the other targets is reported. Breaks without `teacher_table`, or with the whole table for any head."""
    loss = {"distil": distil, "distil_mix": 0.5} if distil != "none" else {}
    heads = {"kind": "linear", "num_future": 2, "draft_vocab": 24, "unembed": unembed}
    config = tiny_config(**SIZE, heads=heads, loss=loss)
    params, batch = random_params(config), batch_of(config)
    ids_v = {"draft_ids": params.pop("draft_ids")}
    spec = xent_spec(config, sharding.make_mesh(MeshConfig()))

    def ours(params):
        targets = batch_targets(config, params | ids_v, batch)
        scale_M = head_scale(jnp.sum(targets.weights_MBT, axis=(1, 2)), config.head_weights)
        loss, parts = total_loss(config, spec, params | ids_v, batch, targets, targets.weights_MBT[0], scale_M)
        return loss, parts.sums

    (actual, sums), grads = quick_jit(jax.value_and_grad(ours, has_aux=True))(params)
    naive = quick_jit(jax.value_and_grad(lambda params: naive_loss(config, params | ids_v, batch)))
    expected, expected_grads = naive(params)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, expected_grads)
    targets_MBT, weights_MBT = quick_jit(make_targets, static_argnums=2)(batch["tokens"], batch["segment_ids"], 2)
    missed_MBT = weights_MBT * ~np.isin(targets_MBT, ids_v["draft_ids"])
    np.testing.assert_array_equal(sums.outside_M[1:], missed_MBT.sum((1, 2))[1:])
    assert sums.outside_M[0] == 0 < sums.outside_M[1]
    np.testing.assert_allclose(sums.means()["outside"][1], missed_MBT[1].sum() / weights_MBT[1].sum(), rtol=1e-6)


@pytest.mark.parametrize("unembed", ["shared", "own"])
def test_decoding_drafts_from_the_same_logits(unembed):
    """Head 1's logits in decoding = those of training, -inf for every token outside. Breaks with ids in any other order
    than `draft_ids`, or if the table of decoding is not transposed."""
    config = tiny_config(**SIZE, heads=HEADS | {"num_future": 2, "unembed": unembed})
    params = random_params(config)
    state_BPD = np.random.default_rng(1).standard_normal((3, 1, 16)).astype(np.float32)
    hidden_MBTD = jnp.concatenate([jnp.zeros((1, 3, 1, 16)), heads.finish(config.arch, params, state_BPD[None])])
    expected_BTV = np.asarray(mtp.logits(config.arch, params, hidden_MBTD)[1])
    actual_BPV = mtp.draft_logits(config.arch, mtp.decode_view(config.arch, params), state_BPD, 1)
    np.testing.assert_allclose(actual_BPV, expected_BTV, rtol=1e-4, atol=1e-5)
    outside = np.setdiff1d(np.arange(40), params["draft_ids"])
    assert np.isneginf(expected_BTV[..., outside]).all()
    assert np.isfinite(expected_BTV[..., params["draft_ids"]]).all()


@pytest.mark.grid
@pytest.mark.parametrize("unembed", ["shared", "own"])
@pytest.mark.parametrize("mesh", sampled([{"data": 2, "fsdp": 2, "tensor": 2}, LONG], LONG, others="slow"), ids=str)
def test_sharded_equals_unsharded(mesh, unembed):
    """Three steps on eight devices = three on one: rows of a table that is split over devices, and their gradient.

    Breaks if `draft_rows` looks up rows where only a part of them is.
    """
    heads = {"kind": "linear", "num_future": 2, "draft_vocab": 16, "unembed": unembed}
    sections = {"model": {"num_layers": 1}, "heads": heads, "optim": {"name": "adamw", "eps": 1e-3}}
    one, alone, _ = run(tiny_config(**sections))
    many, together, _ = run(tiny_config(**sections, mesh=mesh))
    np.testing.assert_allclose([m.loss for m in together], [m.loss for m in alone], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, jax.device_get(many.params), jax.device_get(one.params))


def test_the_most_frequent_tokens_are_drafted():
    """Counts 1, 3, 0, 3, 2 and N = 3: the tokens 1, 3 and 4, which are 8 of 9. Of equals the lower id stays."""
    rows = PackedRows(np.array([1, 3, 4, 1, 3, 0, 1, 3, 4], np.uint16), np.array([0]), 4, 0)
    vocab = DraftVocab.of(rows, 3, 5)
    assert vocab.ids.tolist() == [1, 3, 4]
    assert vocab.covers == 8 / 9
    assert DraftVocab.of(rows, 1, 5).ids.tolist() == [1]
    assert "3 of 5 tokens, which are 88.9% of the training text" in vocab.describe(rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with such heads, and the lines of its console."""
    directory = tmp_path_factory.mktemp("draft_vocab")
    text, lines = write_text(directory / "text", files=4), []
    with RunConsole(quiet=True) as console:
        console.note = lines.append
        config = tiny_config(text, model={"num_layers": 1}, heads=HEADS, train={"steps": 4})
        loop.train(config, directory / "run", console)
    return directory / "run", lines


@pytest.mark.grid
def test_a_run_chooses_and_keeps_them(trained):
    """The ids are those that the run's training text has most often, said on the console with their share; training
    leaves them alone. The held-out targets that they miss are in the record. Breaks without `draft_ids` in `_learns`,
    or if the run begins with `init`'s own ids."""
    workdir, lines = trained
    counts_V = np.bincount(np.load(workdir / "data" / "train.npy"), minlength=264)
    ids = np.asarray(mtp_jax.load(workdir).params["draft_ids"])
    assert sorted(counts_V[ids]) == sorted(counts_V)[-HEADS["draft_vocab"] :]
    share = f"which are {counts_V[ids].sum() / counts_V.sum():.1%} of the training text"
    assert any(f"{HEADS['draft_vocab']} of 264 tokens, {share}" in line for line in lines)
    outside = read_metrics(workdir)[-1]["heldout_outside"]
    assert outside[0] == 0 < outside[1] < 0.2


@pytest.mark.grid
def test_drafts_change_nothing(trained):
    """heads(P) = none, greedy and sampled, and heads are of use. Breaks with a token id where a place is meant."""
    model = mtp_jax.load(trained[0])
    for settings in ({}, {"temperature": 0.8, "seed": 3}):
        plain = mtp_jax.generate(model, ["def return", "the if"], max_new_tokens=24, draft="none", **settings)
        drafted = mtp_jax.generate(model, ["def return", "the if"], max_new_tokens=24, draft="heads", **settings)
        assert drafted.tokens == plain.tokens
    assert drafted.stats.tokens_per_round >= 1


@pytest.mark.grid
def test_heads_that_are_taken_over_keep_their_tokens(trained, tmp_path):
    """init_heads="same" takes the ids with the heads, whatever the new text. Breaks without `OF_HEADS`."""
    other = write_text(tmp_path / "text", files=2)
    (other / "00.txt").write_text("xyz 0123456789 " * 200)
    config = mtp_jax.start_from(trained[0], data={"source": str(other)}, train={"steps": 1, "batch_size": 4})
    with RunConsole(quiet=True) as console:
        params = loop.train(config, tmp_path / "run", console).state.params
    np.testing.assert_array_equal(params["draft_ids"], mtp_jax.load(trained[0]).params["draft_ids"])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"heads": {"draft_vocab": 264}}, "heads.draft_vocab=264 must be below model.vocab_size=264"),
        ({"heads": {"draft_vocab": -1}}, "heads.draft_vocab=-1 is negative"),
        ({"heads": {"draft_vocab": 8, "num_future": 1}}, "heads.num_future=1 has none"),
        (
            {"heads": {"draft_vocab": 9}, "mesh": {"tensor": 2}},
            "heads.draft_vocab=9 does not divide over mesh.tensor=2",
        ),
    ],
)
def test_settings_that_cannot_be(sections, message):
    """Each is one line that names the setting."""
    with pytest.raises(UserError, match=message):
        tiny_config(**sections)


@pytest.mark.grid
def test_what_cannot_leave_or_come_is_refused(trained, tmp_path):
    """No form holds such heads, and an import has no text to choose from: both are said by name, and nothing is left.
    Without the heads the model leaves as any other."""
    model = mtp_jax.load(trained[0])
    with pytest.raises(UserError, match=r"heads.draft_vocab=16: no form"):
        mtp_jax.export_model(model, tmp_path / "out", notify=str)
    assert not (tmp_path / "out").exists()
    mtp_jax.export_model(model, tmp_path / "plain", form="none", notify=str)
    plain = mtp_jax.load(tmp_path / "plain")
    np.testing.assert_allclose(plain.logits([[5, 6, 7]])[0], model.logits([[5, 6, 7]])[0], atol=1e-5)
    with pytest.raises(UserError, match=r"heads.draft_vocab=8 needs training text"):
        mtp_jax.import_model(tmp_path / "plain", tmp_path / "in", heads=HeadsConfig(draft_vocab=8), notify=str)
    assert not (tmp_path / "in").exists()
