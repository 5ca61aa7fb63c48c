"""Reads a checkpoint of another project as our config and parameters, in any layout of `convert.layouts`."""

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import jax
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.config import Arch, HeadsConfig, ModelConfig
from mtp_jax.convert import fetch, foreign, forms, leftovers, mapping, placing, record
from mtp_jax.convert.files import FLOATS, NAMES, Tensors, matches
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.layouts import Layout, check_kind, layout_of, recognised
from mtp_jax.convert.mapping import Piece
from mtp_jax.convert.tokenizer import HubTokenizer
from mtp_jax.errors import UserError
from mtp_jax.model import mtp

Notify = Callable[[str], None]


HEADS_FOLDER = "heads"
"""Name of the folder for heads in an exported directory. They are read with the model."""
SAY_EVERY = 3.0
"""Number of seconds between lines of progress."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with checked names and shapes. No tensor is read yet."""

    layout: Layout
    raw: dict[str, Any]
    """Its config, in the fields of the architecture."""
    architecture: Architecture
    arch: Arch
    pieces: list[Piece]
    tensors: Tensors
    repeated: dict[str, str]
    """Tensors that repeat another tensor, and the name of that tensor."""
    untouched: tuple[str, ...]
    """Tensors that no parameter of ours comes from."""
    form: str
    """Form of the heads; "" without heads."""
    renamed: dict[str, str]
    """Tensors with another name in the files than in our table: our name, and the name in the files."""
    ignore: tuple[str, ...]
    """Patterns of fields and tensors that were ignored."""

    @property
    def directory(self) -> pathlib.Path:
        """Path of the checkpoint: a directory or one file."""
        return self.layout.path

    def tokenizer(self) -> HubTokenizer | None:
        """Its tokenizer; None if it has none."""
        return self.layout.tokenizer(self.ignore)


def is_checkpoint(directory: pathlib.Path) -> bool:
    """Whether a directory is in one of the layouts of `convert.layouts`, and not a run of ours."""
    return recognised(directory) is not None


def locate(source: str | pathlib.Path, notify: Notify) -> pathlib.Path:
    """The local directory or file of a source. A short name or a hub id is downloaded.

    Raises:
      UserError: the source is none of these, or cannot be fetched.
    """
    path = pathlib.Path(source)
    if path.is_dir() or recognised(path) is not None:
        return path
    if path.suffix.lower() == ".gguf" and not path.exists():
        raise UserError(f"{source} does not exist; give the path of a GGUF file, or the name smollm2 to fetch a model")
    if fetch.is_named(source):
        return fetch.model(str(source), notify)
    known = foreign.described(path) if path.is_file() else None
    if known is not None:
        raise UserError(known)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise UserError(
            f"{source} is not a directory; give the workdir of `mtp train`, `mtp quickstart` or `mtp import`, a "
            f"Hugging Face directory, a .gguf file, a hub id such as Qwen/Qwen3-0.6B, or {', '.join(fetch.MODELS)}"
        )
    try:
        return fetch.repository(str(source))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{source} is not a directory, and fetching it from the Hugging Face hub failed: {reason}"
        ) from error


def open_checkpoint(
    source: str | pathlib.Path,
    dtype: str | None = None,
    *,
    ignore: Sequence[str] = (),
    heads_from: str | pathlib.Path | None = None,
    notify: Notify,
) -> Checkpoint:
    """Reads the config of a checkpoint, and checks the names and shapes of its tensors.

    Args:
      source: a directory, a GGUF file, a hub id, or `smollm2`.
      dtype: dtype of parameters and activations; None keeps the dtype of the files.
      ignore: patterns of config fields and tensor names to ignore. An import keeps the ignored tensors for export.
      heads_from: a file or directory of heads; None reads the heads in the checkpoint, if there are any.
      notify: is called with a line of text about everything unusual.

    Raises:
      UserError: something is missing, unexpected, damaged, of another shape, or not implemented. The error names it.
    """
    directory = locate(source, notify)
    check_kind(directory)
    layout = layout_of(directory)
    entry, raw, model, tensors = layout.open(ignore)
    renamed = _renamed(entry, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in renamed.values()} | {
        name: tensors[other] for name, other in renamed.items()
    }
    model, repeated = _tied(model, entry, tensors, directory, notify)
    if heads_from is None and (directory / HEADS_FOLDER / record.RECORD).is_file():
        heads_from = directory / HEADS_FOLDER
    found = forms.find(forms.Trunk(entry, model, raw, tensors, directory), heads_from)
    model = _with_dtype(model, tensors | (found.tensors if found else {}), dtype, notify)
    arch = Arch(model, found.heads if found else HeadsConfig(num_future=1))
    shapes = mapping.shapes_of(jax.eval_shape(lambda: mtp.init(arch, jax.random.key(0))))
    pieces = mapping.expand(entry.slots(), shapes, model)
    if found:
        tensors = tensors | found.tensors
        repeated = repeated | found.repeated
        pieces += forms.pieces(found.form, entry, arch, shapes)
        forms.check_attention(found.form, arch, raw)
        notify(f"{directory}: {_described(found.form.name, arch)}")
    untouched = _check(pieces, tensors, entry, layout, ignore, repeated, notify)
    form = found.form.name if found else ""
    return Checkpoint(layout, raw, entry, arch, pieces, tensors, repeated, untouched, form, renamed, tuple(ignore))


def _renamed(entry: Architecture, tensors: Tensors) -> dict[str, str]:
    """Tensors with another name in the files than in the table: name in the table, and name in the files.

    In files that were saved without a language model head, all names lack the first part.
    """
    renamed = {name: other for name, other in entry.also.items() if name not in tensors and other in tensors}
    base = entry.embed.partition(".")[0] + "."
    if entry.embed in tensors or entry.embed.removeprefix(base) not in tensors:
        return renamed
    below = {slot.theirs.removeprefix(base).partition(".")[0] for slot in entry.slots() if slot.theirs.startswith(base)}
    return renamed | {base + name: name for name in tensors if name.partition(".")[0] in below}


def _described(form: str, arch: Arch) -> str:
    """The settings of heads that were assumed, in one line."""
    heads = arch.heads
    after = " and the final norm" if heads.tap_norm else ""
    said = [
        f"{heads.num_future - 1} {heads.kind} heads ({form!r})",
        f"reading the state after block {arch.tap}{after}",
    ]
    if heads.facts.chains_tokens:
        said.append(f"{heads.concat.replace('_', ' ')} in the projection")
        said.append(f"norms scale by {'1 + w' if heads.norm_plus_one else 'w'}")
    said.append({"shared": "the model's final norm", "own": "one final norm each", "none": "no final norm"}[heads.norm])
    return ", ".join(said) + f" (an {record.RECORD} overrides this)"


def read_params(checkpoint: Checkpoint, mesh: Mesh, notify: Notify) -> Any:
    """Reads the parameters onto the mesh, with the shardings of `sharding`. Reports its progress every few seconds."""
    total = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    done = 0
    said = time.monotonic()

    def step(name: str) -> None:
        nonlocal done, said
        done += checkpoint.tensors[name].nbytes
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            notify(f"read {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    sharding.check_mesh(mesh, checkpoint.arch)
    boxed = mtp.abstract(checkpoint.arch)
    return placing.read(checkpoint.pieces, checkpoint.tensors, sharding.abstract_params(mesh, boxed), step)


def _tied(
    model: ModelConfig, entry: Architecture, tensors: Tensors, directory: pathlib.Path, notify: Notify
) -> tuple[ModelConfig, dict[str, str]]:
    """Handles a tied unembedding that the files have too. If it differs from the embedding, the model is not tied."""
    if not model.tie_embeddings or entry.unembed not in tensors or entry.embed not in tensors:
        return model, {}
    if forms.alike(tensors[entry.embed], tensors[entry.unembed]):
        return model, {entry.unembed: entry.embed}
    notify(
        f"{directory}: tie_word_embeddings is set, but {entry.unembed} differs from {entry.embed}; "
        "reading them as two matrices (model.tie_embeddings=False)"
    )
    return dataclasses.replace(model, tie_embeddings=False), {}


def _with_dtype(model: ModelConfig, tensors: Tensors, dtype: str | None, notify: Notify) -> ModelConfig:
    """The model with the dtype that was asked for. By default it is the smallest of ours that loses no precision."""
    found = {NAMES[tensor.dtype] for tensor in tensors.values()} & set(FLOATS)
    if "F64" in found:
        notify("float64 tensors are read as float32")
    own = "bfloat16" if found == {"BF16"} else "float32"
    return dataclasses.replace(model, dtype=dtype or own, param_dtype=dtype or own)


def _check(
    pieces: list[Piece],
    tensors: Tensors,
    entry: Architecture,
    layout: Layout,
    ignore: Sequence[str],
    repeated: dict[str, str],
    notify: Notify,
) -> tuple[str, ...]:
    """Checks that every tensor is there and has its shape.

    Returns:
      Names of the tensors that belong to no parameter. They must be known or ignored.
    """
    expected = mapping.tensor_shapes(pieces)
    directory = layout.path
    known = leftovers.ModelTensors(frozenset(expected), tuple(ignore))
    rest = sorted(tensors.keys() - expected.keys() - repeated.keys())
    unread = [name for name in rest if not matches(name, entry.buffers)]
    leftovers.refuse_quantised(unread, known, directory)
    _check_missing(expected.keys() - tensors.keys(), entry, layout)
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            what = f"{layout.spelled(name)} in {tensor.file} has shape {list(tensor.shape)}"
            raise UserError(f"{what}, but {layout.says} needs {list(shape)}; fetch the files again")
        if NAMES[tensor.dtype] not in FLOATS:
            raise UserError(
                f"{name} in {tensor.file} has dtype {tensor.dtype}, but weights must be floating-point numbers; use a "
                "checkpoint in float32, bfloat16 or float16"
            )
        if tensor.unlisted:
            raise UserError(
                f"{tensor.file.name} holds {name}, which {tensor.unlisted} does not name; fetch the files again, or "
                "add it to weight_map there"
            )
    leftovers.check(unread, known, tensors, directory, entry.model_type, notify)
    return tuple(rest)


def _check_missing(missing: AbstractSet[str], entry: Architecture, layout: Layout) -> None:
    """Refuses files in which tensors of the model are missing."""
    if not missing:
        return
    first = layout.spelled(min(missing))
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    remedy = "fetch its files again"
    if missing == {entry.unembed}:
        remedy = (
            "save it with its language model head (AutoModelForCausalLM), or set tie_word_embeddings to true in "
            "config.json if the embedding is also the unembedding"
        )
    raise UserError(f"{layout.path} lacks {first}{more}, which a {entry.model_type} of this config has; {remedy}")
