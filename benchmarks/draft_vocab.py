"""What does a smaller draft vocabulary save in a round? Bytes and milliseconds of the same heads over fewer tokens.

    python benchmarks/draft_vocab.py smollm2 [--sizes 2048 8192 32768]

A head multiplies its state by one row per token that it can draft. The last line is heads that draft over the whole
vocabulary. Float32, one row. The time does not depend on which tokens are chosen, so the first ones are taken.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
from real_checkpoint import parts_ms
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.config import override
from mtp_jax.loading import LoadedModel

COLUMNS = (
    "tokens that heads draft",
    "MB read for drafts",
    "MB read in a round",
    "drafting, ms",
    "a round, ms",
    "of plain",
)


def over(lm: LoadedModel, size: int) -> LoadedModel:
    """The model with heads that draft over the first `size` tokens; 0 means all tokens."""
    others = {name: part for name, part in lm.stacked_params().items() if name != "draft_ids"}
    ids = {"draft_ids": jnp.arange(size, dtype=jnp.int32)} if size else {}
    config = override(lm.config, {"heads.draft_vocab": size})
    return dataclasses.replace(lm, config=config, params=others | ids)


def megabytes(lm: LoadedModel) -> tuple[float, float]:
    """MB that the heads of a round read, and MB that the whole round reads. Heads that share parameters read them again
    for each draft."""
    model = lm.arch.model
    drafts = lm.config.num_draft
    params = lm.stacked_params()
    heads = sum(leaf.nbytes for leaf in jax.tree.leaves(params["heads"]))
    if lm.arch.heads.facts.one_set:
        heads *= drafts
    rows = lm.arch.heads.draft_vocab or model.vocab_size
    drafting = heads + drafts * rows * model.d_model * params["embed"]["table"].dtype.itemsize
    trunk = sum(leaf.nbytes for name, part in params.items() if name != "heads" for leaf in jax.tree.leaves(part))
    return drafting / 1e6, (drafting + trunk) / 1e6


def main() -> None:
    """Measures and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source, shipped_heads=True)
    plain_ms, _ = parts_ms(lm, 1)
    rows = []
    for size in [*args.sizes, 0]:
        one = over(lm, size)
        pass_ms, drafting_ms = parts_ms(one, lm.config.num_draft + 1)
        drafting_MB, round_MB = megabytes(one)
        name = f"{size:,}" if size else f"all {lm.arch.model.vocab_size:,}"
        times = f"{drafting_ms:.1f}", f"{pass_ms + drafting_ms:.1f}", f"{(pass_ms + drafting_ms) / plain_ms:.2f}"
        rows.append((name, f"{drafting_MB:.0f}", f"{round_MB:.0f}", *times))
        print(*rows[-1], sep=" | ", flush=True)
    notes = f"{lm.config.num_draft} drafts a round, one row, float32. A plain step takes {plain_ms:.1f} ms."
    Report(f"Draft vocabulary on {args.source}", COLUMNS, rows, notes).publish(
        args.results, jax.devices()[0].device_kind
    )


if __name__ == "__main__":
    main()
