"""`mtp formats SOURCE... --prompts FILE`: in which formats models answer, and how often each format is right."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from mtp_jax.cli.common import check_least, figure_table, parse, print_json
from mtp_jax.cli.eval_many import IN_PROCESSES, answering, made_from, opened, say_isolation, wide_console
from mtp_jax.data import arithmetic
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.comparison_page import short_names
from mtp_jax.eval.formats import classifier, page
from mtp_jax.eval.formats.run import Formats, Judging, measure_formats
from mtp_jax.eval.inference.extraction import extractor
from mtp_jax.eval.page import make_directory
from mtp_jax.eval.sandbox.outside import Limits
from mtp_jax.eval.task_file import Fields, Question, is_arithmetic, read_task
from mtp_jax.loading import is_run, split_step
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say
from mtp_jax.runs.workdir import CHECKPOINTS, saved_steps

DESCRIPTION = (
    "Count in which formats models answer, and how often each format is right, on greedy and on sampled output "
    "(arXiv:2504.07912). If the command is killed, the same command continues."
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp formats`."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """One model or more, as `mtp generate` takes them. WORKDIR@STEP is a checkpoint that a run keeps."""
    prompts: str = ""
    """A .jsonl of questions, as --task of `mtp eval`; or arithmetic, with options as in arithmetic:digits=2."""
    checker: str = ""
    """Who judges answers: exact, contains, number, regex, code, or FILE.py:NAME."""
    classifier: str = ""
    """What says in which format an answer is: echo-chamber (llm-code, tinygsm-code, text), arithmetic (plain, code,
    steps), or FILE.py:NAME for a function of yours, text -> name. For the prompts arithmetic the default is
    arithmetic."""
    every_checkpoint: bool = False
    """Take every checkpoint that each run keeps, and not only the newest. `train.keep_checkpoints` says how many."""
    samples: int = 8
    """Sampled answers to each question, in addition to the most likely one."""
    temperature: float = 1.0
    """Temperature of the samples."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw from the most likely tokens whose probabilities add up to this."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
    extract: Literal["", "number", "boxed", "letter", "exact", "code"] = ""
    """What votes for maj@k; the default goes with the checker."""
    seed: int = 0
    """Seed of the samples."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends an answer; may be given several times."""
    batch_size: int = 32
    """Answers that are generated together."""
    draft: Literal["heads", "lookup", "heads+lookup", "none", "auto"] = "auto"
    """Who drafts. It changes the time, not the answers."""
    chat: bool = False
    """Put each prompt into the chat template, as the message of a user."""
    template: str = ""
    """Text of the prompts, in which {prompt} and names of other fields stand for their values."""
    prompt_field: str = ""
    """Field of a record that holds the prompt; the default is the first of messages, prompt, question, problem,
    text."""
    answer_field: str = ""
    """Field of a record that holds the expected answer; the default is the first of answer, target, solution."""
    limit: int = 0
    """Most questions; 0 takes all, and 200 of arithmetic."""
    time_limit: float = 15.0
    """Seconds for the code of an answer with its tests, or for the search of a regular expression."""
    output: str = "formats"
    """Directory for the answers, the page and its plot. The same command continues what a killed one left there."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    json: bool = False
    """Print one JSON object instead of tables."""

    @property
    def task(self) -> str:
        """The questions, by the name that other commands give them."""
        return self.prompts


def main(argv: list[str]) -> None:
    """Measures all models, writes the page, and prints the tables."""
    args = parse(Args, argv, "mtp formats", DESCRIPTION)
    sources = _sources(args)
    name = _check(args)
    judging = Judging(
        checker(args.checker, Limits(seconds=args.time_limit)), classifier(name), extractor(args.extract, args.checker)
    )
    fields = Fields(args.prompt_field, args.answer_field, args.template)
    questions = read_task(args.prompts, args.checker, fields, args.limit, "--prompts")
    if args.checker in IN_PROCESSES:
        say_isolation()
    directory = pathlib.Path(args.output)
    found: dict[str, Formats] = {}
    with new_directories(directory):
        make_directory(directory)
        for source, short in zip(sources, short_names(sources), strict=True):
            say(f"{source}: {len(questions)} questions of {args.prompts}; the first answers wait for the compiler ...")
            first = next(iter(found.values())) if found else None
            found[short] = _measured(args, source, questions, judging, directory / short.replace("/", "--"), first)
        report = page.write_report(directory, f"Formats on {args.prompts}", found, _steps(sources))
    if args.json:
        models = [{"name": source} | one.as_json() for source, one in zip(sources, found.values(), strict=True)]
        whole = {"prompts": args.prompts, "checker": args.checker, "classifier": name, "questions": len(questions)}
        print_json(whole | {"samples": args.samples, "models": models, "report": str(report)})
        return
    _print(found)
    print(f"report: {report}")


def _sources(args: Args) -> list[str]:
    """The models; with --every-checkpoint, one for each checkpoint of a run."""
    if not args.sources:
        raise UserError("mtp formats needs a model: mtp formats SOURCE... --prompts FILE.jsonl --checker NAME")
    found = []
    for source in args.sources:
        workdir, step = split_step(source)
        if not args.every_checkpoint:
            found.append(source)
            continue
        steps = saved_steps(workdir / CHECKPOINTS) if is_run(workdir) and step is None else []
        if not steps:
            raise UserError(f"--every-checkpoint: {source} is not the workdir of a run with checkpoints; leave it out")
        found += [f"{source.rstrip('/')}@{one}" for one in steps]
    for at, source in enumerate(found):
        if source.rstrip("/") in [one.rstrip("/") for one in found[:at]]:
            raise UserError(f"{source} is named twice; name each model once")
    return found


def _check(args: Args) -> str:
    """Refuses what cannot be measured, before a model is loaded. Returns the name of the classifier."""
    if not args.prompts:
        raise UserError("mtp formats needs questions; give --prompts FILE.jsonl")
    if not args.checker:
        raise UserError("--prompts needs --checker: exact, contains, number, regex, code, or FILE.py:NAME")
    name = args.classifier or (arithmetic.NAME if is_arithmetic(args.prompts) else "")
    if not name:
        raise UserError(f"--prompts {args.prompts} needs --classifier: echo-chamber, arithmetic, or FILE.py:NAME")
    check_least(args, {"samples": 1, "limit": 0, "batch_size": 1, "max_new_tokens": 1})
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature}; it must be above 0, because greedy output is measured, too")
    return name


def _measured(
    args: Args,
    source: str,
    questions: Sequence[Question],
    judging: Judging,
    directory: pathlib.Path,
    reference: Formats | None,
) -> Formats:
    lm = opened(args, source)
    origin: dict[str, Any] = made_from(args, lm, source)
    return measure_formats(
        lm, questions, judging, answering(args), directory, made_from=origin, reference=reference, progress=say
    )


def _steps(sources: Sequence[str]) -> list[int] | None:
    """The steps of the sources, if all are checkpoints of one run."""
    split = [split_step(source) for source in sources]
    steps = [step for _, step in split if step is not None]
    return steps if len(steps) == len(split) and len({workdir for workdir, _ in split}) == 1 else None


def _print(found: dict[str, Formats]) -> None:
    out = wide_console()
    for columns, rows in (
        (page.SHARE_COLUMNS, page.share_rows(found)),
        (page.WHOLE_COLUMNS, page.whole_rows(found)),
        (page.bound_columns(found), page.bound_rows(found)),
    ):
        out.print(figure_table(columns, rows))
        out.print()
