"""`mtp eval SOURCE --data PATH|stdlib`: measures a model on text that it was not trained on."""

import dataclasses
import pathlib

import tyro

from mtp_jax.cli.common import own_directory, parse, print_evaluation, print_json
from mtp_jax.data.loader import load_heldout
from mtp_jax.data.synthetic import is_synthetic, sizes, with_seed
from mtp_jax.errors import UserError
from mtp_jax.eval.ceiling import ceilings, check_ceilings
from mtp_jax.eval.page import make_directory, write_page
from mtp_jax.eval.report import heldout_losses, with_decoding
from mtp_jax.loading import LoadedModel, is_run, load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp eval`."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
    data: str
    """The text: `stdlib` (those of its files that the run held out), or a directory, glob, text file, `.jsonl` or
    `.json` of records, `.npy` file or generated task, which is read completely. A task without a seed gets seed 1, so
    that its documents differ from those of training. The task also sets the length of rows and prompts."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    num_prompts: int = 0
    """Number of prompts to decode; 0 takes the config's decode.num_prompts."""
    max_new_tokens: int = 0
    """Tokens to decode per prompt; 0 takes the config's decode.max_new_tokens."""
    output: str = ""
    """Directory for the report and plots. The default is SOURCE/eval for a run, and NAME-eval in the current directory
    for a Hugging Face checkpoint."""
    heads_from: str = ""
    """File or directory with heads for a Hugging Face checkpoint: Medusa, EAGLE, CAFT."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    marginalise: int = 0
    """K: also compare the heads with the marginals of the model, summed over the K most probable tokens of each step.
    A marginal is the model's own distribution of a later token: the ceiling for a head. 0 leaves it out."""
    marginal_positions: int = 200
    """Number of positions of the text for --marginalise; 0 takes all."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Evaluates the model, writes the report, and prints the figures."""
    args = parse(Args, argv, "mtp eval", "Evaluate a trained model: loss by head, bits per byte, acceptance, speed.")
    keep_compiled(own_directory(args.source))
    lm = load(args.source, ignore=args.ignore, heads_from=args.heads_from or None)
    if args.marginalise or args.marginal_positions != Args.marginal_positions:
        check_ceilings(lm, args.marginalise, args.marginal_positions)
    settings = lm.config.decode
    changes = {name: getattr(args, name) for name in ("num_prompts", "max_new_tokens") if getattr(args, name)}
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, decode=dataclasses.replace(settings, **changes)))
    source = args.data
    if is_synthetic(source):
        source = with_seed(source, 1)
        lm = _for_task(lm, source)
    default = f"{args.source}/eval" if is_run(pathlib.Path(args.source)) else f"{pathlib.Path(args.source).name}-eval"
    directory = pathlib.Path(args.output or default)
    data = lm.config.data
    split = (data.seed, data.eval_fraction) if source == "stdlib" else None
    with new_directories(directory):
        make_directory(directory)  # before the work, so that a bad path fails at once
        rows = load_heldout(source, args.text_field, lm.tokenizer, data.seq_len, split, lm.config.model.vocab_size, say)
        say(
            f"{source}: {len(rows.doc_starts)} documents, {len(rows.tokens):,} tokens"
            + (f", {rows.bytes_ / 1e6:.2f} MB" if rows.bytes_ else "")
        )
        losses = heldout_losses(lm, rows, progress=say)
        lm = lm.give_up_params()  # from here on it only decodes, and is in memory once
        result = with_decoding(losses, lm, rows, progress=say)
        if args.marginalise:
            found = ceilings(lm, rows, args.marginalise, args.marginal_positions, progress=say)
            result = dataclasses.replace(result, marginals=found)
        page = write_page(directory, f"{args.source} on {source}", result, [], {})
    if args.json:
        print_json(result.as_json() | {"report": str(page)})
    else:
        print_evaluation(result, {"report": str(page)})


def _for_task(lm: LoadedModel, source: str) -> LoadedModel:
    """The model with a config that has the row and prompt lengths of a generated task."""
    tokens, prompt = sizes(source)
    config = lm.config
    longest = lm.config.model.max_seq_len
    if tokens + 1 > longest:
        raise UserError(f"the documents of {source!r} have {tokens} tokens, above model.max_seq_len={longest}")
    seq_len = tokens * max((config.data.seq_len - 1) // tokens, 1) + 1
    data = dataclasses.replace(config.data, seq_len=seq_len, prompt_tokens=prompt)
    answer = {"prompt_tokens": prompt, "max_new_tokens": tokens - prompt} if tokens - prompt > 1 and prompt else {}
    decode = dataclasses.replace(config.decode, **answer)
    return dataclasses.replace(lm, config=dataclasses.replace(config, data=data, decode=decode))
