"""What does recomputation cost, and what does it save? Time and memory of the training step for each `model.remat`.

    python benchmarks/remat.py                                                  # about 5 minutes on two cores
    python benchmarks/remat.py --heads 1 --accum 1 --batch-size 16 --dtype bfloat16
    python benchmarks/remat.py --layers 3 --vocab 512 --runs 1 --results ''     # a trial

Width 512, feed-forward 1,408, AdamW, parallel heads with blocks taken from the trunk. Steps with gradient accumulation
are measured, too. The runs of all steps alternate in one process. `recomputed` is the share of additional operations in
the step, compared with those that the model needs. It can be below 0, because attention in blocks skips a part of the
masked scores. On a CPU the memory of the host is that of the device, so that offload saves nothing over block there.
"""

import dataclasses

import jax
import tyro
from jax.interpreters import partial_eval
from reporting import RESULTS, Report
from shapes import config

from mtp_jax import sharding
from mtp_jax.aot import flops, programs
from mtp_jax.bench.train import measure
from mtp_jax.config import Config
from mtp_jax.cost.flops import step_flops
from mtp_jax.runs.progress import say

POLICIES = ("none", "dots", "block", "offload")


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    policies: tuple[str, ...] = POLICIES
    """Values of `model.remat`. The others are compared with the first."""
    accum: tuple[int, ...] = (1, 4)
    """Numbers of micro-batches per step. Numbers above 1 are measured only with the first policy."""
    heads: int = 4
    """Numbers of heads M, head 0 included."""
    layers: int = 8
    """Number of blocks, those of the heads included."""
    vocab: int = 32_000
    """Vocabulary."""
    batch_size: int = 4
    """Rows."""
    seq_len: int = 512
    """Tokens of a row."""
    dtype: str = "float32"
    """`model.dtype`."""
    runs: int = 3
    """Number of timed runs."""
    results: str = RESULTS
    """File to append the table to; with an empty name the table is only printed."""


def configs(args: Args) -> dict[str, Config]:
    """The runs by name. The first is the one that the others are compared with."""
    shape = dict(total_layers=args.layers, vocab_size=args.vocab, batch_size=args.batch_size, seq_len=args.seq_len)
    plain = config(num_future=args.heads, **shape)

    def one(remat: str, accum: int) -> Config:
        model = dataclasses.replace(plain.model, remat=remat, dtype=args.dtype)
        return dataclasses.replace(plain, model=model, train=dataclasses.replace(plain.train, grad_accum=accum))

    first = args.policies[0]
    runs = {remat: one(remat, 1) for remat in args.policies}
    return runs | {f"{first}, {count} micro-batches": one(first, count) for count in args.accum if count > 1}


def recomputed(config: Config) -> float:
    """Operations of the step's matrix products divided by those that the model needs, minus 1."""
    jaxpr = programs.train_step(config, sharding.mesh_of(config)).traced.jaxpr.jaxpr
    needed, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return flops.count(needed).flops / step_flops(config, config.train.batch_size, config.data.seq_len) - 1


def main() -> None:
    """Measures and publishes the table."""
    args = tyro.cli(Args, description=__doc__)
    runs = configs(args)
    rows = []
    for name, result in measure(runs, args.runs, progress=say).items():
        memory = f"{result['temp_bytes'] / 1e6:,.0f}", f"{result['argument_bytes'] / 1e6:,.0f}"
        time = f"{result['seconds']:.3f}", f"{result['over_first']:.3f}"
        rows.append((name, *memory, *time, f"{recomputed(runs[name]):.1%}", f"{result['share_of_peak']:.0%}"))
    columns = (
        *("remat", "temporaries, MB", "arguments, MB", "s a step", "time over first"),
        *("recomputed", "needed operations, of the machine's products"),
    )
    note = (
        f"M = {args.heads}, {args.layers} blocks, {args.batch_size} rows of {args.seq_len} tokens, vocabulary "
        f"{args.vocab:,}, {args.dtype}."
    )
    Report("Memory against time: remat and micro-batches", columns, rows, note).publish(
        args.results, jax.devices()[0].device_kind
    )


if __name__ == "__main__":
    main()
