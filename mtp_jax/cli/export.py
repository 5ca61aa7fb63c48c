"""`mtp export SOURCE OUT_DIR`: writes a model as a Hugging Face directory, or the adapters of a run for PEFT."""

import dataclasses
from typing import Literal, get_args

import tyro

from mtp_jax.cli.common import parse, print_json
from mtp_jax.cli.import_ import FormName
from mtp_jax.convert.adapter_writer import export_adapter
from mtp_jax.convert.writer import export_model
from mtp_jax.errors import UserError
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
    merge: bool = False
    """Write the whole model, with the adapters of a run added to its weights. This is the default; the flag refuses a
    model without adapters."""
    adapter: bool = False
    """Write only the adapters of a run, as a directory that PEFT loads."""
    base: str = ""
    """With --adapter: the model that PEFT shall load the adapter on, a hub id or a directory. By default it is the
    checkpoint that the run started from."""
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
    if args.adapter:
        _export_adapter(args)
        return
    if args.base:
        raise UserError(f"--base {args.base} is the model of an adapter; give it with --adapter, or leave it out")
    lm = load(args.source)
    if args.merge and not lm.config.lora.rank:
        raise UserError(f"{args.source} was trained without adapters (lora.rank=0); leave --merge out")
    form = export_model(
        lm,
        args.out,
        form=None if args.form == "auto" else args.form,
        dtype=None if args.dtype == "keep" else args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        notify=say,
    )
    if args.json:
        print_json({"out": args.out, "form": form or None})


def _export_adapter(args: Args) -> None:
    if args.merge:
        raise UserError("--adapter writes the adapters alone and --merge adds them to the weights; give one of them")
    settings = {"form": "auto", "dtype": "keep", "shard_gb": 5.0}
    other = [name for name, usual in settings.items() if getattr(args, name) != usual]
    if other:
        raise UserError(f"--{other[0].replace('_', '-')} is for a whole model; leave it out with --adapter")
    export_adapter(args.source, args.out, base=args.base or None, notify=say)
    if args.json:
        print_json({"out": args.out, "form": None})
