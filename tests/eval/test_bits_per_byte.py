"""Bits per byte: numerator and denominator are of the same tokens, those that are predicted."""

import json
import math

import jax
import numpy as np
import pytest
from reference.odd_tokenizers import plain_bytes
from reference.quick import quick_jit
from reference.tiny import tiny_config

from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.data import loader
from mtp_jax.data.pack import PackedRows
from mtp_jax.data.tokenize import bytes_tokenizer, load_tokenizer
from mtp_jax.eval.report import evaluate
from mtp_jax.loading import LoadedModel
from mtp_jax.losses.targets import make_targets
from mtp_jax.model import mtp

targets_of = quick_jit(make_targets, static_argnums=2)
# Bytes of the texts: 2, 4, 1, 11, 4.
TEXTS = ["ab", "écd", "x", "Hello world", "😀"]


def write(directory, texts):
    directory.mkdir()
    (directory / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(directory)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One token per byte: with a token in front, and without."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    plain_bytes("</s>").save(str(path))
    return {True: bytes_tokenizer(), False: load_tokenizer(path)}


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("seq_len", [3, 4, 7, 50])
def test_the_bytes_are_those_of_the_targets(bos, seq_len, tokenizers, tmp_path):
    """predicted_bytes = the sum over the rows' targets of head 0 of their bytes, wherever rows cut documents. Breaks if
    the first token of a document counts, or the token that two rows share counts twice."""
    tokenizer = tokenizers[bos]
    rows = loader.load_heldout(write(tmp_path / "text", TEXTS), "text", tokenizer, seq_len)
    found = 0
    for row in rows:
        targets_MBT, weights_MBT = targets_of(row["tokens"][None], row["segment_ids"][None], 1)
        found += sum(map(tokenizer.num_bytes, np.asarray(targets_MBT)[np.asarray(weights_MBT) == 1].tolist()))
    # By hand: 22 bytes, of which the first byte of each of the five documents has nothing in front of it.
    assert rows.bytes_ == 22
    assert rows.predicted_bytes == found == (22 if bos else 17)


@pytest.mark.parametrize(("bos", "targets", "size"), [(True, 27, 22), (False, 22, 17)])
def test_a_model_that_knows_nothing(bos, targets, size, tokenizers, tmp_path):
    """Equal logits cost log2 V bits per target: bits per byte = log2(V) targets / bytes, by hand, with five documents
    in rows of 8 that cut them. Breaks if `evaluate` divides by the bytes of the whole text."""
    config = tiny_config(
        model={"vocab_size": 264, "num_layers": 1},
        heads={"num_future": 1},
        data={"seq_len": 8},
        train={"batch_size": 2},
    )
    shapes = jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    lm = LoadedModel(config, params, tokenizers[bos], sharding.make_mesh(MeshConfig()))
    rows = loader.load_heldout(write(tmp_path / "text", TEXTS), "text", tokenizers[bos], 8)
    result = evaluate(lm, rows)
    assert result.sums.weight_M.tolist() == [targets]
    assert result.bits_per_byte == pytest.approx(math.log2(264) * targets / size, rel=1e-5)


def test_the_example_of_two_words(tmp_path):
    """ "Hello world" in two tokens and no token in front: of 11 bytes, the 6 of " world" are predicted."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"Hello": 0, "Ġworld": 1, "</s>": 2}, unk_token="</s>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    texts = write(tmp_path / "text", ["Hello world"] * 3)
    rows = loader.load_heldout(texts, "text", load_tokenizer(tmp_path), 4)
    assert rows.tokens.tolist() == [0, 1, 2] * 3
    assert (rows.bytes_, rows.predicted_bytes) == (33, 18)


@pytest.mark.parametrize("bos", [True, False])
def test_token_files_too(bos, tokenizers, tmp_path):
    """The same documents as token ids have the same bytes. Breaks without `unpredicted_bytes` in `with_bytes`."""
    text = loader.load_heldout(write(tmp_path / "text", TEXTS), "text", tokenizers[bos], 8)
    np.save(tmp_path / "ids.npy", text.tokens)
    ids = loader.load_heldout(str(tmp_path / "ids.npy"), "text", tokenizers[bos], 8)
    assert (ids.bytes_, ids.predicted_bytes) == (text.bytes_, text.predicted_bytes)


def test_without_a_tokenizer_nothing_is_known():
    """Rows of bare ids have no bytes."""
    assert PackedRows(np.arange(9), np.array([0, 4]), 4, 0).predicted_bytes == 0
