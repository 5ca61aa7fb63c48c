"""`mtp compare SOURCE... --task FILE`: methods that spend more compute at inference, by accuracy and tokens."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from mtp_jax.cli.common import check_least, figure_table, parse, print_json
from mtp_jax.cli.eval_many import IN_PROCESSES, answering, made_from, opened, say_isolation, wide_console
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import Checker, checker
from mtp_jax.eval.comparison_page import short_names
from mtp_jax.eval.inference import page
from mtp_jax.eval.inference.extraction import extractor
from mtp_jax.eval.inference.plan import DEFAULT, TRUNCATED, Plan
from mtp_jax.eval.inference.rows import Figures, figures
from mtp_jax.eval.inference.run import Task, collect
from mtp_jax.eval.page import make_directory
from mtp_jax.eval.sandbox.outside import Limits, isolation
from mtp_jax.eval.task_file import Fields, Question, read_task
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp compare`."""

    sources: tyro.conf.Positional[tuple[str, ...]]
    """One model or more. Each is a workdir of `mtp train`, `mtp quickstart` or `mtp import`; a Hugging Face directory
    or hub id; a .gguf file; or smollm2 (SmolLM2-135M-Instruct, fetched once)."""
    task: str = ""
    """A .jsonl of questions; see docs/evaluate.md."""
    checker: str = ""
    """Who judges answers: exact, number (the last number), regex, code (runs it with tests, in a sandbox), or
    FILE.py:NAME for a function of yours, (answer, record) -> (correct, reason)."""
    methods: tuple[str, ...] = DEFAULT
    """What is compared: vote, vote-logprob, vote-shortest, best-judge, best-logprob, best-sum, best-short, revise,
    truncate."""
    samples: int = 8
    """Responses to each question, and the length of a chain of revisions. Methods are compared at 1, 2, 4, ...
    responses, up to all."""
    budget: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """For truncate: most tokens of thinking; may be given several times."""
    end_think: str = "</think>"
    """For truncate: the text that ends the thinking. For a model without such a mark, a text such as "So the answer
    is"."""
    answer_tokens: int = 64
    """For truncate: most tokens after the end of the thinking."""
    extract: Literal["", "number", "boxed", "letter", "exact", "code"] = ""
    """What votes: the last number, the contents of the last \\boxed{}, the letter of an option, the whole text, or the
    code without layout. The default goes with the checker."""
    ties: Literal["first", "shortest", "logprob"] = "first"
    """Which of several answers with equal votes wins: that of the first response, of the shortest one, or of the most
    likely one."""
    max_new_tokens: int = 512
    """Most tokens of a response. A response that reaches the limit counts as wrong."""
    temperature: float = 0.8
    """Temperature of the responses."""
    top_p: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    """Draw from the most likely tokens whose probabilities add up to this."""
    seed: int = 0
    """Seed of the responses."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends a response; may be given several times."""
    batch_size: int = 16
    """Responses that are generated together."""
    draft: Literal["heads", "lookup", "heads+lookup", "local", "none", "auto"] = "none"
    """Who drafts. It changes the time, not the responses."""
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
    """Most questions; 0 takes all."""
    time_limit: float = 15.0
    """Seconds for the code of a response with its tests, or for the search of a regular expression."""
    output: str = "compare"
    """Directory for the responses, the page and its plot. The same command continues what a killed one left there."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Compares the methods, writes the page, and prints the tables."""
    args = parse(Args, argv, "mtp compare", "Compare methods that spend more compute at inference, by tokens.")
    _check(args)
    plan = _plan(args)
    check = checker(args.checker, Limits(seconds=args.time_limit))
    questions = read_task(
        args.task, args.checker, Fields(args.prompt_field, args.answer_field, args.template), args.limit
    )
    if args.checker in IN_PROCESSES:
        say_isolation()
    directory = pathlib.Path(args.output)
    stem = pathlib.Path(args.task).stem
    files = {}
    found = {}
    with new_directories(directory):
        make_directory(directory)
        for name, short in zip(args.sources, short_names(args.sources), strict=True):
            files[short] = directory / f"{stem}-{short.strip('/').replace('/', '--')}.jsonl"
            say(f"{name}: {len(questions)} questions of {args.task}, responses in {files[short]}")
            found[short] = _figures(args, name, questions, plan, check, files[short])
        title = f"Inference compute on {stem}: {' and '.join(found)}"
        report = page.write_report(directory, stem, title, found)
    if args.json:
        models = [
            {"name": name, "responses": str(files[short])} | one.as_json()
            for name, (short, one) in zip(args.sources, found.items(), strict=True)
        ]
        whole = {"task": args.task, "checker": args.checker, "questions": len(questions), "models": models}
        isolated = {"isolation": isolation()} if args.checker in IN_PROCESSES else {}
        print_json(whole | isolated | {"report": str(report)})
        return
    for short, one in found.items():
        _print(short, len(questions), one)
    print(f"report: {report}")


def _check(args: Args) -> None:
    """Refuses what cannot be compared, before a model is loaded."""
    if not args.sources:
        raise UserError("mtp compare needs a model: mtp compare SOURCE --task FILE.jsonl --checker NAME")
    for at, name in enumerate(args.sources):
        if name.rstrip("/") in [one.rstrip("/") for one in args.sources[:at]]:
            raise UserError(f"{name} is named twice; name each model once")
    if not args.task:
        raise UserError("mtp compare needs questions; give --task FILE.jsonl")
    if not args.checker:
        raise UserError("--task needs --checker: exact, number, regex, code, or FILE.py:NAME")
    if TRUNCATED not in args.methods:
        for name in ("end_think", "answer_tokens"):
            if getattr(args, name) != getattr(Args, name):
                raise UserError(f"--{name.replace('_', '-')} has no effect without --methods {TRUNCATED}; leave it out")
    check_least(args, {"samples": 1, "limit": 0, "batch_size": 1, "max_new_tokens": 1, "answer_tokens": 1})


def _plan(args: Args) -> Plan:
    return Plan(
        how=answering(args),
        methods=args.methods,
        budgets=args.budget,
        end_think=args.end_think,
        answer_tokens=args.answer_tokens,
        extract=extractor(args.extract, args.checker),
        ties=args.ties,
    )


def _figures(
    args: Args, name: str, questions: list[Question], plan: Plan, check: Checker, file: pathlib.Path
) -> Figures:
    """The figures of one model."""
    lm = opened(args, name)
    task = Task(questions, check, made_from(args, lm, name))
    done = collect(lm, task, plan, file, progress=say)
    return figures(done, len(questions), plan)


def _print(name: str, questions: int, found: Figures) -> None:
    out = wide_console()
    out.print(f"{name}: {questions} questions")
    out.print(figure_table(page.COLUMNS, page.method_rows(found)))
    out.print()
    out.print(figure_table(page.BOUND_COLUMNS, page.bound_rows(found)))
    out.print(page.count_line(found))
    out.print()
