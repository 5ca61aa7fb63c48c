"""`mtp export SOURCE OUT_DIR`: writes a model as a Hugging Face directory."""

import dataclasses
from typing import Literal, get_args

import tyro

from mtp_jax.cli.common import parse, print_json
from mtp_jax.cli.import_ import FormName
from mtp_jax.convert.writer import export_model
from mtp_jax.loading import load
from mtp_jax.runs.progress import say

FormOrAuto = Literal[("auto", *get_args(FormName))]


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp export`."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
    out: tyro.conf.Positional[str]
    """Directory to write; it must not exist, or be empty."""
    form: FormOrAuto = "auto"
    """Form of the heads. auto takes the form in which they came or for which they were made, or else the first that
    fits. none leaves the heads out."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Dtype of the tensors; by default every tensor keeps the dtype that it has."""
    shard_gb: float = 5.0
    """Largest size of one file, in gigabytes."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> None:
    """Exports the model."""
    args = parse(Args, argv, "mtp export", "Write a model as a Hugging Face directory.")
    form = export_model(
        load(args.source),
        args.out,
        form=None if args.form == "auto" else args.form,
        dtype=None if args.dtype == "keep" else args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        notify=say,
    )
    if args.json:
        print_json({"out": args.out, "form": form or None})
