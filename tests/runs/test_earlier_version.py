"""A run that an earlier version wrote (commit 5ec464d, before the layout of today) loads, decodes and goes on.

`earlier_version.tar.gz` holds the workdir of a tiny run after two steps, and `known.json`: what that version computed.
"""

import json
import pathlib
import tarfile

import numpy as np
import pytest

import mtp_jax
from mtp_jax.config import from_json

ARCHIVE = pathlib.Path(__file__).parent / "earlier_version.tar.gz"


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """The workdir, and what is known of it."""
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run", json.loads((folder / "known.json").read_text())


def test_it_loads_and_decodes(earlier):
    """Logits and drafted tokens are those that the earlier version had. Breaks when a field, a parameter path or the
    checkpoint's layout changes its name."""
    run, known = earlier
    lm = mtp_jax.load(run)
    np.testing.assert_allclose(lm.logits(known["tokens"]), known["logits"], rtol=1e-5, atol=1e-5)
    assert mtp_jax.generate(lm, known["tokens"], max_new_tokens=8, draft="heads").tokens == known["generated"]


def test_it_goes_on(earlier):
    """Steps 3 and 4 have the losses that the earlier version had after the same two steps. Breaks when the data
    position or the optimizer's state is not read."""
    run, known = earlier
    config = from_json((run / "config.json").read_text())
    mtp_jax.train(mtp_jax.override(config, {"train.steps": 4}), run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [[one["step"], one["loss"]] for one in lines if "loss" in one]
    wanted = [[one["step"], one["loss"]] for one in known["metrics"] if "loss" in one]
    assert [step for step, _ in losses] == [step for step, _ in wanted]
    np.testing.assert_allclose([loss for _, loss in losses], [loss for _, loss in wanted], rtol=1e-5)
