"""Heads in a file of their own: the same drafts, for the model that they belong to and for no other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import loaded
from reference.tiny import tiny_config

from mtp_jax.convert import heads_file
from mtp_jax.convert.heads_file import with_heads, with_shipped, write_heads
from mtp_jax.decode.generate import generate
from mtp_jax.errors import UserError
from mtp_jax.model import mtp

PROMPT = [[3, 5, 8]]


@pytest.fixture(scope="module")
def models():
    """A model with heads over a draft vocabulary, and the same model without."""
    heads = {"kind": "recursive", "num_future": 3, "draft_vocab": 40, "tap": 1}
    config = tiny_config(model={"num_layers": 1}, heads=heads)
    params = mtp.init(config.arch, jax.random.key(1))
    params["draft_ids"] = params["draft_ids"] + 7
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), params["heads"])
    plain = tiny_config(model={"num_layers": 1}, heads={"num_future": 1})
    trunk = {name: tree for name, tree in params.items() if name not in mtp.OF_HEADS}
    return loaded(config, params | {"heads": rounded}), loaded(plain, trunk)


def test_heads_come_back(models, tmp_path):
    """Config, every parameter and what is drafted are those of the model that was written.

    Breaks if `OF_HEADS` leaves out `draft_ids`, or `with_heads` takes leaves in another order.
    """
    whole, plain = models
    write_heads(whole, tmp_path / "heads.safetensors", "tiny")
    again = with_heads(plain, tmp_path / "heads.safetensors")
    assert again.config.heads == whole.config.heads
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    one, other = (generate(lm, PROMPT, max_new_tokens=8, draft="heads", ignore_eos=True) for lm in (again, whole))
    assert one.tokens == other.tokens and one.stats.histogram == other.stats.histogram


def test_refused(models, tmp_path):
    """Heads for other parameters, of other shapes, no heads at all, and files that are none.

    Breaks without the comparison of digests, or if the digest leaves out a parameter.
    """
    whole, plain = models
    path = tmp_path / "heads.safetensors"
    write_heads(whole, path, "tiny")
    for name in plain.params:
        moved = plain.params | {
            name: jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3), plain.params[name])
        }
        with pytest.raises(UserError, match=r"heads for tiny, but this model has other parameters"):
            with_heads(dataclasses.replace(plain, params=moved), path)
    with pytest.raises(UserError, match=r"no extra heads \(heads.num_future=1\)"):
        write_heads(plain, path, "tiny")
    with pytest.raises(UserError, match=r"the heads in .* cannot be read"):
        with_heads(plain, tmp_path / "nothing")
    (tmp_path / "text").write_text("hello, this is no file of tensors")
    with pytest.raises(UserError, match=r"the heads in .* cannot be read"):
        with_heads(plain, tmp_path / "text")


def test_shipped_heads(models, tmp_path, monkeypatch):
    """A model known by a name gets the heads that the package holds for it; a file that was changed is refused, and
    other parameters under the name are told of.

    Breaks without the checksum, or the digest.
    """
    whole, plain = models
    said = []
    assert with_shipped(plain, "tiny", said.append) is plain
    monkeypatch.setattr(heads_file, "SHIPPED", tmp_path)
    monkeypatch.setattr(heads_file, "is_named", lambda source: source == "tiny")
    monkeypatch.setattr(heads_file, "SHIPPED_SHA256", {"tiny": "0"})
    write_heads(whole, tmp_path / "tiny.safetensors", "tiny")
    with pytest.raises(UserError, match="is missing or was changed"):
        with_shipped(plain, "tiny", said.append)
    digest = heads_file.hashlib.sha256((tmp_path / "tiny.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(heads_file, "SHIPPED_SHA256", {"tiny": digest})
    assert with_shipped(plain, "tiny", said.append).config.heads == whole.config.heads and not said
    moved = jax.tree.map(lambda leaf: leaf + 1 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, plain.params)
    other = dataclasses.replace(plain, params=moved)
    assert with_shipped(other, "tiny", said.append).config.heads == whole.config.heads
    assert said == ["tiny: its heads were trained on other weights of this model, so they may draft a little worse"]
