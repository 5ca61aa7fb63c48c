"""Which settings of `mtp quickstart` make the most of five minutes of training?

    python benchmarks/quickstart_sweep.py

Every setting has the number of steps that take about 300 s on two idle cores of the machine in RESULTS.md (measured
with `step_seconds`, which `--time` prints). Trains each, evaluates on the held-out files, prints one table row.
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
SHALLOW = {"model.num_layers": 2}
SETTINGS = {
    "3 layers, width 192, muon 0.02, 16 x 128": {},
    "muon 0.01": {"optim.muon_learning_rate": 0.01},
    "2 layers": {**SHALLOW, "train.steps": 1065},
    "2 layers, muon 0.01": {**SHALLOW, "optim.muon_learning_rate": 0.01, "train.steps": 1000},
    "2 layers, 8 x 128": {**SHALLOW, "train.batch_size": 8, "train.steps": 2050},
    "2 layers, 8 x 128, muon 0.01": {
        **SHALLOW,
        "train.batch_size": 8,
        "train.steps": 2050,
        "optim.muon_learning_rate": 0.01,
    },
    "2 layers, adamw 4e-3": {**SHALLOW, "optim.name": "adamw", "optim.learning_rate": 4e-3, "train.steps": 1190},
    "2 layers, width 256": {**SHALLOW, **WIDE, "train.steps": 685},
    "2 layers, vocabulary 4096": {**SHALLOW, "model.vocab_size": 4096, "train.steps": 890},
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


def measure(name: str, changes: dict[str, object]) -> str:
    """Trains one setting and returns its table row."""
    config = mtp_jax.override(CONFIG, changes)
    config = mtp_jax.override(config, {"train.checkpoint_every": config.train.steps})
    with tempfile.TemporaryDirectory() as workdir, RunConsole(quiet=True) as console:
        result = train(config, pathlib.Path(workdir), console)
        evaluation = mtp_jax.evaluate(mtp_jax.load(workdir), result.corpus.heldout)
    decoding, heads = evaluation.decoding, evaluation.as_json()["heads"]
    accepted = " / ".join(f"{rate:.0%}" for rate in decoding.drafted.stats.accept_at)
    losses = " / ".join(f"{head['loss']:.2f}" for head in heads)
    cells = (
        *(name, f"{count_params(config) / 1e6:.2f}M", f"{config.train.steps}", f"{evaluation.bits_per_byte:.3f}"),
        *(losses, f"{decoding.drafted.stats.tokens_per_round:.2f}", accepted, f"{evaluation.distinct:.0%}"),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names of settings")
    parser.add_argument("--time", action="store_true", help="print seconds per step of every setting and stop")
    options = parser.parse_args()
    if options.time:
        for name in options.only:
            print(f"{name}: {step_seconds(mtp_jax.override(CONFIG, SETTINGS[name])):.3f} s a step", flush=True)
        return
    print(
        "| setting | parameters | steps | bits/byte | loss by head | tokens/round | accepted | distinct |", flush=True
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.only:
        print(measure(name, SETTINGS[name]), flush=True)


if __name__ == "__main__":
    main()
