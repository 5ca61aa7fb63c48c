"""Which settings of `mtp quickstart` make the most of a fixed training time?

    python benchmarks/quickstart_sweep.py --seconds 300

Times a few steps of every setting, gives it as many steps as fit into the time, trains, evaluates on the held-out files
and prints one table row. Run it on an idle machine: the step count depends on the speed it sees.
"""

import argparse
import pathlib
import tempfile
import time

import jax

import mtp_jax
from mtp_jax import sharding
from mtp_jax.cli.quickstart import CONFIG
from mtp_jax.data.loader import prepare, train_batches
from mtp_jax.model.mtp import count_params
from mtp_jax.train.console import RunConsole
from mtp_jax.train.loop import train
from mtp_jax.train.step import compile_steps

WIDE = {"model.d_model": 256, "model.num_heads": 4, "model.num_kv_heads": 4, "model.d_ff": 704}
SETTINGS = {
    "as shipped": {},
    "muon 0.02": {"optim.muon_learning_rate": 0.02},
    "adamw 4e-3": {"optim.name": "adamw", "optim.learning_rate": 4e-3},
    "batch 8": {"train.batch_size": 8},
    "rows of 256, batch 8": {"train.batch_size": 8, "data.seq_len": 256},
    "vocabulary 4096": {"model.vocab_size": 4096},
    "width 256": WIDE,
    "one more layer": {"model.num_layers": 3},
}


def step_seconds(config: mtp_jax.Config, steps: int = 12) -> float:
    """Mean seconds of a training step, compilation apart."""
    mesh = sharding.make_mesh(config.mesh)
    compiled = compile_steps(config, mesh)
    batches = train_batches(prepare(config, None).train, config.train.batch_size, 0)
    with jax.set_mesh(mesh):
        state, _ = compiled.train(compiled.init(jax.random.key(0)), next(batches))
        jax.block_until_ready(state)
        began = time.perf_counter()
        for _ in range(steps):
            state, _ = compiled.train(state, next(batches))
        jax.block_until_ready(state)
    return (time.perf_counter() - began) / steps


def measure(name: str, changes: dict[str, object], seconds: float) -> str:
    """Trains one setting and returns its table row."""
    config = mtp_jax.override(CONFIG, changes)
    steps = int(seconds / step_seconds(config))
    config = mtp_jax.override(config, {"train.steps": steps, "train.checkpoint_every": steps})
    with tempfile.TemporaryDirectory() as workdir, RunConsole() as console:
        began = time.perf_counter()
        result = train(config, pathlib.Path(workdir), console)
        took = time.perf_counter() - began
        evaluation = mtp_jax.evaluate(mtp_jax.load(workdir), result.corpus.heldout)
    decoding, heads = evaluation.decoding, evaluation.as_json()["heads"]
    accepted = " / ".join(f"{rate:.0%}" for rate in decoding.drafted.stats.accept_at)
    losses = f"{heads[0]['loss']:.2f} / {heads[1]['loss']:.2f}"
    cells = (
        *(name, f"{count_params(config) / 1e6:.2f}M", f"{steps}", f"{took:.0f}", f"{evaluation.bits_per_byte:.3f}"),
        *(losses, f"{decoding.drafted.stats.tokens_per_round:.2f}", accepted, f"{evaluation.distinct:.0%}"),
        f"{decoding.speedup:.2f}x",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="training time of a setting")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names of settings")
    options = parser.parse_args()
    print(
        "| setting | parameters | steps | s | bits/byte | loss, heads 0 / 1 | tokens/round | accepted | distinct "
        "| drafted/plain |\n"
        "|---|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.only:
        print(measure(name, SETTINGS[name], options.seconds), flush=True)


if __name__ == "__main__":
    main()
