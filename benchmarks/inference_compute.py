"""Does more compute at inference help a small model? Votes, choices and revisions, by accuracy and tokens.

    python benchmarks/inference_compute.py smollm2 DATA [--samples 4] [--tasks sums] [--methods vote revise]

DATA is a directory with `gsm8k_test.jsonl` and `mbpp_test.jsonl`. The task `sums` has sums of two numbers below 100.
The script writes them, because a small model solves hardly anything of the other two. It runs `mtp compare` on the
first questions of each, and publishes one table per task. A killed run goes on with the same command. With more
`--samples` it goes on from fewer.
"""

import argparse
import contextlib
import io
import json
import pathlib
import random
from typing import Any

import jax
from reporting import RESULTS, Report

from mtp_jax.cli import compare
from mtp_jax.eval.comparison_page import cell
from mtp_jax.eval.intervals import Interval
from mtp_jax.runs.integrity import write_atomically

METHODS = ("vote", "best-judge", "best-logprob", "best-short", "revise")
SUMS = 64
TASKS = {
    "sums": [
        *("--checker", "number", "--max-new-tokens", "8", "--stop", "\n"),
        *("--template", "12 + 5 = 17\n30 + 49 = 79\n{prompt} ="),
    ],
    "gsm8k_test": ["--checker", "number", "--chat", "--limit", "20", "--max-new-tokens", "160"],
    "mbpp_test": [
        *("--checker", "code", "--chat", "--limit", "12", "--max-new-tokens", "128"),
        *("--template", "{prompt}\nThe code must pass:\n{test}\nWrite the code only."),
    ],
}
COLUMNS = ("method", "tokens per question", "of these by the judge", "accuracy (95 %)", "seconds", "on the front")


def write_sums(path: pathlib.Path) -> None:
    """Questions about sums, the same in every run."""
    rng = random.Random(0)
    pairs = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(SUMS)]
    lines = [json.dumps({"question": f"{a} + {b}", "answer": a + b}) + "\n" for a, b in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(lines))


def compared(source: str, task: pathlib.Path, more: list[str], workdir: str) -> dict[str, Any]:
    """The JSON object of `mtp compare`."""
    words = [source, "--task", str(task), *TASKS[task.stem], *more, "--output", workdir, "--json"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        compare.main(words)
    return json.loads(printed.getvalue())


def rows(model: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per method and number of responses."""
    found = []
    for row in model["methods"]:
        name = f"{row['method']}@{row['k']}"
        accuracy = cell(Interval(**row["accuracy"]))
        counts = (f"{row['tokens']:,.0f}", f"{row['judge']:,.0f}")
        found.append((name, *counts, accuracy, f"{row['seconds']:.2f}", "yes" if name in model["pareto"] else ""))
    return found


def note(whole: dict[str, Any], samples: int) -> str:
    """What the table is about, with pass@k and maj@k."""
    model = whole["models"][0]
    bounds = ", ".join(
        f"pass@{k} {one:.3f} and maj@{k} {model['maj_at_k'][k]:.3f}" for k, one in model["pass_at_k"].items()
    )
    unscored = f", {model['unscored']} not scored by the judge" if "unscored" in model else ""
    return (
        f"{whole['questions']} questions, {samples} samples each at temperature 0.8. Samples: {model['right']} of "
        f"{model['samples']} right, {model['cut']} cut by the limit (wrong), {model['without_answer']} without an "
        f"answer to vote{unscored}. {bounds}. Other processes kept both cores busy: compare seconds "
        "between rows only."
    )


def main() -> None:
    """Runs the comparisons and publishes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--workdir", default="runs/inference_compute")
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    for name in args.tasks:
        file = args.data / f"{name}.jsonl"
        if name == "sums":
            file = pathlib.Path(args.workdir) / "sums.jsonl"
            write_sums(file)
        more = ["--samples", str(args.samples), "--methods", *args.methods]
        whole = compared(args.source, file, more, args.workdir)
        title = f"Inference compute compared: {args.source} on {name}"
        report = Report(title, COLUMNS, rows(whole["models"][0]), note(whole, args.samples))
        report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
