"""Our parameters as a Hugging Face directory, with their heads in a form that others read."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from mtp_jax.config import Arch, ModelConfig
from mtp_jax.convert import forms, head_writer, mapping, meta, record, spellings
from mtp_jax.convert.architectures import ARCHITECTURES
from mtp_jax.convert.files import DTYPES, SHARD_BYTES, Entry, write, write_file
from mtp_jax.convert.layout import Architecture, differing
from mtp_jax.convert.layouts import normalised
from mtp_jax.convert.meta import META, PARAMS
from mtp_jax.convert.origin import Origin, copied
from mtp_jax.convert.reader import Notify, to_stderr
from mtp_jax.convert.settings import shortest_pattern
from mtp_jax.convert.tokenizer import save_for_transformers, spell_for_both, write_template
from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import whole_directory
from mtp_jax.trees import by_path


class Exportable(Protocol):
    """What export needs of a loaded model (`mtp_jax.load` returns one)."""

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
    notify: Notify = to_stderr,
) -> str:
    """Writes a model as a directory that others load: transformers, vLLM, SGLang.

    What the model was imported with travels along: config fields, tokenizer, chat template, generation config, tensors
    that nothing of ours came from, and the dtype of every tensor.

    Args:
      lm: a loaded model.
      out: the directory to make; it must not exist, or be empty.
      form: of the heads: a name of `forms.FORMS`; None takes the one it came in or the one that fits, and "none" leaves
        the heads out.
      dtype: `float32`, `bfloat16` or `float16`; None keeps that of every tensor.
      shard_bytes: most bytes of one file; a larger tensor has one of its own.
      notify: receives a line about what was written.

    Returns:
      The form of the heads, "" without heads.

    Raises:
      UserError: a model that no Hugging Face architecture can hold, heads that the form cannot hold, a directory that
        is taken, or one that cannot be written; nothing half-written is left.
    """
    if isinstance(lm, str | os.PathLike):
        raise UserError(f"{str(lm)!r} is a path; load it first: export_model(mtp_jax.load({str(lm)!r}), ...)")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}; it must be at least 1")
    arch = _decoder(lm.arch)
    params = lm.stacked_params()
    origin = lm.origin
    form = head_writer.choose_form(arch, origin, form)
    if form == "meta" or (origin is not None and origin.architecture is META and form in ("", "meta")):
        came = origin.raw if origin is not None and origin.architecture is META else {}
        entry = META
        raw = meta.written_fields(arch, came)
    else:
        entry, raw = _architecture(arch.model, origin)
    pieces = _pieces(entry, arch, params)
    beside = []
    if form:
        head_pieces = forms.pieces(forms.FORMS[form], entry, arch, mapping.shapes_of(params))
        _check_all_written(form, pieces + head_pieces, params)
        inside = forms.FORMS[form].inside
        pieces, beside = (pieces + head_pieces, []) if inside else (pieces, head_pieces)
    dtype_of = _dtype_of(arch, origin, dtype)
    entries = mapping.entries(pieces, params, dtype_of)
    entries += _repeats(entries, head_writer.repeated(entry, arch, origin, form))
    written = {entry.name for entry in entries}
    if origin is not None and origin.architecture is entry:
        entries += copied({name: one for name, one in origin.untouched.items() if name not in written})
        entries = [dataclasses.replace(one, name=origin.renamed.get(one.name, one.name)) for one in entries]
    with whole_directory(out) as directory:
        if entry is META:
            write_file(directory / "consolidated.safetensors", entries)
            (directory / PARAMS).write_text(json.dumps(raw, indent=2) + "\n")
        else:
            write(directory, entries, shard_bytes)
            raw = _config_fields(lm, entry, head_writer.with_head_fields(raw, form, arch), entries)
            (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
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


# The trunk.


def _decoder(arch: Arch) -> Arch:
    """The model and its heads, if its trunk is a decoder LM."""
    if not isinstance(arch.model, ModelConfig):
        raise UserError(
            f"model.kind={arch.model.kind!r} cannot be exported: others read the layouts of decoder LMs only"
        )
    return arch


def _architecture(model: ModelConfig, origin: Origin | None) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that holds a model, and its config file.

    The first one whose own reading of what it writes is that model again: a wrong inverse finds no taker.
    """
    pattern = shortest_pattern(model.layers)
    model = dataclasses.replace(model, layer_pattern=pattern)
    if origin is not None and origin.architecture is not META:
        raw = dict(origin.raw)
        before = _read_back(origin.architecture, raw)
        if before is not None and (changed := differing(before, model)) in ([], ["tie_embeddings"]):
            return origin.architecture, raw | ({"tie_word_embeddings": model.tie_embeddings} if changed else {})
    nearest: tuple[list[str], str] | None = None
    for entry in ARCHITECTURES.values():
        try:
            names = {"architectures": [entry.class_name], "model_type": entry.model_type}
            raw = names | NO_TOKENS | entry.write(model)
        except (KeyError, UserError):
            continue
        back = _read_back(entry, raw)
        different = None if back is None else differing(back, model)
        if different == []:
            return entry, raw
        if different is not None and (nearest is None or len(different) < len(nearest[0])):
            nearest = different, entry.model_type
    reason = f"; {nearest[1]} comes nearest, but for {', '.join(f'model.{n}' for n in nearest[0])}" if nearest else ""
    raise UserError(f"no Hugging Face architecture that we know holds this model{reason}")


def _read_back(entry: Architecture, raw: dict[str, Any]) -> ModelConfig | None:
    try:
        return entry.read(*normalised(raw, "config.json"), "config.json", ("*",))
    except UserError:
        return None


def _pieces(entry: Architecture, arch: Arch, params: Any) -> list[mapping.Piece]:
    """The trunk's pieces; every one of its parameters has one."""
    trunk = {name: tree for name, tree in params.items() if name not in ("heads", "draft_ids", "token_order")}
    pieces = mapping.expand(entry.slots(), mapping.shapes_of(trunk), arch.model)
    _check_all_written(entry.model_type, pieces, trunk)
    return pieces


def _check_all_written(name: str, pieces: list[mapping.Piece], params: Any) -> None:
    written = {piece.path for piece in pieces}
    left = [path for path in by_path(params) if path not in written and not path.startswith("token_order")]
    if left:
        raise UserError(f"{name!r} has no place for {left[0]}")


def _dtype_of(arch: Arch, origin: Origin | None, dtype: str | None) -> Callable[[str], np.dtype]:
    given = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
    if dtype is not None and dtype not in given:
        raise UserError(f"dtype={dtype!r}; use one of {', '.join(given)}")
    fallback = np.dtype(given[dtype or arch.model.param_dtype])
    known = {} if origin is None or dtype is not None else origin.dtypes
    return lambda name: np.dtype(DTYPES[known[name]]) if name in known else fallback


def _config_fields(lm: Exportable, entry: Architecture, raw: dict[str, Any], entries: list[Entry]) -> dict[str, Any]:
    """The fields of config.json: as they came if nothing changed, else for transformers 4 and 5 alike."""
    dtype = max(entries, key=lambda one: one.nbytes).dtype.name  # of the largest tensor; loaders take it for all
    named = [name for name in spellings.DTYPES if name in raw] or spellings.DTYPES
    raw = raw | dict.fromkeys(named, dtype)
    if lm.origin is None:
        raw |= _token_fields(lm.tokenizer)
    elif raw == lm.origin.raw and not lm.trained_further:
        return raw
    return raw | spellings.older(raw, entry.older)


NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""Said in so many words, because every architecture has defaults of its own."""


def _token_fields(tokenizer: Any) -> dict[str, int | None]:
    """The special tokens of a tokenizer of ours."""
    return {} if tokenizer is None else {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _repeats(entries: list[Entry], repeated: dict[str, str]) -> list[Entry]:
    """Tensors that repeat another one."""
    by_name = {one.name: one for one in entries}
    return [
        dataclasses.replace(by_name[original], name=name)
        for name, original in repeated.items()
        if original in by_name and name not in by_name
    ]
