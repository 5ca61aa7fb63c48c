"""Writes our parameters in a layout of another project, with the heads in a form that other projects read."""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mtp_jax.config import Arch, HeadsConfig, ModelConfig
from mtp_jax.convert import forms, head_writer, hugging_face, mapping, record
from mtp_jax.convert.architectures import ENTRIES
from mtp_jax.convert.files import DTYPES, SHARD_BYTES, Entry
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.layouts import LAYOUTS
from mtp_jax.convert.leaving import Came, Leaving, Writing
from mtp_jax.convert.origin import Origin, copied
from mtp_jax.convert.reader import Notify
from mtp_jax.convert.tokenizer import save_for_transformers, spell_for_both, write_template
from mtp_jax.errors import UserError
from mtp_jax.model import mtp
from mtp_jax.runs.integrity import whole_directory
from mtp_jax.runs.progress import say
from mtp_jax.trees import by_path


class Exportable(Protocol):
    """The attributes of a loaded model that export needs. `mtp_jax.load` returns such a model."""

    arch: Arch
    params: Any
    tokenizer: Any
    origin: Origin | None
    trained_further: bool
    """Whether its parameters are no longer those of `origin`."""


def export_model(
    lm: Exportable,
    out: str | pathlib.Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    notify: Notify = say,
) -> str:
    """Writes a model as a directory that transformers, vLLM and SGLang load.

    If the model was imported, the export also has its original config fields, tokenizer, chat template, generation
    config, the tensors that were not used, and the dtype of every tensor.

    Args:
      lm: a loaded model.
      out: the directory to make; it must be empty or not exist.
      form: form of the heads, a name in `forms.FORMS`. None uses the form that the heads came in, or one that fits.
        "none" leaves the heads out.
      dtype: `float32`, `bfloat16` or `float16`; None keeps the dtype of every tensor.
      shard_bytes: largest number of bytes of a file; a larger tensor gets its own file.
      notify: is called with a line of text about what was written.

    Returns:
      The form of the heads; "" without heads.

    Raises:
      UserError: no Hugging Face architecture can hold the model, the form cannot hold the heads, or the directory is
        not empty or cannot be written. Then no partial directory is left.
    """
    if isinstance(lm, str | os.PathLike):
        raise UserError(f"{str(lm)!r} is a path; load it first: export_model(mtp_jax.load({str(lm)!r}), ...)")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}; it must be at least 1")
    arch = _checked(lm.arch, form)
    params = lm.stacked_params()
    origin = lm.origin
    form = head_writer.choose_form(arch, origin, form)
    writing = _writing(form, origin)
    same = origin is not None and origin.layout.writing is writing
    described = arch if form else dataclasses.replace(arch, heads=HeadsConfig(num_future=1))
    entry, raw = writing.describe(described, Came(origin.architecture, origin.raw) if same else None)
    pieces, beside = _pieces(entry, arch, params, form)
    dtype_of = _dtype_of(arch, origin, dtype)
    entries = mapping.entries(pieces, params, dtype_of)
    entries += _repeats(entries, head_writer.repeated(entry, arch, origin, form))
    if origin is not None and origin.architecture is entry:
        entries = _as_they_came(entries, origin)
    with whole_directory(out) as directory:
        came = origin.raw if origin else None
        leaving = Leaving(arch, lm.tokenizer, form, entry, raw, entries, came, lm.trained_further)
        raw = writing.write(directory, leaving, shard_bytes)
        if origin is not None:
            origin.layout.copy_sidecars(directory)
            spell_for_both(directory)
            write_template(lm.tokenizer, directory)
        elif lm.tokenizer is not None:
            save_for_transformers(lm.tokenizer, directory)
        if form and not beside:
            (directory / record.RECORD).write_text(record.text(form, arch))
        if beside:
            head_writer.write_beside(directory, form, arch, mapping.entries(beside, params, dtype_of), raw)
    kind = f"{entry.class_name}, {len(entries)} tensors, {sum(one.nbytes for one in entries) / 1e6:,.1f} MB"
    notify(f"{out}: {kind}" + (f", {arch.heads.num_future - 1} heads in the form {form!r}" if form else ", no heads"))
    return form


def _writing(form: str, origin: Origin | None) -> Writing:
    """The layout of the heads' form; without heads, the one that the model came in, or Hugging Face's."""
    if form:
        return LAYOUTS[forms.FORMS[form].layout].writing
    return origin.layout.writing if origin is not None else hugging_face


# The trunk.


def _checked(arch: Arch, form: str | None) -> Arch:
    """The model and its heads, if the trunk is of a kind that files can hold."""
    if not any(isinstance(arch.model, entry.section) for entry in ENTRIES.values()):
        raise UserError(
            f"model.kind={arch.model.kind!r} cannot be exported: the known layouts of files hold decoder LMs, and Byte "
            "Latent Transformers"
        )
    if not isinstance(arch.model, ModelConfig) and arch.heads.num_future > 1 and form != "none":
        raise UserError(
            f"heads of model.kind={arch.model.kind!r} have no form that other projects read; use form='none' to leave "
            "them out"
        )
    return arch


def _pieces(entry: Architecture, arch: Arch, params: Any, form: str) -> tuple[list[mapping.Piece], list[mapping.Piece]]:
    """The pieces of all parameters: those in the files of the trunk, and those in a separate directory of heads."""
    trunk = mtp.trunk_params(params)
    pieces = mapping.expand(entry.slots(), mapping.shapes_of(trunk), arch.model)
    _check_all_written(entry.model_type, pieces, trunk)
    if not form:
        return pieces, []
    of_heads = forms.pieces(forms.FORMS[form], entry, arch, mapping.shapes_of(params))
    _check_all_written(form, pieces + of_heads, params)
    return (pieces + of_heads, []) if forms.FORMS[form].inside else (pieces, of_heads)


def _as_they_came(entries: list[Entry], origin: Origin) -> list[Entry]:
    """The entries under the names in the original files, and the original tensors that were not used."""
    written = {entry.name for entry in entries}
    entries = entries + copied({name: one for name, one in origin.untouched.items() if name not in written})
    return [dataclasses.replace(one, name=origin.renamed.get(one.name, one.name)) for one in entries]


def _check_all_written(name: str, pieces: list[mapping.Piece], params: Any) -> None:
    written = {piece.path for piece in pieces}
    left = [path for path in by_path(params) if path not in written and not path.startswith(mtp.OF_TRAINING)]
    if left:
        raise UserError(f"{name!r} cannot hold the parameter {left[0]}")


def _dtype_of(arch: Arch, origin: Origin | None, dtype: str | None) -> Callable[[str], np.dtype]:
    given = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if dtype is not None and dtype not in given:
        raise UserError(f"dtype={dtype!r}; use one of {', '.join(given)}")
    fallback = np.dtype(given[dtype or arch.model.param_dtype])
    known = {} if origin is None or dtype is not None else origin.dtypes
    return lambda name: np.dtype(DTYPES[known[name]]) if name in known else fallback


def _repeats(entries: list[Entry], repeated: dict[str, str]) -> list[Entry]:
    """Entries for tensors that repeat another one."""
    by_name = {one.name: one for one in entries}
    return [
        dataclasses.replace(by_name[original], name=name)
        for name, original in repeated.items()
        if original in by_name and name not in by_name
    ]
