"""Do heads know what their model knows about later tokens? Heads on a frozen trunk against the model's marginals.

    python benchmarks/head_ceiling.py RUN DATA [--positions 800] [--top-k 32]

RUN is a workdir with heads that were trained on a frozen trunk, for example `heads` of `fine_tuning.py`. DATA is text
that the run has not seen. At random positions the script compares the accuracy of each head with that of the marginal
at the same offset (`mtp_jax.marginals`), which the next-token model implies (Mehra et al. 2025, arXiv:2502.09419).
"""

import argparse

import jax
from mtp_jax.eval.ceiling import Ceiling, ceilings
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.data.loader import load_heldout


def answer(one: Ceiling) -> str:
    """Whether the head falls short of the marginal."""
    if one.share.high < 1:
        return "yes"
    return "no" if one.share.low > 1 else "not at this size: the interval contains 1"


def main() -> None:
    """Measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("data")
    parser.add_argument("--positions", type=int, default=800)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.run)
    rows = load_heldout(args.data, "text", lm.tokenizer, lm.config.data.seq_len)
    found = ceilings(lm, rows, args.top_k, args.positions, progress=lambda text: print(text, flush=True))
    lines = []
    for one in found:
        losses = [
            f"{side.loss.value:.3f} ({side.loss.low:.3f}-{side.loss.high:.3f})" for side in (one.head, one.marginal)
        ]
        cells = [f"t+{one.offset}", one.head.top1.text(), one.marginal.top1.text(), one.share.text(), *losses]
        lines.append([*cells, f"{one.covered:.1%}", answer(one)])
    columns = (
        "token",
        "head top-1",
        "marginal top-1",
        "share",
        "head loss",
        "marginal loss",
        "covered",
        "falls short?",
    )
    note = (
        f"{found[0].positions} positions in {found[0].documents} documents, {args.top_k} tokens summed over at each "
        "step. share: accuracy of the head over that of the marginal. Losses in nats. Intervals of 95 %, bootstrap "
        "over documents."
    )
    title = "Heads on a frozen trunk, and the marginals of the trunk"
    Report(title, columns, lines, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
