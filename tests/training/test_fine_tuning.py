"""The fine-tuning recipes of `configs/`, tiny. Each docstring names the line whose deletion breaks the test."""

import jax
import numpy as np
import pytest
from reference.chat_task import tiny, write_chats
from reference.families import heads_of
from reference.models import SMALL, random_params
from reference.quick import quick_jit
from reference.stepping import batch_of
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.errors import UserError
from mtp_jax.loading import load
from mtp_jax.losses.mtp import head_scale
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train
from mtp_jax.training.objectives import batch_targets, total_loss, xent_spec
from mtp_jax.training.state import joined, split_params
from mtp_jax.trees import by_path

HEADS_STAND_STILL = "^(?!heads/)"


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in by_path(tree).items()}


def gradient_of_trunk(config):
    """The gradient of all trained parameters outside of heads."""
    mesh = sharding.make_mesh(config.mesh)
    learned, rest = split_params(config, random_params(config))
    batch = batch_of(config)

    def loss(learned):
        params = joined(learned, rest)
        targets = batch_targets(config, params, batch)
        scale_M = head_scale(targets.weights_MBT.sum((1, 2)), config.head_weights)
        return total_loss(config, xent_spec(config, mesh), params, batch, targets, targets.weights_MBT[0], scale_M)[0]

    gradient = quick_jit(jax.grad(loss))(learned)
    return by_path({name: tree for name, tree in gradient.items() if name != "heads"})


@pytest.mark.parametrize("name", sampled(["parallel", "sequential", "medusa", "linear"], "parallel"))
def test_frozen_heads_pass_the_gradient_on(name):
    """The gradient of the trunk through frozen heads alone (head 0 has weight 0) is that through heads which learn, and
    is zero nowhere. Breaks with a `stop_gradient` for heads that are not trained."""
    sections = {"model": SMALL, "heads": heads_of(name) | {"tap": 2}, "loss": {"head_weights": (0.0, 1.0, 0.5)}}
    small = sections | {"data": {"seq_len": 12}}
    frozen = gradient_of_trunk(tiny_config(**small, train={"batch_size": 4, "trainable": HEADS_STAND_STILL}))
    whole = gradient_of_trunk(tiny_config(**small, train={"batch_size": 4}))
    assert frozen.keys() == whole.keys()
    for path, gradient in frozen.items():
        np.testing.assert_allclose(gradient, whole[path], rtol=1e-5, atol=1e-7)
        assert np.any(gradient != 0), path


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a task, a model without heads, and its heads of phase 1."""
    place = tmp_path_factory.mktemp("fine_tuning")
    task = write_chats(place / "task.jsonl")
    # A little trained, so that the model is not at its first random values.
    plain = {"train__init_from": "", "train__patience": 0, "optim__learning_rate": 1e-2, "data__source": str(task)}
    run(tiny("next_token_full", **plain), place / "model")
    run(from_model(place, "caft_heads"), place / "heads")
    return place


def from_model(place, name, **changes):
    return tiny(name, data__source=str(place / "task.jsonl"), train__init_from=str(place / "model"), **changes)


def from_heads(place, name, **changes):
    return tiny(name, data__source=str(place / "task.jsonl"), train__init_from=str(place / "heads"), **changes)


def test_phase_1(place):
    """Heads learn, and the model keeps every bit. Each head began as a copy of the second last block, block 1 of 3: it
    has moved by at most the learning rate in each of four steps of AdamW.

    Breaks if `init_block` is not read.
    """
    model = load(place / "model").params
    params = load(place / "heads").params
    assert bits({name: params[name] for name in model}) == bits(model)
    for path, head in by_path(jax.device_get(params["heads"]["blocks"])).items():
        block = np.asarray(by_path(model["blocks"])[path])
        assert np.abs(head - block[1]).max() <= 4.1e-4
        assert not path.endswith("/q") or np.abs(head - block[2]).max() > 0.01


def test_phase_2_with_adapters(place, tmp_path):
    """Adapters learn through frozen heads: the heads keep every bit, the merged blocks of the model change. Step s has
    the weights 1 and 0.01 sin((1 - s/T) pi/2) 0.8^m. Only the assistant's tokens are learned.

    Breaks if `init_heads="same"` makes new heads.
    """
    result = run(from_heads(place, "caft_lora", optim__learning_rate=1e-2), tmp_path)
    before = load(place / "heads").params
    after = load(tmp_path).params
    assert bits(after["heads"]) == bits(before["heads"])
    assert bits(after["blocks"])["attn/q"] != bits(before["blocks"])["attn/q"]
    assert bits(after["embed"]) == bits(before["embed"])
    weights = np.array([record["head_weight"] for record in read_metrics(tmp_path) if "head_weight" in record])
    rsine = np.sin((1 - np.arange(len(weights)) / 4) * np.pi / 2)
    expected = np.concatenate([np.ones((len(weights), 1)), 0.01 * rsine[:, None] * 0.8 ** np.arange(1, 5)], axis=1)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)
    assert result.best_step in (2, 4)
    learned = result.corpus.train
    assert 0 < np.mean(np.asarray(learned.learn)) < 0.6


@pytest.mark.grid
def test_heads_warm_up_before_adapters(place, tmp_path):
    """Phase 2 with three of four steps for heads alone: adapters start at 0 and take one step of AdamW, which is the
    learning rate at most. Breaks if the stage has adapters that learn."""
    stage = {"train__trainable": ("heads", "lora"), "train__heads_first": 3}
    result = run(from_heads(place, "caft_lora", optim__learning_rate=1e-2, **stage), tmp_path)
    moved = [
        np.abs(leaf).max()
        for path, leaf in by_path(jax.device_get(result.state.params["lora"])).items()
        if path.endswith("/b")
    ]
    assert len(moved) == 7
    assert min(moved) > 0 and max(moved) <= 1.01e-2
    heads = load(place / "heads").params["heads"]
    assert bits(load(tmp_path).params["heads"])["blocks/attn/q"] != bits(heads)["blocks/attn/q"]


@pytest.mark.grid
@pytest.mark.parametrize("name", ["next_token_lora", "next_token_full", "naive_multi_token", "joint_heads"])
def test_other_recipes(place, tmp_path, name):
    """They start from the model, learn, and leave a model that opens and evaluates."""
    changes = {"train__heads_first": 1} if name == "joint_heads" else {}
    result = run(from_model(place, name, optim__learning_rate=1e-3, **changes), tmp_path)
    assert result.finished and result.best_step in (2, 4)
    before, after = load(place / "model").params, load(tmp_path).params
    assert bits(after["blocks"])["attn/q"] != bits(before["blocks"])["attn/q"]
    if name == "joint_heads":
        frozen = {"train__trainable": "heads", "train__heads_first": 0}
        run(from_model(place, name, **frozen), tmp_path / "frozen")
        assert bits(load(tmp_path / "frozen").params["blocks"]) == bits(before["blocks"])


@pytest.mark.grid
def test_another_tap_in_phase_2(place, tmp_path, capsys):
    """Phase 2 may read the normed last state, as the reference code does; a line says that the heads learned with
    another one. All parameters but the heads learn. Another setting of heads is refused.

    Breaks without `FREE_OF_HEADS`.
    """
    config = from_heads(place, "caft_full", heads__tap=3, heads__tap_norm=True)
    with RunConsole() as console:
        train(config, tmp_path / "run", console)
    said = " ".join(capsys.readouterr().err.split())
    assert "heads.tap=3, but the heads have learned with -1" in said
    assert "heads.tap_norm=True, but the heads have learned with False" in said
    params = load(tmp_path / "run").params
    assert bits(params["heads"]) == bits(load(place / "heads").params["heads"])
    with pytest.raises(
        UserError, match=r"^heads.norm='own', but the run of train.init_from=.* has heads.norm='shared'"
    ):
        run(from_heads(place, "caft_full", heads__norm="own"), tmp_path / "other")


def test_phase_2_needs_heads(place, tmp_path):
    """A source without heads is refused. Breaks without the check in `check_start`."""
    with pytest.raises(UserError, match=r"^train.init_heads='same', but the run of train.init_from=.* has no heads"):
        run(from_model(place, "caft_full"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_new_heads_that_stay_new_are_pointed_out(place, tmp_path, capsys):
    """Phase 2 without `init_heads="same"` says that its heads know nothing. Breaks without `remarks`."""
    with RunConsole() as console:
        train(from_model(place, "caft_full", train__init_heads="new", train__steps=1), tmp_path, console)
    said = " ".join(capsys.readouterr().err.split())
    assert "train.trainable='^(?!heads/)' trains no head, and the heads are new" in said
