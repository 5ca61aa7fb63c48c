"""Errors for files and directories that are not a checkpoint that we read: what it is, and what to give instead."""

import pathlib
from collections.abc import Iterable

from mtp_jax.errors import UserError

TORCH = (".bin", ".pt", ".pth", ".ckpt")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
OTHER_LIBRARIES = {
    ".npz": "NumPy arrays",
    ".npy": "a NumPy array",
    ".msgpack": "weights of Flax",
    ".h5": "weights of TensorFlow",
    ".keras": "a model of Keras",
    ".tflite": "a model of TensorFlow Lite",
    ".onnx": "an ONNX graph",
    ".mlmodel": "a model of Core ML",
    ".mlpackage": "a model of Core ML",
    ".engine": "a TensorRT engine",
}
TAKEN = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Any of them makes a directory with a config.json a checkpoint."""
MOST_SIDES = 200
"""Number of entries of a directory that are looked at when it holds no model."""


def described(path: pathlib.Path) -> str | None:
    """One line that says what a file is and what to give instead; None if the kind of file is unknown."""
    suffix = path.suffix.lower()
    parent = path.parent
    if suffix == ".safetensors":
        return f"{path} holds only tensors, without a config and a tokenizer; {_whole(parent)}"
    if suffix in TORCH:
        return f"{path} is a torch file, without a config and a tokenizer; {_whole(parent)}"
    if suffix in ARCHIVES:
        return f"{path} is an archive; unpack it, and give the directory that holds its config.json"
    if suffix in OTHER_LIBRARIES:
        what = OTHER_LIBRARIES[suffix]
        return f"{path} is {what}, which we do not read; give the same model as a Hugging Face directory (safetensors)"
    if suffix == ".json":
        return f"{path} is a JSON file; {_whole(parent)}"
    return None


def _whole(directory: pathlib.Path) -> str:
    if (directory / "config.json").is_file() and any((directory / name).is_file() for name in TAKEN):
        return f"give its directory, {directory}"
    return "give the whole Hugging Face directory that it comes from (config.json, tokenizer and weights)"


def weights_instead(directory: pathlib.Path) -> str:
    """The end of an error about a directory without weights: what it holds instead, and the remedy."""
    files = [path for path in _entries(directory) if path.is_file()]
    for path in files:
        if path.suffix.lower() == ".gguf":
            return f"; it holds a GGUF file: give {path}"
    for path in files:
        if path.suffix.lower() in OTHER_LIBRARIES:
            what = OTHER_LIBRARIES[path.suffix.lower()]
            return f"; it holds {path.name}, {what}, which we do not read: fetch the model's safetensors files"
    for path in files:
        if path.suffix.lower() in (".safetensors", *TORCH):
            return f"; it holds only {path.name}: fetch the model's other files too"
    return "; fetch them"


def refuse_adapter(directory: pathlib.Path) -> None:
    """Refuses a directory with a LoRA adapter of PEFT as a model of its own."""
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds a LoRA adapter next to a model; move adapter_config.json and the adapter's tensors "
            "into a directory without a model, and give that one"
        )


def refuse_without_config(directory: pathlib.Path) -> None:
    """Refuses a directory without config.json, if its files show what it is, or if a checkpoint is one level below."""
    inside = _checkpoint_inside(directory)
    if inside is not None:
        raise UserError(f"{directory} has no config.json, but {inside} is a checkpoint; give that one")
    files = [path for path in _entries(directory) if path.is_file()]
    for path in files:
        if path.suffix.lower() == ".gguf":
            raise UserError(f"{directory} holds GGUF files; give one of them: {path}")
    for path in files:
        if path.suffix.lower() in (".safetensors", *TORCH, *OTHER_LIBRARIES):
            raise UserError(
                f"{directory / 'config.json'} does not exist, and {path.name} does not say what model it belongs to; "
                "give the whole Hugging Face directory (config.json, tokenizer and weights)"
            )


def _checkpoint_inside(directory: pathlib.Path) -> pathlib.Path | None:
    """A Hugging Face checkpoint one level below, or in the snapshots of a hub cache; None if there is none."""
    below = [path for path in _entries(directory) if path.is_dir()]
    for path in (*below, *_entries(directory / "snapshots")):
        if (path / "config.json").is_file() and any((path / name).is_file() for name in TAKEN):
            return path
    return None


def _entries(directory: pathlib.Path) -> Iterable[pathlib.Path]:
    try:
        return sorted(directory.iterdir())[:MOST_SIDES]
    except OSError:
        return []
