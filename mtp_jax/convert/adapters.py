"""LoRA adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors` in a directory.

For each adapted module the file has two matrices, A [R, in] and B [out, R], under the name of the module:

    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

A module that was trained as a whole (`modules_to_save`) has its tensors under their own names, with the same prefix.
The update of a weight is alpha / R * B A, or alpha / sqrt(R) * B A with `use_rslora`.
"""

import dataclasses
import math
import numbers
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from mtp_jax.config import Arch, HeadsConfig, ModelConfig
from mtp_jax.convert import hugging_face, mapping
from mtp_jax.convert.files import FLOATS, NAMES, Tensor, Tensors, open_file, read_json
from mtp_jax.convert.foreign import TAKEN
from mtp_jax.convert.layout import Architecture
from mtp_jax.convert.leaving import Came
from mtp_jax.convert.mapping import Piece
from mtp_jax.errors import UserError
from mtp_jax.model import mtp

CONFIG_NAME = "adapter_config.json"
TENSORS = ("adapter_model.safetensors", "adapter_model.bin")
RECORD = "mtp_adapter.json"
"""A file next to an adapter that we wrote. It says which base the adapter was trained on."""
PREFIX = "base_model.model."
SIDES = (".lora_A.weight", ".lora_B.weight")
NEUTRAL = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config"),
    *("exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha"),
    *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_version"),
    *("qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules"),
}
"""Fields of a config that are read here, or that change nothing in a trained adapter."""
ACCEPTED = {
    "peft_type": ("LORA",),
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "default"),
    "use_rslora": (False, True, None),
}
"""The values that we read. Other initial values change the base, which the adapter then needs in that form."""
LARGEST = float(np.finfo(np.float32).max)
REPAIR = "correct the file, or save the adapter again with PEFT"


@dataclasses.dataclass(frozen=True)
class Pair:
    """The adapter of one module."""

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    """Factor of B A."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An opened adapter. Its config is checked; its tensors are not read yet."""

    directory: pathlib.Path
    raw: dict[str, Any]
    """Its config."""
    pairs: dict[str, Pair]
    """By the name of the module."""
    whole: Tensors
    """Tensors of modules that were trained as a whole, by their name in the model."""


def is_adapter(source: str | pathlib.Path) -> bool:
    """Whether a source is a directory with an adapter and without a model."""
    directory = pathlib.Path(source)
    return (directory / CONFIG_NAME).is_file() and not any((directory / name).is_file() for name in TAKEN)


def base_of(directory: str | pathlib.Path, base: str | pathlib.Path | None) -> str | pathlib.Path:
    """The model that an adapter belongs to: `base`, or the one that its config names.

    Raises:
      UserError: neither is given.
    """
    named = read_json(pathlib.Path(directory) / CONFIG_NAME).get("base_model_name_or_path")
    if base is None and not named:
        raise UserError(f"{directory} does not name the model of its adapter; give that model as the base")
    return base if base is not None else str(named)


def open_adapter(directory: str | pathlib.Path) -> Adapter:
    """Opens an adapter and checks its config.

    Raises:
      UserError: there is no adapter, it is damaged, or something in it is not implemented. The error names it.
    """
    directory = pathlib.Path(directory)
    if not (directory / CONFIG_NAME).is_file():
        raise UserError(f"{directory} has no {CONFIG_NAME}; give the directory of an adapter that PEFT or we wrote")
    raw = read_json(directory / CONFIG_NAME)
    _check_config(directory, raw)
    path = next((directory / name for name in TENSORS if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory} has no {TENSORS[0]}; fetch the files of the adapter again")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in open_file(path).items()}
    modules = dict.fromkeys(name.removesuffix(side) for name in tensors for side in SIDES if name.endswith(side))
    if not modules:
        raise UserError(f"{path} has no tensors of LoRA (names that end with {SIDES[0]}); fetch the adapter again")
    pairs = {module: _pair(raw, module, tensors, path) for module in modules}
    whole = {name: tensor for name, tensor in tensors.items() if not name.endswith(SIDES)}
    for name in whole:
        if "lora_" in name:
            raise UserError(f"{path} holds {name}, an adapter that is not of a linear layer; this is not implemented")
    return Adapter(directory, raw, pairs, whole)


def _check_config(directory: pathlib.Path, raw: dict[str, Any]) -> None:
    """Refuses what is not implemented."""
    path = directory / CONFIG_NAME
    for name, values in ACCEPTED.items():
        value = raw.get(name, values[0])
        if value not in values:
            known = ", ".join(repr(one) for one in values if one is not None)
            raise UserError(f"{path}: {name} is {value!r}; of these we read {known}")
    for name, value in raw.items():
        if name not in NEUTRAL and name not in ACCEPTED and value:
            raise UserError(f"{path}: {name}={value!r} is not implemented; merge it with PEFT")
    _check_number(path, "lora_alpha", raw.get("lora_alpha", 8), _is_alpha, "a finite number")
    _check_number(path, "r", raw.get("r", 8), _is_rank, "a whole number, 1 or above")
    _check_pattern(path, "alpha_pattern", raw.get("alpha_pattern"), _is_alpha, "a finite number")
    _check_pattern(path, "rank_pattern", raw.get("rank_pattern"), _is_rank, "a whole number, 1 or above")


def _check_number(path: pathlib.Path, name: str, value: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not fits(value):
        raise UserError(f"{path}: {name}={value!r}; it must be {wanted}; {REPAIR}")


def _check_pattern(path: pathlib.Path, name: str, pattern: Any, fits: Callable[[Any], bool], wanted: str) -> None:
    """Checks the values of single modules. The keys are regular expressions."""
    if pattern is None:
        return
    if not isinstance(pattern, dict):
        raise UserError(f"{path}: {name}={pattern!r}; it must be an object from names of modules to numbers; {REPAIR}")
    for key, value in pattern.items():
        _check_number(path, f"{name}[{key!r}]", value, fits, wanted)
        try:
            _key(key)
        except re.error as error:
            raise UserError(f"{path}: {name} has {key!r}, which is no regular expression: {error}; {REPAIR}") from error


def _is_alpha(value: float) -> bool:
    return abs(value) <= LARGEST


def _is_rank(value: float) -> bool:
    return isinstance(value, int) and value >= 1


def _pair(raw: dict[str, Any], module: str, tensors: Tensors, path: pathlib.Path) -> Pair:
    a_RI, b_OR = (tensors.get(module + side) for side in SIDES)
    if a_RI is None or b_OR is None or len(a_RI.shape) != 2 or len(b_OR.shape) != 2 or a_RI.shape[0] != b_OR.shape[1]:
        raise UserError(f"{path} has no two matrices A [R, in] and B [out, R] for {module}; fetch the file again")
    for side, factor in zip(SIDES, (a_RI, b_OR), strict=True):
        if NAMES[factor.dtype] not in FLOATS:
            raise UserError(f"{path}: {module}{side} is {factor.dtype}, not of floats; save the adapter in bfloat16")
    rank = a_RI.shape[0]
    if not rank:
        raise UserError(f"{path}: A and B of {module} have rank 0; train the adapter with r of 1 or above")
    alpha = _of_pattern(raw.get("alpha_pattern"), module, raw.get("lora_alpha", 8))
    return Pair(a_RI, b_OR, alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank))


def _of_pattern(pattern: dict[str, Any] | None, module: str, usual: float) -> float:
    """The value of a module in `alpha_pattern`. Keys are matched as PEFT does it."""
    found = (value for key, value in (pattern or {}).items() if _key(key).match(module))
    return next(found, usual)


def _key(key: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({key})$")


def entry_of(arch: Arch, origin: Any) -> tuple[Architecture, dict[str, Any]]:
    """The Hugging Face architecture of a model and its config, without extra heads.

    Args:
      arch: the model and its heads.
      origin: the checkpoint that the model comes from; None if there is none.

    Raises:
      UserError: no architecture can hold the model.
    """
    if not isinstance(arch.model, ModelConfig):
        raise UserError(
            f"model.kind={arch.model.kind!r} has no adapters of PEFT: the known layouts of files hold decoder LMs only"
        )
    known = origin is not None and origin.layout.writing is hugging_face
    plain = dataclasses.replace(arch, heads=HeadsConfig(num_future=1))
    return hugging_face.describe(plain, Came(origin.architecture, origin.raw) if known else None)


def pieces_of(entry: Architecture, arch: Arch, params: Any) -> dict[str, list[Piece]]:
    """The pieces of the model's parameters by the tensors that hold them. `params` may be abstract."""
    groups: dict[str, list[Piece]] = {}
    for piece in mapping.expand(entry.slots(), mapping.shapes_of(mtp.trunk_params(params)), arch.model):
        groups.setdefault(piece.name, []).append(piece)
    return groups


def rows_of(piece: Piece, whole: np.ndarray) -> np.ndarray:
    """The rows of a matrix with the outputs of a tensor that belong to a piece."""
    return whole if piece.rows is None else whole[piece.rows]
