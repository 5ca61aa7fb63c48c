"""A layout of checkpoints from outside the package: one .npz file with other names, and no line of mtp_jax changed.

Each docstring names the line whose deletion breaks the test."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from reference import small_llama
from reference.small_llama import FIELDS, TENSORS

import mtp_jax
from mtp_jax.cli import run
from mtp_jax.convert import hugging_face, layouts
from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.errors import UserError

THEIRS = {name: name.replace("model.", "toy/").replace(".", "/") for name in TENSORS}
"""Names in the file, by those of the architecture."""


@dataclasses.dataclass(frozen=True)
class Held:
    """See `convert.files.Tensor`."""

    file: pathlib.Path
    array: np.ndarray
    start = 0
    unlisted = None

    @property
    def nbytes(self):
        return self.array.nbytes

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def release(self):
        """Nothing is mapped."""


@dataclasses.dataclass(frozen=True)
class Toy:
    """See `layouts.Layout`."""

    path: pathlib.Path
    says = "its config"
    writing = hugging_face

    @classmethod
    def recognises(cls, path):
        return path.suffix == ".npz" and path.is_file()

    def open(self, ignore):
        with np.load(self.path) as file:
            raw = json.loads(str(file["config"]))
            found = {ours: Held(self.path, file[name]) for ours, name in THEIRS.items() if name in file}
        entry = ARCHITECTURES[raw["model_type"]]
        model = entry.read(*hugging_face.normalised(raw, str(self.path)), str(self.path), ignore)
        return layouts.Opened(entry, raw, model, found)

    def spelled(self, name):
        return THEIRS[name]

    def tokenizer(self, ignore):
        return None

    def copy_sidecars(self, target):
        """There is nothing next to a file."""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The small Llama in the toy layout, which is registered for this test."""
    monkeypatch.setattr(layouts, "LAYOUTS", dict(layouts.LAYOUTS))
    layouts.register("toy", Toy)
    return write(tmp_path / "toy.npz", TENSORS)


def write(path, tensors):
    np.savez(path, config=json.dumps(FIELDS), **{THEIRS[name]: array for name, array in tensors.items()})
    return path


def same(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_it_loads_decodes_imports_and_exports(toy, tmp_path):
    """load(toy) = load(the same model as Hugging Face has it), bit for bit; so is what is imported, and what is
    exported of it. Its first token is the likeliest. Breaks without `LAYOUTS[name] = layout`, or where `layout_of` does
    not ask the table."""
    lm = mtp_jax.load(toy)
    assert same(lm.params, mtp_jax.load(small_llama.write(tmp_path / "hub", fields=FIELDS)).params)
    assert lm.origin.layout == Toy(toy) and lm.origin.raw == FIELDS
    prompt = [3, 1, 4]
    tokens = mtp_jax.generate(lm, [prompt], max_new_tokens=1, draft="none").tokens
    assert tokens == [[int(np.asarray(lm.logits([prompt]))[0, 0, -1].argmax())]]
    assert run(["import", str(toy), str(tmp_path / "run")]) == 0
    again = mtp_jax.load(tmp_path / "run")
    assert same(lm.params, again.params)
    assert again.origin.raw == FIELDS and again.origin.architecture is ARCHITECTURES["llama"]
    for number, model in enumerate((lm, again)):
        mtp_jax.export_model(model, tmp_path / f"out{number}")
        assert same(lm.params, mtp_jax.load(tmp_path / f"out{number}").params)


def test_what_is_amiss_is_said_in_its_words(toy, tmp_path):
    """A missing tensor has the file's own name for it; a name in the table is not taken twice; a file of no layout is
    refused. Breaks where an error says the architecture's name, or without the check in `register`."""
    left = dict(TENSORS)
    left.pop("model.norm.weight")
    with pytest.raises(UserError, match="lacks toy/norm/weight"):
        mtp_jax.load(write(tmp_path / "less.npz", left))
    with pytest.raises(UserError, match="a checkpoint layout 'toy' already"):
        layouts.register("toy", Toy)
    layouts.LAYOUTS.pop("toy")
    with pytest.raises(UserError, match=r"toy\.npz"):
        mtp_jax.load(toy)
