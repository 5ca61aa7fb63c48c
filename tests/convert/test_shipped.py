"""The heads in the package are whole, small, and for the model whose name they bear."""

import hashlib
import json

import pytest

from mtp_jax.convert.heads_file import SHIPPED, SHIPPED_SHA256, _read


@pytest.mark.parametrize("name", sorted(SHIPPED_SHA256))
def test_files_in_the_package(name):
    """Checksum and size are as said, and the card says the checksum and the digest of the model.

    Breaks if a file is replaced without its checksum or its card.
    """
    path = SHIPPED / f"{name}.safetensors"
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHIPPED_SHA256[name] and len(content) <= 12e6
    said, tensors = _read(path)
    card = (SHIPPED / "README.md").read_text()
    assert said["model"] == name and SHIPPED_SHA256[name] in card and said["digest"] in card
    heads = json.loads(said["heads"])
    assert tensors["draft_ids"].shape == (heads["draft_vocab"],)
