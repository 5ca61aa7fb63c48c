"""`mtp import SOURCE OUT`: makes a model directory from a checkpoint of another library."""

import dataclasses
from typing import Annotated, Literal, get_args

import tyro

from mtp_jax.cli.common import parse, print_json
from mtp_jax.config import FACTS, HeadsConfig
from mtp_jax.convert.forms import FORMS
from mtp_jax.convert.importer import import_model
from mtp_jax.errors import UserError
from mtp_jax.runs.progress import say

FormName = Literal["none", "mtp", "qwen", "deepseek", "mimo", "eagle", "medusa", "vllm", "caft", "meta"]
assert set(get_args(FormName)) == {*FORMS, "none"}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp import`."""

    source: tyro.conf.Positional[str]
    """Hugging Face directory or hub id, a .gguf file, smollm2, a directory in Meta's layout (params.json), or a
    directory with a LoRA adapter of PEFT (adapter_config.json)."""
    out: tyro.conf.Positional[str]
    """Directory to write. `mtp generate`, `mtp eval`, `mtp export` and train.init_from take it as a model."""
    heads: Literal[("none", *FACTS)] = "none"
    """Add new heads of this family."""
    form: FormName = "none"
    """Add new heads with the settings that this form needs, so that `mtp export --form` can write them."""
    num_future: int = 0
    """M, the number of heads that --heads or --form gives, head 0 included; 4 if not given."""
    init: Literal["default", "random", "copy_block", "zero"] = "default"
    """Initial values of new heads; see heads.init."""
    init_block: int = -1
    """The block that --init copy_block copies."""
    tap: int | None = None
    """Number of blocks below the state that new heads read; see heads.tap."""
    heads_from: str = ""
    """File or directory with trained heads for this model: Medusa, EAGLE, CAFT."""
    base: str = ""
    """The model of an adapter: a Hugging Face directory or hub id, or a .gguf file. By default it is the one that the
    adapter names."""
    dtype: Literal["files", "float32", "bfloat16"] = "files"
    """Dtype of parameters and activations; files keeps the dtype of the files."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensor names to ignore; may be given several times."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Seed of the random values in new heads."""
    json: bool = False
    """Print one JSON object at the end."""


def main(argv: list[str]) -> None:
    """Imports the checkpoint."""
    args = parse(Args, argv, "mtp import", "Make a model directory from a checkpoint of another library.")
    fresh = [name for name in (args.heads, args.form) if name != "none"]
    if len(fresh) > 1:
        raise UserError("--heads and --form both choose the new heads; give only one of them")
    if not fresh and (args.init, args.init_block, args.tap, args.num_future) != ("default", -1, None, 0):
        raise UserError("--num-future, --init and --tap are settings of new heads; choose these with --heads or --form")
    settings = {"num_future": args.num_future or 4, "init": args.init, "init_block": args.init_block}
    settings |= {"tap": args.tap} if args.tap is not None else {}
    config = import_model(
        args.source,
        args.out,
        heads=HeadsConfig(kind=args.heads, **settings) if args.heads != "none" else None,
        form=args.form if args.form != "none" else None,
        head_settings=settings if args.form != "none" else None,
        heads_from=args.heads_from or None,
        base=args.base or None,
        dtype=None if args.dtype == "files" else args.dtype,
        ignore=args.ignore,
        seed=args.seed,
        notify=say,
    )
    if args.json:
        print_json({"out": args.out, "heads": config.heads.kind, "num_future": config.heads.num_future})
