"""Do soft thinking and proxy-tuning make answers better? Two tables on SmolLM2-135M-Instruct.

    python benchmarks/decode_time.py GSM8K.jsonl --out runs/decode_time

GSM8K.jsonl has the fields `question` and `answer`. The second set of questions is made by `word_problems.py`. So is the
training data of the expert: SmolLM2 with a LoRA of rank 8, tuned on other made problems with
`configs/next_token_lora.py`. Nothing is trained on GSM8K.

    soft       soft thinking against tokens, greedy and drawn. Every question asks for `#### N`. So `####`, which is
               one token of SmolLM2, ends the thinking, and the number after it is the answer in ordinary tokens
    proxy      SmolLM2 is base and anti-expert, the tuned model is the expert: base + alpha (expert - base)

Answers are kept in `--out`. A run that was cut off continues there.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from typing import Literal

import jax
import tyro
from reporting import RESULTS, Report
from word_problems import ASKED, expert, made_problems, write_questions

import mtp_jax
from mtp_jax.decode.hooks import HookMaker
from mtp_jax.eval.checkers import checker
from mtp_jax.eval.intervals import Interval, difference
from mtp_jax.eval.task_file import Fields, Question, read_task
from mtp_jax.eval.task_run import Answering, TaskResult, run_task
from mtp_jax.loading import LoadedModel
from mtp_jax.runs.compiled import keep_compiled

ENDS = ("####", " ####")
"""Both are one token of SmolLM2."""
ALPHAS = (0.5, 1.0, 1.5)
COLUMNS = ("questions", "setting", "right", "over the first line", "tokens an answer", "cut off")


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    gsm8k: tyro.conf.Positional[str]
    """The questions of GSM8K."""
    out: pathlib.Path = pathlib.Path("runs/decode_time")
    """Directory for the expert and the answers."""
    tables: tuple[Literal["soft", "proxy"], ...] = ("soft", "proxy")
    """Which tables to make."""
    questions: int = 30
    """Questions of GSM8K."""
    problems: int = 60
    """Held-out made problems."""
    pairs: int = 1200
    """Made problems that the expert is trained on."""
    steps: int = 40
    """Training steps of the expert, of 2 rows of 208 tokens."""
    max_new_tokens: int = 160
    samples: int = 2
    """Answers to a question where they are drawn."""
    batch_size: int = 15
    results: str = RESULTS


@dataclasses.dataclass(frozen=True)
class Setting:
    """One line of a table."""

    name: str
    model: Literal["base", "expert"]
    hooks: tuple[HookMaker, ...] = ()
    temperature: float = 0.0
    drawn: bool = False
    """Whether answers to a question differ, so that several are taken."""


@dataclasses.dataclass(frozen=True)
class Answered:
    """Verdicts on a setting's answers, and their mean number of tokens."""

    result: TaskResult
    tokens: float


@dataclasses.dataclass(frozen=True)
class Setup:
    """Models and questions."""

    args: Args
    models: dict[str, LoadedModel]
    tasks: dict[str, list[Question]]

    def answered(self, task: str, setting: Setting) -> Answered:
        """The answers of one setting, made now or read from the file."""
        args = self.args
        how = Answering(
            max_new_tokens=args.max_new_tokens,
            samples=args.samples if setting.drawn else 1,
            temperature=setting.temperature,
            top_p=0.95 if setting.temperature else None,
            batch_size=args.batch_size,
            draft="none",
            as_chat=True,
            hooks=setting.hooks,
        )
        path = args.out / "answers" / f"{task} {setting.model} {setting.name}.jsonl".replace(" ", "_")
        made_from = {"setting": setting.name, "model": setting.model, "pairs": args.pairs, "steps": args.steps}
        began = time.monotonic()
        result = run_task(
            self.models[setting.model], self.tasks[task], checker("number"), how, path, made_from=made_from
        )
        kept = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        found = Answered(result, statistics.mean(one["tokens"] for one in kept))
        seconds = time.monotonic() - began
        print(f"{task}, {setting.model}, {setting.name}: {shown(result.accuracy)}, {seconds:.0f} s", flush=True)
        return found


def shown(interval: Interval) -> str:
    """A share in percent with its interval."""
    value, low, high = (f"{100 * one:.1f}" for one in interval)
    return f"{value} [{low}, {high}]"


def lines(setup: Setup, task: str, settings: list[Setting]) -> list[tuple[str, ...]]:
    """The lines of one set of questions. Every setting is compared with the first one, question by question."""
    found = [(setting, setup.answered(task, setting)) for setting in settings]
    first = found[0][1].result
    rows = []
    for setting, one in found:
        apart = "" if one.result is first else shown(difference(one.result.ratio, first.ratio))
        answers = sum(map(len, one.result.correct))
        cut = f"{one.result.cut} of {answers}"
        rows.append((task, setting.name, shown(one.result.accuracy), apart, f"{one.tokens:.0f}", cut))
    return rows


def closed(base: float, steered: float, tuned: float) -> float:
    """The share of the distance from the base to the tuned model that steering closes (arXiv:2401.08565, section 4)."""
    return (steered - base) / (tuned - base)


def soft_settings(model: Literal["base", "expert"]) -> list[Setting]:
    """Tokens and mixtures, with and without chance."""
    soft = mtp_jax.SoftThinking(end=ENDS)
    noisy = dataclasses.replace(soft, gumbel=0.5, max_topk=5)
    return [
        Setting("tokens, greedy", model),
        Setting("tokens, temperature 0.6", model, temperature=0.6, drawn=True),
        Setting("soft thinking", model, (soft,)),
        Setting("soft thinking, Gumbel 0.5", model, (noisy,), drawn=True),
    ]


def proxy_settings(models: dict[str, LoadedModel]) -> list[Setting]:
    """The base, the expert, and the base with a part of their difference."""
    steered = [
        Setting(f"alpha {alpha}", "base", (mtp_jax.ProxyTuning(models["expert"], models["base"], alpha),))
        for alpha in ALPHAS
    ]
    return [Setting("tokens, greedy", "base"), *steered, Setting("tokens, greedy", "expert")]


def prepared(args: Args) -> Setup:
    """Trains the expert, unless it is there, and reads the questions."""
    made = made_problems(args.problems + args.pairs)
    workdir = expert(args.out, made[args.problems :], args.steps)
    path = args.out / "heldout.jsonl"
    write_questions(path, made[: args.problems])
    fields = Fields(template=f"{{question}} {ASKED}")
    tasks = {
        "made": read_task(str(path), "number", Fields()),
        "GSM8K": read_task(args.gsm8k, "number", fields, args.questions),
    }
    keep_compiled(args.out)
    models = {
        name: mtp_jax.load(source, decode_only=True) for name, source in (("base", "smollm2"), ("expert", workdir))
    }
    return Setup(args, models, tasks)


def soft_table(setup: Setup) -> Report:
    """Soft thinking against tokens."""
    args = setup.args
    rows = lines(setup, "GSM8K", soft_settings("base")) + lines(setup, "made", soft_settings("expert"))
    note = (
        f"{args.questions} questions of GSM8K with `smollm2`, and {args.problems} made problems with the expert, which "
        f"can solve some. At most {args.max_new_tokens} new tokens. Thinking ends at `####`, at temperature 0.6 with "
        f"top-p 0.95 and top-k 30; the answer after it is greedy. {args.samples} answers to a question where there is "
        "chance. A visible token of a mixture counts as one token. Intervals of 95 %, over questions."
    )
    return Report("Soft thinking against tokens", COLUMNS, rows, note)


def closed_by(setup: Setup, settings: list[Setting]) -> str:
    """The shares of the distance that each alpha closes on made problems; empty if the expert is not better."""
    base, *steered, tuned = (setup.answered("made", setting).result.accuracy.value for setting in settings)
    if tuned <= base:
        return ""
    found = zip(ALPHAS, steered, strict=True)
    return ", ".join(f"{100 * closed(base, one, tuned):.0f} % (alpha {alpha})" for alpha, one in found)


def proxy_table(setup: Setup) -> Report:
    """Proxy-tuning with a LoRA expert."""
    args = setup.args
    settings = proxy_settings(setup.models)
    rows = []
    for task in setup.tasks:
        found = lines(setup, task, settings)
        named = ["base", *(line[1] for line in found[1:-1]), "expert alone"]
        rows += [(line[0], name, *line[2:]) for line, name in zip(found, named, strict=True)]
    note = (
        f"Base and anti-expert: `smollm2`. Expert: a LoRA of rank 8 on it, {args.steps} steps on {args.pairs} made "
        f"problems. {args.questions} questions of GSM8K and {args.problems} held-out made problems, greedy, at most "
        f"{args.max_new_tokens} new tokens. Alpha 1 is the expert itself, up to rounding. Intervals of 95 %, over "
        "questions."
    )
    shares = closed_by(setup, settings)
    note += f" Share of the distance from base to expert that is closed on made problems: {shares}." if shares else ""
    return Report("Proxy-tuning with an expert of the same size", COLUMNS, rows, note)


def main() -> None:
    """Trains, answers and publishes."""
    args = tyro.cli(Args, description=__doc__)
    setup = prepared(args)
    makers = {"soft": soft_table, "proxy": proxy_table}
    for table in args.tables:
        makers[table](setup).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
