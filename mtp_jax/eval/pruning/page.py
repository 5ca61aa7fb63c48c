"""A page of HTML that shows chains as text, coloured by the step in which each token was deleted."""

import html
import pathlib
from collections.abc import Sequence

import numpy as np

from mtp_jax.eval.pruning.chains import Chain
from mtp_jax.eval.pruning.greedy import Pruned
from mtp_jax.eval.pruning.kinds import kind_of
from mtp_jax.runs.integrity import write_atomically

EARLY = np.array((255, 255, 255))
LATE = np.array((242, 160, 61))
"""Colours behind the tokens that were deleted first and last, as red, green and blue."""
STYLE = """
body { font: 16px/1.9 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
.text { white-space: pre-wrap; }
.text span { padding: 2px 0; border-radius: 2px; }
.around { color: #777; }
.early { color: #999; }
.kept { background: #1f4e79; color: #fff; }
.protected { background: #1f4e79; color: #fff; text-decoration: underline; }
.note { color: #555; font-size: 14px; }
"""


def write_page(path: pathlib.Path, title: str, results: Sequence[tuple[Chain, Pruned]]) -> None:
    """Writes the page, completely or not at all.

    Args:
      path: the file.
      title: its heading.
      results: the chains and their deletions.
    """
    legend = [
        '<span class="early">deleted first</span>',
        f'<span style="background: {colour(1.0)}">deleted last</span>',
        '<span class="kept">kept</span>',
        '<span class="protected">protected</span>',
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    parts = [f"<!doctype html><html><head>{head}</head><body>", f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="text">{" &nbsp; ".join(legend)}</p>', '<p class="note">Point at a token to see its step.</p>']
    for number, (chain, pruned) in enumerate(results):
        parts += _section(number, chain, pruned)
    write_atomically(path, "\n".join([*parts, "</body></html>"]) + "\n")


def colour(share: float) -> str:
    """The colour of a token that was deleted after this share of the steps."""
    red, green, blue = np.rint(EARLY + share * (LATE - EARLY)).astype(int)
    return f"rgb({red}, {green}, {blue})"


def _section(number: int, chain: Chain, pruned: Pruned) -> list[str]:
    steps = len(pruned.trace) - 1
    kept = int(pruned.keep.sum())
    pieces = zip(chain.pieces, pruned.step.tolist(), chain.protected.tolist(), strict=True)
    spans = "".join(_span(piece, step, steps, is_protected) for piece, step, is_protected in pieces)
    before = f'<span class="around">{html.escape(chain.prompt_text)}</span>'
    after = f'<span class="around">{html.escape(chain.answer_text)}</span>'
    nats = f"objective {pruned.trace[0]:.2f} before, {pruned.trace[-1]:.2f} after"
    return [
        f"<h2>Chain {number}, line {chain.record.line}</h2>",
        f'<p class="note">{len(chain.pieces)} tokens, {kept} kept, {steps} steps; {nats}</p>',
        f'<p class="text">{before}{spans}{after}</p>',
    ]


def _span(piece: str, step: int, steps: int, is_protected: bool) -> str:
    text = html.escape(piece)
    if is_protected:
        return f'<span class="protected" title="protected">{text}</span>'
    if not step:
        return f'<span class="kept" title="kept, {kind_of(piece)}">{text}</span>'
    early = ' class="early"' if 3 * step <= steps else ""
    return (
        f'<span{early} style="background: {colour(step / steps)}" title="step {step}, {kind_of(piece)}">{text}</span>'
    )
