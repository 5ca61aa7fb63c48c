"""The bits per byte that training records are those of the predicted tokens."""

import math

import numpy as np
import pytest
from reference.odd_tokenizers import plain_bytes
from reference.tiny import tiny_config, write_text

from mtp_jax.data import store
from mtp_jax.runs.metrics import read_metrics
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import train


@pytest.mark.grid
def test_without_a_token_in_front(tmp_path):
    """bits per byte = loss * targets / (ln 2 * bytes behind the first byte of every document), where no token goes in
    front; the prepared files say the same when they are read again, and when an older version made them. Breaks if the
    bytes of the whole text are taken."""
    text = write_text(tmp_path / "text")
    plain_bytes("</s>").save(str(tmp_path / "tokenizer.json"))
    data = {"tokenizer": str(tmp_path / "tokenizer.json")}
    config = tiny_config(text, data=data, train={"steps": 1, "eval_rows": 0})
    with RunConsole(quiet=True) as console:
        result = train(config, tmp_path / "run", console)
    rows = result.corpus.heldout
    documents = len(rows.doc_starts)
    size = sum(len((text / name).read_bytes()) for name in result.corpus.heldout_documents) - documents
    record = read_metrics(tmp_path / "run")[-1]
    targets = len(rows.tokens) - documents
    expected = record["heldout_loss"][0] * targets / (math.log(2) * size)
    np.testing.assert_allclose(record["heldout_bits_per_byte"], expected, rtol=1e-6)
    meta = tmp_path / "run" / "data" / "meta.json"
    meta.write_text(meta.read_text().replace('"unpredicted_bytes"', '"of an older version"'))
    again = store.open_prepared(tmp_path / "run" / "data", config.data.seq_len)
    assert again.heldout.predicted_bytes == rows.predicted_bytes == size
