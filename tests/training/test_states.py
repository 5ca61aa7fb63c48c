"""Heads that learn from states on disk become what they become beside the model itself."""

import dataclasses

import jax
import numpy as np
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.config import override
from mtp_jax.errors import UserError
from mtp_jax.training import states
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train


def run(config, workdir):
    with RunConsole(quiet=True) as console:
        return train(config, workdir, console)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    source = write_text(tmp_path_factory.mktemp("corpus"))
    heads, train = {"kind": "linear", "num_future": 2}, {"trainable": "heads", "steps": 3, "grad_accum": 2}
    chosen = {"heads": heads, "model": {"num_layers": 2}, "train": train}
    return tiny_config(source, **chosen)


def test_heads_become_the_same(config, tmp_path, monkeypatch):
    """Three steps with `keep_states` give the parameters of three steps without, to 1e-5. States that lie there whole
    are read and not made again; with one file lost, that file alone is made.

    Breaks if `trunk_states` exchanges its halves, if `_split` cuts states along another axis than rows, or if
    `with_states` makes files that are there.
    """
    kept = override(config, {"train.keep_states": True})
    expected, actual = run(config, tmp_path / "beside").state, run(kept, tmp_path / "kept").state
    for one, other in zip(jax.tree.leaves(actual.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    corpus, folder, made = run(kept, tmp_path / "kept").corpus, tmp_path / "kept" / "states", []
    monkeypatch.setattr(states, "_file_of", lambda *args: made.append(args[-1]) or np.load(folder / "00000.npy"))
    given = (kept, actual.params, corpus.train, corpus.digest, tmp_path / "kept", made.append)
    assert len(states.with_states(*given)) == len(corpus.train) and not made
    last = sorted(folder.glob("*.npy"))[-1]
    last.unlink()
    states.with_states(*given)
    assert [number for number in made if isinstance(number, int)] == [int(last.stem)]


def test_states_of_another_text_or_model_are_made_anew(config, tmp_path, monkeypatch):
    """A state file counts only for the text, the parameters and the tap that it was made from.

    Breaks if `_made_from` leaves one of them out.
    """
    done = run(override(config, {"train.keep_states": True}), tmp_path)
    made = []
    monkeypatch.setattr(states, "_file_of", lambda *args: made.append(args[-1]) or np.zeros((1, 1, 1), np.float32))
    moved = jax.tree.map(lambda leaf: leaf, done.state.params)
    moved["final_norm"] = jax.tree.map(lambda leaf: leaf + 1, moved["final_norm"])
    rows, deeper = done.corpus.train, dataclasses.replace(config, heads=dataclasses.replace(config.heads, tap=0))
    say = lambda line: None  # noqa: E731
    for given in ((config, moved, "other"), (config, done.state.params, "other"), (deeper, done.state.params, "other")):
        made.clear()
        states.with_states(given[0], given[1], rows, given[2], tmp_path, say)
        assert made
    heads = done.state.params | {"heads": jax.tree.map(lambda leaf: leaf + 1, done.state.params["heads"])}
    made.clear()
    states.with_states(deeper, heads, rows, "other", tmp_path, say)
    assert not made


def test_refused(config):
    """States are kept for a model that stands still.

    Breaks without the checks in `TrainConfig` and `Config`.
    """
    with pytest.raises(UserError, match=r"train.keep_states=True .*trainable='heads'"):
        override(config, {"train.trainable": "all", "train.keep_states": True})
    with pytest.raises(UserError, match=r"heads.tap_mix=True"):
        override(config, {"heads.tap_mix": True, "train.keep_states": True})
