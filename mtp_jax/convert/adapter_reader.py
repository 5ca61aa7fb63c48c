"""Reads an adapter in the layout of PEFT and adds it to the weights of its base."""

import dataclasses
import pathlib
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Arch, LoraConfig, adaptable
from mtp_jax.convert import mapping
from mtp_jax.convert.adapters import (
    RECORD,
    Adapter,
    Pair,
    entry_of,
    open_adapter,
    pieces_of,
    rows_of,
)
from mtp_jax.convert.files import FLOATS, NAMES, Tensor, read_json
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.mapping import Piece
from mtp_jax.convert.tokenizer import load_hub_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.model import lora
from mtp_jax.trees import by_path, digest_of

Opened = TypeVar("Opened")
"""A `loading.LoadedModel`. This file cannot import it, because `loading` imports this file."""
EMBED = "embed/table"
UNEMBED = "unembed/table"


def with_adapter(lm: Opened, directory: str | pathlib.Path, *, keep: bool = True) -> Opened:
    """A model with the updates of an adapter of PEFT in its weights.

    Args:
      lm: a loaded model with its stacked parameters, the base of the adapter.
      directory: the directory of the adapter. `mtp export --adapter` and PEFT write it.
      keep: whether `lm` stays usable. If not, only one matrix is in memory twice at a time.

    Raises:
      UserError: the adapter belongs to another model, or something in it is not implemented.
    """
    adapter = open_adapter(directory)
    arch, params = added(adapter, lm.arch, lm.stacked_params(), lm.origin, keep=keep)
    sharding.check_mesh(lm.mesh, arch)
    config = dataclasses.replace(lm.config, model=arch.model)
    tokenizer = tokenizer_of(adapter, arch, lm.arch, lm.tokenizer)
    return dataclasses.replace(lm, config=config, params=params, tokenizer=tokenizer)


def tokenizer_of(adapter: Adapter, arch: Arch, base: Arch, tokenizer: Any) -> Any:
    """The tokenizer of a base with an adapter: that of the adapter if it has other tokens than the base."""
    own = load_hub_tokenizer(adapter.directory) if arch.model.vocab_size != base.model.vocab_size else None
    return tokenizer if own is None else own


def added(adapter: Adapter, arch: Arch, params: Any, origin: Any, *, keep: bool) -> tuple[Arch, Any]:
    """The model and the parameters with the updates of an adapter.

    Args:
      adapter: an opened adapter.
      arch, params: its base, with stacked parameters.
      origin: the checkpoint that the base comes from; None if there is none.
      keep: whether `params` stay usable.

    Raises:
      UserError: the adapter belongs to another model.
    """
    _check_base(adapter, params)
    entry, _ = entry_of(arch, origin)
    # Modules may have another name in transformers than their tensors have in files.
    names = {other: name for name, other in entry.also.items()}
    whole = {names.get(name, name): tensor for name, tensor in adapter.whole.items()}
    adapter = dataclasses.replace(adapter, whole=whole)
    base = _Base(adapter, entry, arch, pieces_of(entry, arch, params))
    factors = _factors(base, params)
    arch, params = _replaced(base, params)
    if not factors:
        return arch, params
    rank = jax.tree.leaves(factors)[0].shape[-1]
    return arch, lora.merge(params | {"lora": factors}, LoraConfig(rank=rank, alpha=float(rank)), keep=keep)


def base_digest(params: Any, paths: list[str]) -> str:
    """A digest of parameters in bfloat16. It does not change if a base is stored with more bits than its files."""
    leaves = by_path(params)
    return digest_of({path: np.asarray(jax.device_get(leaves[path])).astype(ml_dtypes.bfloat16) for path in paths})


def _check_base(adapter: Adapter, params: Any) -> None:
    """Refuses another base than the one that our export has noted."""
    path = adapter.directory / RECORD
    if not path.is_file():
        return
    said = read_json(path)
    try:
        paths = said["paths"]
        digest = said["digest"]
    except KeyError as error:
        raise UserError(f"{path} is damaged: it has no {error}; export the adapter again") from error
    leaves = by_path(params)
    if any(name not in leaves for name in paths) or base_digest(params, paths) != digest:
        raise UserError(
            f"{adapter.directory} holds an adapter for another base: the weights of this model are not those that it "
            f"was trained on; give that base, or remove {RECORD} if you know that they fit"
        )


class _Base(NamedTuple):
    """The model that an adapter is added to."""

    adapter: Adapter
    entry: Architecture
    arch: Arch
    groups: dict[str, list[Piece]]
    """Pieces of its parameters by tensor."""

    def error(self, what: str) -> UserError:
        """An error about the adapter."""
        return UserError(f"{self.adapter.directory}: {what}; give the model that the adapter was trained on")


def _factors(base: _Base, params: Any) -> Any:
    """The adapter as `params["lora"]`, with one rank and the scale in B. Layers without an adapter have zeros."""
    leaves = by_path(params)
    known = adaptable(base.arch.model, base.arch.heads)
    rank = max((pair.a_RI.shape[0] for pair in base.adapter.pairs.values()), default=0)
    factors: dict[str, Any] = {}
    for module, pair in base.adapter.pairs.items():
        group = base.groups.get(f"{module}.weight")
        if group is None:
            raise base.error(f"it adapts {module}, which a {base.entry.model_type} of this config does not have")
        _check_shapes(base, module, pair, group)
        for piece in group:
            if piece.path not in known:
                raise UserError(f"{base.adapter.directory}: an adapter of {module} ({piece.path}) is not implemented")
            *above, name = piece.path.split("/")
            tree = factors
            for part in above:
                tree = tree.setdefault(part, {})
            L = leaves[piece.path].shape[0]
            outer, inner = piece.flat
            empty = {"a": np.zeros((L, inner, rank), np.float32), "b": np.zeros((L, rank, outer), np.float32)}
            both = tree.setdefault(name, empty)
            R = pair.a_RI.shape[0]
            both["a"][piece.at][:, :R] = pair.a_RI.array.T
            both["b"][piece.at][:R] = pair.scale * rows_of(piece, pair.b_OR.array.astype(np.float32)).T
    return factors


def _check_shapes(base: _Base, module: str, pair: Pair, group: list[Piece]) -> None:
    outer, inner = mapping.tensor_shapes(group)[group[0].name]
    shapes = [list(pair.a_RI.shape), list(pair.b_OR.shape)]
    R = pair.a_RI.shape[0]
    if shapes != [[R, inner], [outer, R]]:
        raise base.error(f"A and B of {module} are {shapes[0]} and {shapes[1]}, but the weight is [{outer}, {inner}]")


def _replaced(base: _Base, params: Any) -> tuple[Arch, Any]:
    """The model with the tensors that the adapter has as a whole."""
    leaves = by_path(params)
    changed: dict[str, jax.Array] = {}
    for name, tensor in base.adapter.whole.items():
        if name == base.entry.unembed and base.arch.model.tie_embeddings:
            continue
        if name not in base.groups:
            raise base.error(f"it holds {name}, which a {base.entry.model_type} of this config does not have")
        for piece in base.groups[name]:
            before = changed.get(piece.path, leaves[piece.path])
            changed[piece.path] = _with_tensor(base, before, piece, tensor)
    arch, tables = _tables(base, leaves, changed)
    changed |= tables
    for path, leaf in changed.items():
        params = _with_leaf(params, path.split("/"), leaf)
    return arch, params


def _with_tensor(base: _Base, leaf: jax.Array, piece: Piece, tensor: Tensor) -> jax.Array:
    """A parameter with the values of a tensor in one layer. A table may have other rows than before."""
    expected = piece.shape[1:] if piece.path in (EMBED, UNEMBED) else mapping.tensor_shapes([piece])[piece.name]
    given = tensor.shape[1:] if piece.path in (EMBED, UNEMBED) else tensor.shape
    if NAMES[tensor.dtype] not in FLOATS or (piece.rows is None and given != expected):
        raise base.error(f"{piece.name} is {tensor.dtype} {list(tensor.shape)}, but the model has {list(piece.flat)}")
    if piece.path in (EMBED, UNEMBED):
        return jax.device_put(tensor.array.astype(leaf.dtype), leaf.sharding)
    value = jnp.asarray(piece.ours(tensor.array).astype(leaf.dtype))
    return jax.device_put(leaf.at[piece.at].set(value) if piece.at else value, leaf.sharding)


def _tables(base: _Base, leaves: dict[str, Any], changed: dict[str, jax.Array]) -> tuple[Arch, dict[str, jax.Array]]:
    """The model section for the tables of the adapter, and the unembedding if it is no longer tied.

    PEFT copies a module that it trains. So the unembedding of a tied model stays as it was, unless the adapter has it
    too, or `ensure_weight_tying`.
    """
    arch = base.arch
    model = arch.model
    tables = {}
    own = base.adapter.whole.get(base.entry.unembed)
    if model.tie_embeddings and (own is not None or EMBED in changed):
        embed_VD = changed.get(EMBED, leaves[EMBED])
        unembed_VD = leaves[EMBED]
        if own is not None:
            unembed_VD = jax.device_put(own.array.astype(embed_VD.dtype), embed_VD.sharding)
        tied = own is None and bool(base.adapter.raw.get("ensure_weight_tying"))
        if not tied and not (embed_VD.shape == unembed_VD.shape and bool(jnp.all(embed_VD == unembed_VD))):
            model = dataclasses.replace(model, tie_embeddings=False)
            tables[UNEMBED] = unembed_VD
    rows = {path: (changed | tables).get(path, leaves.get(path)) for path in (EMBED, UNEMBED)}
    counts = {leaf.shape[0] for leaf in rows.values() if leaf is not None}
    if len(counts) > 1:
        raise base.error(f"its embedding and unembedding have {' and '.join(map(str, sorted(counts)))} rows")
    vocab = counts.pop()
    if vocab != model.vocab_size and arch.heads.num_future > 1:
        raise base.error(f"it has {vocab} tokens, but the model has {model.vocab_size} and extra heads")
    model = dataclasses.replace(model, vocab_size=vocab)
    return dataclasses.replace(arch, model=model), tables


def _with_leaf(tree: Any, names: list[str], leaf: Any) -> Any:
    first, *rest = names
    return tree | {first: _with_leaf(tree.get(first, {}), rest, leaf) if rest else leaf}
