"""`mtp eval SOURCE... --data PATH|stdlib`, or `--task FILE`: measures models on text that they were not trained on."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from mtp_jax.cli.common import own_directory, parse, print_evaluation, print_json
from mtp_jax.cli.eval_many import compare, default_directory, print_compared, solve
from mtp_jax.config.noise import read_noise
from mtp_jax.data.synthetic import is_synthetic, sizes, with_seed
from mtp_jax.errors import UserError
from mtp_jax.eval import noisy
from mtp_jax.eval.ceiling import ceilings, check_ceilings
from mtp_jax.eval.comparison import Compared
from mtp_jax.eval.comparison_page import write_comparison
from mtp_jax.eval.measured import measure, open_text
from mtp_jax.eval.page import make_directory, write_page
from mtp_jax.eval.report import losses_of, with_decoding
from mtp_jax.eval.scoring import score
from mtp_jax.eval.spans import finder
from mtp_jax.loading import LoadedModel, load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say
from mtp_jax.runs.strict_json import strict


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp eval`."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """One model or more. Each is a workdir of `mtp train`, `mtp quickstart` or `mtp import`; a Hugging Face directory
    or hub id; a .gguf file; or smollm2 (SmolLM2-135M-Instruct, fetched once). The first is the baseline of the
    others."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The text: `stdlib` (those of its files that the run held out), or a directory, glob, text file, `.jsonl` or
    `.json` of records, `.npy` file or generated task, which is read completely. A task without a seed gets seed 1, so
    that its documents differ from those of training. The task also sets the length of rows and prompts. May be given
    several times, each as NAME=TEXT, for a report by kind of text."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    spans: str = ""
    """Also measure spans of the text as units: `identifiers` of Python source, `numbers`, a regular expression, or a
    `.jsonl` of records with `text` and `spans` (a list of [start, stop] in characters), which then also is the text."""
    num_prompts: int = 0
    """Number of prompts to decode; 0 takes the config's decode.num_prompts."""
    max_new_tokens: int = 0
    """Tokens to decode per prompt; 0 takes the config's decode.max_new_tokens. For a task, most tokens of an answer; 0
    is 512."""
    task: str = ""
    """A .jsonl of questions: answers are generated and judged, and --data is not needed."""
    checker: str = ""
    """Who judges the answers of a task: exact, contains, number (the last number), regex, code (runs it with tests, in
    a sandbox), or FILE.py:NAME for a function of yours, (answer, record) -> (correct, reason)."""
    prompt_field: str = ""
    """Field of a task's record that holds the prompt; the default is the first of messages, prompt, question, problem,
    text."""
    answer_field: str = ""
    """Field of a task's record that holds the expected answer; the default is the first of answer, target, solution."""
    template: str = ""
    """Text of a task's prompts, in which {prompt} and names of other fields stand for their values."""
    chat: bool = False
    """Put each prompt of a task into the chat template, as the message of a user."""
    limit: int = 0
    """Most questions of a task; 0 takes all."""
    samples: int = 1
    """Answers to each question of a task."""
    temperature: float = 0.0
    """Temperature of the answers of a task; 0 takes the most likely tokens."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw answers from the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed of the sampled answers."""
    batch_size: int = 16
    """Answers of a task that are generated together."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends an answer; may be given several times."""
    draft: Literal["heads", "lookup", "heads+lookup", "local", "none", "auto"] = "none"
    """Who drafts the answers of a task. It changes the speed, not the answers."""
    time_limit: float = 15.0
    """Seconds for the code of an answer with its tests, or for the search of a regular expression."""
    output: str = ""
    """Directory for the report and plots, or for the answers of a task. The default is SOURCE/eval for a run, and
    NAME-eval in the current directory for a Hugging Face checkpoint; for several models, `comparison`."""
    heads_from: str = ""
    """File or directory with heads for a Hugging Face checkpoint: Medusa, EAGLE, CAFT."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    noise: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Also measure one model on the text with errors, as KIND:RATE with case, drop, repeat or swap, or several with
    commas (see data.noise of `mtp train`). May be given several times, for several noisy texts."""
    marginalise: int = 0
    """K: also compare the heads of one model with its marginals, summed over the K most probable tokens of each step.
    A marginal is the model's own distribution of a later token: the ceiling for a head. 0 leaves it out."""
    marginal_positions: int = 200
    """Number of positions of the text for --marginalise; 0 takes all."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Evaluates the models, writes the report, and prints the figures."""
    args = parse(Args, argv, "mtp eval", "Evaluate models: loss by head, bits per byte, acceptance, speed; or a task.")
    _check(args)
    if args.task:
        solve(args)
    elif len(args.sources) > 1 or len(args.data) > 1:
        compare(args)
    else:
        _one_model(args)


TASK_ONLY = ("checker", "prompt_field", "answer_field", "template", "chat", "limit", "samples", "temperature", "top_p")
TASK_ONLY += ("seed", "batch_size", "stop", "draft", "time_limit")
TEXT_ONLY = ("data", "spans", "num_prompts", "noise", "marginalise", "marginal_positions")


def _check(args: Args) -> None:
    """Refuses options that would have no effect, and work without a text."""
    if not args.sources:
        raise UserError("mtp eval needs a model: mtp eval SOURCE --data TEXT; mtp eval --help lists the options")
    idle = TEXT_ONLY if args.task else TASK_ONLY
    defaults = {field.name: field.default for field in dataclasses.fields(Args)}
    for name in idle:
        if getattr(args, name) != defaults[name]:
            option = f"--{name.replace('_', '-')}"
            other = "has no effect with --task" if args.task else "needs --task FILE.jsonl"
            raise UserError(f"{option} {other}; leave it out")
    if args.spans.endswith(".jsonl") and (args.data or args.text_field != "text"):
        raise UserError(f"--spans {args.spans} holds the text itself; leave out --data and --text-field")
    if not args.task and not args.data and not args.spans.endswith(".jsonl"):
        raise UserError("there is nothing to evaluate on; give --data TEXT, or --task FILE.jsonl with --checker NAME")
    if args.marginalise and (len(args.sources) > 1 or len(args.data) > 1):
        raise UserError(f"--marginalise {args.marginalise} is for one model on one text; evaluate each by itself")
    for one in args.noise:
        if not read_noise(one, "--noise"):
            raise UserError("--noise '' is no noise; give KIND:RATE, as in drop:0.1, or leave it out")
    if args.noise and (len(args.sources) > 1 or len(args.data) > 1):
        raise UserError(f"--noise {args.noise[0]} is for one model on one text; evaluate each by itself")
    if args.task and not args.checker:
        raise UserError("--task needs --checker: exact, contains, number, regex, code, or FILE.py:NAME")


def _one_model(args: Args) -> None:
    """One model on one text."""
    name = args.sources[0]
    keep_compiled(own_directory(name))
    lm = load(name, ignore=args.ignore, heads_from=args.heads_from or None)
    if args.marginalise or args.marginal_positions != Args.marginal_positions:
        check_ceilings(lm, args.marginalise, args.marginal_positions)
    settings = lm.config.decode
    changes = {name: getattr(args, name) for name in ("num_prompts", "max_new_tokens") if getattr(args, name)}
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, decode=dataclasses.replace(settings, **changes)))
    source = args.data[0] if args.data else args.spans
    find = finder(args.spans) if args.spans else None
    if is_synthetic(source):
        source = with_seed(source, 1)
        lm = _for_task(lm, source)
    directory = pathlib.Path(args.output or default_directory(name))
    with new_directories(directory):
        make_directory(directory)  # before the work, so that a bad path fails at once
        text = open_text(source, source, args.text_field, lm, find is not None or bool(args.noise), say)
        rows = text.rows
        scored = score(lm, rows, progress=say)
        measured = measure(lm, text, scored, find)
        changed = noisy.measure_noisy(lm, text, args.noise, say)
        losses = losses_of(lm, rows, scored.sums(), progress=say)
        lm = lm.give_up_params()  # from here on it only decodes, and is in memory once
        result = with_decoding(losses, lm, rows, progress=say)
        if args.marginalise:
            found = ceilings(lm, rows, args.marginalise, args.marginal_positions, progress=say)
            result = dataclasses.replace(result, marginals=found)
        kinds = {source: measured} | {f"{source}, {noise}": one for noise, one in changed.items()}
        compared = Compared((name,), (kinds,), (True,))
        title = f"{name} on {source}"
        more = write_comparison(directory, title, compared)
        opening = [*(f"> **{line}**\n" for line in compared.warnings()), f"[Intervals and controls]({more.name})", ""]
        of_noise = noisy.facts(measured, changed)
        page = write_page(directory, title, result, [], of_noise, opening)
    facts = {"report": str(page), "comparison": str(more)}
    if args.json:
        extra = measured.as_json()
        kept = {key: extra[key] for key in ("tf_accept_at", "tf_tokens_per_round", "controls", "spans")}
        kept["intervals"] = {"bits_per_byte": extra["bits_per_byte"], "heads": extra["heads"]}
        if changed:
            kept["noise"] = noisy.as_json(measured, changed)
        kept["controls_fail"] = all(control.fails for control in measured.controls)
        print_json(result.as_json() | strict(kept) | {"warnings": compared.warnings()} | facts)
    else:
        print_evaluation(result, of_noise | facts)
        print_compared(compared, without=("loss", "top-1", "top-5"))


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
