"""How much of what a model knows about later tokens do its heads predict?

    python benchmarks/marginals.py smollm2 [--data stdlib] [--top-k 8] [--positions 100]

At positions of held-out text, the top-1 and top-5 accuracy of every extra head stands next to that of the model's own
marginal at the same offset (`mtp_jax/eval/ceiling.py`). SOURCE must have heads; `smollm2` comes with some.
"""

import argparse
import time

import jax
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.data.loader import load_heldout
from mtp_jax.eval.ceiling import COLUMNS, ceilings
from mtp_jax.runs.progress import say


def main() -> None:
    """Measures and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--positions", type=int, default=100)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source, shipped_heads=True, decode_only=True)
    data = lm.config.data
    split = (data.seed, data.eval_fraction) if args.data == "stdlib" else None
    rows = load_heldout(args.data, "text", lm.tokenizer, data.seq_len, split, lm.config.model.vocab_size, say)
    began = time.perf_counter()
    found = ceilings(lm, rows, args.top_k, args.positions, progress=say)
    seconds = time.perf_counter() - began
    first = found[0]
    note = (
        f"{first.positions} positions in {first.documents} documents of {args.data}, rows of {data.seq_len} tokens. "
        f"The {args.top_k} most probable tokens of each step are followed, and at most {args.top_k**2} continuations "
        "of one length; `covered` is their mean probability. Heads read the row and their own drafts. In brackets: "
        f"95 % intervals by documents. The measurement took {seconds:.0f} s with compiling."
    )
    cells = [one.cells() for one in found]
    Report(f"Heads next to the marginals of their model: {args.source}", COLUMNS, cells, note).publish(
        args.results, jax.devices()[0].device_kind
    )


if __name__ == "__main__":
    main()
