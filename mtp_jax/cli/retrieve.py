"""`mtp retrieve SOURCE --task FILE --corpus DIR`: when is it worth to look passages up?"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
from typing import Literal

import tyro

from mtp_jax.cli.common import check_least, figure_table, own_directory, parse, print_json
from mtp_jax.cli.eval_many import default_directory, wide_console
from mtp_jax.decode.drafters import FREE
from mtp_jax.errors import UserError
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.comparison_page import cell
from mtp_jax.eval.identity import checker_identity, model_identity
from mtp_jax.eval.page import make_directory
from mtp_jax.eval.retrieval import asking
from mtp_jax.eval.retrieval.both import Means, answer_both
from mtp_jax.eval.retrieval.corpus import PASSAGE_WORDS, bm25, read_passages
from mtp_jax.eval.retrieval.table import Measured, Row, measure_gates, split
from mtp_jax.eval.task_file import Fields, read_task
from mtp_jax.loading import load
from mtp_jax.runs.compiled import keep_compiled
from mtp_jax.runs.integrity import new_directories
from mtp_jax.runs.progress import say

COLUMNS = (
    "gate",
    "accuracy (95 %)",
    "minus always",
    "retriever calls",
    "model calls",
    "prompt tokens",
    "answer tokens",
    "ROC-AUC",
)
KINDS = {"threshold": ("threshold",), "logistic": ("logistic",), "both": ("threshold", "logistic")}


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of `mtp retrieve`."""

    source: tyro.conf.Positional[str]
    """Workdir of `mtp train`, `mtp quickstart` or `mtp import`; Hugging Face directory or hub id; .gguf file; smollm2
    (SmolLM2-135M-Instruct, fetched once)."""
    task: str = ""
    """A .jsonl of questions with answers, as for `mtp eval --task`."""
    corpus: str = ""
    """Directory of text files (.txt, .md, .rst), which are cut into passages."""
    checker: str = "contains"
    """Who judges the answers: contains (the expected words are in the answer), exact, number, regex, or a
    function as FILE.py:NAME."""
    train_share: float = 0.5
    """Share of the questions on which the gates are fitted. All rows are measured on the others."""
    gate: Literal["threshold", "logistic", "both"] = "both"
    """Form of the gates."""
    passages: int = 3
    """Passages per question."""
    passage_words: int = PASSAGE_WORDS
    """Most words of a passage."""
    samples: int = 0
    """Answers that are drawn for the scores that compare samples; 0 leaves these scores out."""
    temperature: float = 1.0
    """Temperature of the samples. The answers themselves are greedy."""
    max_new_tokens: int = 32
    """Most tokens of an answer."""
    chat: bool = False
    """Put each prompt into the chat template, as the message of a user."""
    closed: str = asking.CLOSED
    """The prompt without passages; {question} stands for the question."""
    opened: str = asking.OPENED
    """The prompt with passages; {passages} stands for them."""
    verdict: str = asking.VERDICT
    """The prompt for the score p_true; {answer} stands for the answer without passages."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A string that ends an answer; may be given several times."""
    prompt_field: str = ""
    """Field of a record that holds the question; the default is the first of messages, prompt, question, problem,
    text."""
    answer_field: str = ""
    """Field of a record that holds the expected answer; the default is the first of answer, target, solution."""
    limit: int = 0
    """Most questions; 0 takes all."""
    seed: int = 0
    """Seed of the split into training and test questions, and of the samples."""
    batch_size: int = 16
    """Questions that are answered together."""
    draft: Literal["heads", "lookup", "heads+lookup", "local", "none", "auto"] = "none"
    """Who drafts. It changes the speed, not the answers."""
    output: str = ""
    """Directory for the answers and the gates. The default is SOURCE/eval for a run, and NAME-eval in the current
    directory for a Hugging Face checkpoint."""
    ignore: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pattern of config fields and tensors of a Hugging Face checkpoint to ignore; may be given several times."""
    json: bool = False
    """Print one JSON object instead of a table."""


def main(argv: list[str]) -> None:
    """Answers the questions, fits the gates, and prints the table."""
    args = parse(Args, argv, "mtp retrieve", "Measure when retrieval helps: gates on the uncertainty of an answer.")
    measured, directory = measure(args)
    if args.json:
        files = {"answers_file": str(_answers_file(args)), "gates_directory": str(directory)}
        print_json({"task": args.task, "corpus": args.corpus, "model": args.source} | measured.as_json() | files)
        return
    _print(measured)
    print(f"answers: {_answers_file(args)}")
    print(f"gates: {directory}")


def measure(args: Args) -> tuple[Measured, pathlib.Path]:
    """Answers the questions that have no answers yet, and measures all gates.

    Returns:
      The table, and the directory with the fitted gates.
    """
    how = _checked(args)
    questions = read_task(args.task, args.checker, Fields(args.prompt_field, args.answer_field), args.limit)
    train, test = split(len(questions), args.train_share, args.seed)
    check = checker(args.checker)
    passages = read_passages(args.corpus, args.passage_words)
    retriever = bm25(passages, args.passages)
    say(f"{len(questions)} questions of {args.task}, {len(passages)} passages of {args.corpus}")
    path = _answers_file(args)
    with new_directories(path.parent):
        make_directory(path.parent)  # before the work, so that a bad path fails at once
        keep_compiled(own_directory(args.source))
        lm = load(
            args.source,
            decode_only=True,
            ignore=args.ignore,
            shipped_heads=args.draft not in (*FREE, "none"),
        )
        corpus = hashlib.sha256(json.dumps(passages).encode()).hexdigest()
        made_from = {"model": {"source": args.source, "ignore": args.ignore} | model_identity(lm, args.source)}
        made_from |= {"corpus": corpus, "passages": args.passages} | checker_identity(args.checker)
        means = Means(retriever, check, made_from, args.batch_size)
        answered = answer_both(lm, questions, how, means, path, progress=say)
    measured = measure_gates(answered, train, test, kinds=KINDS[args.gate])
    return measured, _save_gates(measured, path)


def _checked(args: Args) -> asking.Asking:
    for name, what in (("task", "FILE.jsonl"), ("corpus", "DIR")):
        if not getattr(args, name):
            raise UserError(f"mtp retrieve needs --{name} {what}; mtp retrieve --help lists the options")
    if args.checker == "code":
        raise UserError("--checker code runs programs; mtp retrieve is for short answers, so use contains or exact")
    check_least(args, {"limit": 0, "passages": 1, "passage_words": 1, "max_new_tokens": 1, "batch_size": 1, "seed": 0})
    if args.temperature != Args.temperature and not args.samples:
        raise UserError(f"--temperature {args.temperature} is for samples; give --samples too, or leave it out")
    names = ("samples", "temperature", "max_new_tokens", "closed", "opened", "verdict", "stop", "seed", "draft")
    return asking.Asking(as_chat=args.chat, **{name: getattr(args, name) for name in names})


def _answers_file(args: Args) -> pathlib.Path:
    directory = pathlib.Path(args.output) if args.output else default_directory(args.source)
    return directory / f"{pathlib.Path(args.task).stem}-retrieval.jsonl"


def _save_gates(measured: Measured, answers: pathlib.Path) -> pathlib.Path:
    """Writes every gate to a file of its name, for `load_gate`."""
    directory = answers.with_name(f"{answers.stem}-gates")
    make_directory(directory)
    for row in measured.rows:
        if row.gate is not None:
            row.gate.save(directory / f"{re.sub(r'[^a-z_]+', '-', row.name)}.json")
    return directory


def cells(measured: Measured, row: Row) -> tuple[str, ...]:
    """A row of the table as texts, one per name in `COLUMNS`. Costs are per question."""
    cost = row.per_question()
    apart = "" if row.name == "always" else cell(measured.over_always(row), signed=True)
    calls = (f"{cost['retriever_calls']:.2f}", f"{cost['model_calls']:.2f}")
    tokens = (f"{cost['prompt_tokens']:.0f}", f"{cost['answer_tokens']:.0f}")
    auc = "" if math.isnan(row.auc) else f"{row.auc:.2f}"
    return (row.name, cell(row.accuracy), apart, *calls, *tokens, auc)


def _print(measured: Measured) -> None:
    console = wide_console()
    console.print(f"{measured.train} questions for fitting, {measured.test} for the table; costs are per question")
    console.print(figure_table(COLUMNS, (cells(measured, row) for row in measured.rows)))
    for name, reason in measured.not_fitted.items():
        console.print(f"not fitted: {name}: {reason}")
