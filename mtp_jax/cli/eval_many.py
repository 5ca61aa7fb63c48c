"""The parts of `mtp eval` for several models or kinds of text, and for tasks."""

import pathlib
import re
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from mtp_jax.cli.common import check_least, figure_table, own_directory, print_json
from mtp_jax.data.synthetic import is_synthetic, with_seed
from mtp_jax.decode.drafters import FREE
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.comparison import Compared, Plan, compare_models
from mtp_jax.eval.comparison_page import cell, columns, control_lines, rows, short_names, write_comparison
from mtp_jax.eval.identity import checker_identity, model_identity
from mtp_jax.eval.intervals import difference
from mtp_jax.eval.page import make_directory
from mtp_jax.eval.sandbox.outside import Limits, isolation
from mtp_jax.eval.spans import finder
from mtp_jax.eval.task_file import Fields, read_task
from mtp_jax.eval.task_run import Answering, TaskResult, run_task
from mtp_jax.loading import LoadedModel, is_run, load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say

if TYPE_CHECKING:
    from mtp_jax.cli.eval import Args

WIDE = 400
IN_PROCESSES = ("code", "regex")
JUDGES = 4
"""Answers that are judged at once, if each is judged in a process."""


def compare(args: "Args") -> None:
    """Several models, or several kinds of text."""
    _check_names(args)
    directory = pathlib.Path(args.output or "comparison")
    plan = Plan(
        texts=_kinds(args.data or (args.spans,)),
        text_field=args.text_field,
        find=finder(args.spans) if args.spans else None,
        num_prompts=args.num_prompts,
        max_new_tokens=args.max_new_tokens,
    )

    def open_model(name: str) -> LoadedModel:
        keep_compiled(own_directory(name))
        return load(name, ignore=args.ignore, heads_from=args.heads_from or None)

    with new_directories(directory):
        make_directory(directory)
        compared = compare_models(args.sources, open_model, plan, progress=say)
        page = write_comparison(directory, " and ".join(short_names(compared.names)), compared)
    if args.json:
        print_json(compared.as_json() | {"report": str(page)})
    else:
        print_compared(compared)
        print(f"report: {page}")


def _check_names(args: "Args") -> None:
    if len(set(args.sources)) < len(args.sources):
        raise UserError("a model is named twice; name each once")
    if args.heads_from and len(args.sources) > 1:
        raise UserError(
            "--heads-from is for a single model; import the others first: mtp import SOURCE OUT --heads-from FILE"
        )


def _kinds(data: tuple[str, ...]) -> dict[str, str]:
    """Text by kind. `NAME=TEXT` gives the name; without it the text is its own name."""
    found = {}
    for one in data:
        named = re.fullmatch(r"([\w .-]+)=(.+)", one)
        kind, source = named.groups() if named else (one, one)
        if is_synthetic(source):
            source = with_seed(source, 1)
        if kind in found:
            raise UserError(f"--data {one}: there are two texts of the kind {kind!r}; give each another NAME=")
        found[kind] = source
    return found


def wide_console() -> Console:
    """Standard output. In a file, tables have as much room as they need."""
    width = None if sys.stdout.isatty() else WIDE
    return Console(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, width=width)


def print_compared(compared: Compared, without: tuple[str, ...] = ()) -> None:
    """Prints a table for every kind of text, the controls, and what a reader must see.

    Args:
      compared: the figures.
      without: beginnings of the names of figures that are left out.
    """
    console = wide_console()
    for kind in compared.measured[0]:
        kept = (row for row in rows(compared, kind) if not row[0].startswith(without))
        console.print()
        console.print(f"{kind}: {compared.measured[0][kind].documents} documents; 95 % intervals in parentheses")
        console.print(figure_table(columns(compared), kept))
        console.print("Negative controls, which must fail:")
        for name, kinds in zip(short_names(compared.names), compared.measured, strict=True):
            for line in control_lines(kinds[kind]):
                console.print(f"  {name}: {line}")
    for line in compared.warnings():
        console.print(f"!!! {line}", style="bold red")


def solve(args: "Args") -> None:
    """Answers the questions of a task with every model, and judges the answers."""
    _check_names(args)
    check_least(args, {"limit": 0, "samples": 1, "batch_size": 1, "max_new_tokens": 0})
    if args.samples > 1 and not args.temperature:
        raise UserError(f"--samples {args.samples} at temperature 0 gives equal answers; give --temperature 0.8")
    check = checker(args.checker, Limits(seconds=args.time_limit))
    questions = read_task(
        args.task, args.checker, Fields(args.prompt_field, args.answer_field, args.template), args.limit
    )
    if args.checker in IN_PROCESSES:
        say_isolation()
    how = answering(args)
    results = []
    files = []
    for name in args.sources:
        files.append(_answers_file(args, name))
        say(f"{name}: {len(questions)} questions of {args.task}, answers in {files[-1]}")
        lm = opened(args, name, heads_from=args.heads_from or None)
        origin = made_from(args, lm, name)
        results.append(run_task(lm, questions, check, how, files[-1], made_from=origin, progress=say))
    _report(args, results, files)


def opened(args: Any, name: str, **others: Any) -> LoadedModel:
    """The model that answers questions: one that only decodes, with the heads that `--draft` needs.

    Raises:
      UserError: the model cannot be loaded, or it has no tokenizer.
    """
    keep_compiled(own_directory(name))
    shipped = args.draft not in (*FREE, "none")
    lm = load(name, decode_only=True, ignore=args.ignore, shipped_heads=shipped, **others)
    if lm.tokenizer is None:
        raise UserError(f"{name} has no tokenizer, so it cannot read the questions; give a model that reads text")
    return lm


def answering(args: Any) -> Answering:
    """How a command's arguments ask for answers. Those that `mtp eval` and `mtp compare` share have the same names."""
    return Answering(
        max_new_tokens=args.max_new_tokens or 512,
        samples=args.samples,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        batch_size=args.batch_size,
        draft=args.draft,
        stop=args.stop,
        judges=JUDGES if args.checker in IN_PROCESSES else 1,
        judge_seconds=max(args.time_limit, 30.0) + 30.0,
        as_chat=args.chat,
    )


def made_from(args: Any, lm: LoadedModel, name: str) -> dict[str, Any]:
    """What the answers of a model depend on, besides the questions and how they are answered."""
    model = {"source": name, "ignore": args.ignore} | model_identity(lm, name)
    fields = {"prompt_field": args.prompt_field, "answer_field": args.answer_field, "template": args.template}
    limit = {"time_limit": args.time_limit}
    return {"model": model, "task": args.task} | checker_identity(args.checker) | fields | limit


def say_isolation() -> None:
    """Prints a note if the kernel does not keep the code of answers from everything."""
    weak = [name for name, by in isolation().items() if by != "kernel"]
    if weak:
        say(
            f"note: this machine's kernel does not keep the code of answers from: {', '.join(weak)}. Only Python does, "
            "and code can get around that if it sets out to; see docs/evaluate.md"
        )


def default_directory(name: str) -> pathlib.Path:
    """Where the evaluation of a model is written without --output."""
    own = pathlib.Path(name)
    return own / "eval" if is_run(own) else pathlib.Path(f"{own.name}-eval")


def _answers_file(args: "Args", name: str) -> pathlib.Path:
    """The file for the answers of a model."""
    stem = f"{pathlib.Path(args.task).stem}-answers"
    if args.output:
        last = short_names(args.sources)[args.sources.index(name)].strip("/").replace("/", "--")
        return pathlib.Path(args.output) / (f"{stem}.jsonl" if len(args.sources) == 1 else f"{stem}-{last}.jsonl")
    return default_directory(name) / f"{stem}.jsonl"


def _report(args: "Args", results: list[TaskResult], files: list[pathlib.Path]) -> None:
    ratios = [result.ratio for result in results]
    apart = [difference(one, ratios[0]) for one in ratios[1:]]
    models = [
        {"name": name, "answers_file": str(file)} | result.as_json()
        for name, file, result in zip(args.sources, files, results, strict=True)
    ]
    whole: dict[str, Any] = {"task": args.task, "checker": args.checker, "models": models}
    if args.checker in IN_PROCESSES:
        whole["isolation"] = isolation()
    pairs = zip(args.sources[1:], apart, strict=True)
    whole["differences"] = [{"model": name, "baseline": args.sources[0]} | one.as_json() for name, one in pairs]
    if len(models) == 1:
        whole |= models[0]
    if args.json:
        print_json(whole)
        return
    console = wide_console()
    table = Table(
        "model", "accuracy (95 %)", "right", "answers", "cut off", "wrong, by reason", box=None, padding=(0, 2)
    )
    for name, result in zip(short_names(args.sources), results, strict=True):
        counts = ", ".join(f"{count} {reason}" for reason, count in result.reasons.items()) or "-"
        numbers = (sum(map(sum, result.correct)), sum(map(len, result.correct)), result.cut)
        table.add_row(name, cell(result.accuracy), *map(str, numbers), counts)
    console.print(table)
    for name, one in zip(args.sources[1:], apart, strict=True):
        console.print(f"{name} - {args.sources[0]}: {cell(one, signed=True)}, paired over the questions")
    for file in files:
        console.print(f"answers: {file}")
