"""Is the data loader fast enough? Compares the tokens per second of Grain with those that the training step uses.

    python benchmarks/input_pipeline.py                                           # about 2 minutes on two cores
    python benchmarks/input_pipeline.py --configs configs/tiny.py --seconds 1 --runs 1 --results ''    # a trial

Grain alone reads batches as `mtp train` does: packed rows from a memory-mapped file of random tokens, in documents of
300 tokens. The step runs in two ways, in alternating runs: on the same batch again and again, and with a new batch each
time. The last column is the median ratio of the two times. On a CPU the threads of Grain use time that the step could
use.
"""

import dataclasses
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import tyro
from reporting import RESULTS, Report

from mtp_jax import Config
from mtp_jax.bench.timing import in_turns, ratio
from mtp_jax.bench.train import Step
from mtp_jax.cli.common import read_config
from mtp_jax.config import override
from mtp_jax.data.loader import prepare, train_batches
from mtp_jax.data.store import Corpus
from mtp_jax.training.step import StepMetrics

DOCUMENT = 300


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    configs: tuple[str, ...] = ("configs/tiny.py", "configs/quickstart.py", "configs/bench_30m.py")
    """Configs that give batch size, row length and vocabulary."""
    tokens: int = 20_000_000
    """Number of tokens in the file."""
    seconds: float = 5.0
    """Seconds for which Grain runs alone."""
    runs: int = 5
    """Number of timed runs of the step."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def corpus_of(config: Config, tokens: int, directory: pathlib.Path) -> Corpus:
    """A corpus of random tokens, prepared in the same way as that of a run."""
    source, shape = directory / "tokens.npy", (max(tokens // DOCUMENT, 2), DOCUMENT)
    np.save(source, np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32))
    changes = {"data.source": str(source), "data.tokenizer": "none", "data.prompt_tokens": 0}
    return prepare(override(config, changes), directory)


def grain_speed(config: Config, corpus: Corpus, seconds: float) -> float:
    """Tokens per second of the iterator, without its first batches."""
    batches = train_batches(corpus.train, config.train.batch_size, config.train.seed)
    for _ in range(8):
        next(batches)
    count, began = 0, time.perf_counter()
    while (taken := time.perf_counter() - began) < seconds:
        count += next(batches)["tokens"].size
    return count / taken


def step_times(config: Config, corpus: Corpus, runs: int) -> dict[str, list[float]]:
    """Seconds of a step: on the same batch again and again, and with batches from the iterator."""
    step, batches = Step(config), train_batches(corpus.train, config.train.batch_size, config.train.seed)

    def fed() -> StepMetrics:
        step.feed(next(batches))
        return step()

    return in_turns({"alone": step, "fed": fed}, runs)


def main() -> None:
    """Measures and publishes the table."""
    args = tyro.cli(Args, description=__doc__)
    rows = []
    for path in args.configs:
        config = read_config(path)
        with tempfile.TemporaryDirectory() as directory:
            corpus = corpus_of(config, args.tokens, pathlib.Path(directory))
            supply = grain_speed(config, corpus, args.seconds)
            times = step_times(config, corpus, args.runs)
        shape = (config.train.batch_size, config.data.seq_len)
        demand = shape[0] * shape[1] / statistics.median(times["alone"])
        figures = (f"{supply:,.0f}", f"{demand:,.0f}", f"{supply / demand:,.0f}")
        rows.append((path, f"{shape[0]} x {shape[1]}", *figures, f"{ratio(times['fed'], times['alone']):.3f}"))
        print("  ".join(rows[-1]), flush=True)
    columns = ("config", "rows x tokens", "Grain, tokens/s", "step, tokens/s", "Grain over step", "fed over alone")
    Report("The input pipeline against the step", columns, rows).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
