"""A text in colours, with the borders of its patches: for the terminal, and as one page of HTML."""

import html
import math
import pathlib
from collections.abc import Mapping, Sequence

from rich.text import Text

from mtp_jax.data.reading import INCOMPLETE
from mtp_jax.data.sources import replacing
from mtp_jax.errors import UserError
from mtp_jax.eval.page import COLORS
from mtp_jax.eval.patches import PatchFigures, Shown

BORDER = "|"
"""The sign of a border between two patches, for a terminal."""
LONGEST_BAR = 16
"""Longest patch length with a bar of its own."""
SURE = (255, 255, 255)
UNSURE = (224, 138, 30)
"""Background for entropy 0, and for the largest entropy of a picture."""
STYLE = f"""
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; color: #222; background: #fff }}
h1 {{ font-size: 1.4em; color: {COLORS[0]} }}
table {{ border-collapse: collapse }}
td {{ padding: 0.1em 1em 0.1em 0 }}
.text {{ font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
.start {{ border-left: 2px solid {COLORS[3]} }}
.bar {{ display: inline-block; height: 0.8em; background: {COLORS[1]} }}
.scale {{ display: inline-block; width: 10em; height: 0.8em; border: 1px solid #999 }}
"""


def largest(shown: Sequence[Shown]) -> float:
    """The largest entropy in a picture; 1 if there is none above 0."""
    return max((one.entropy for one in shown if one.entropy > 0), default=1.0)


def background(entropy: float, top: float) -> tuple[int, int, int]:
    """Red, green and blue of an entropy from 0 to `top`; an unknown one is white."""
    share = 0.0 if math.isnan(entropy) else min(entropy / top, 1.0)
    return tuple(round(low + share * (high - low)) for low, high in zip(SURE, UNSURE, strict=True))


def for_terminal(shown: Sequence[Shown]) -> Text:
    """The text with a bar before every patch and the colours of its entropies.

    Without colours, as in a file, the borders stay.
    """
    top = largest(shown)
    text = Text()
    for place, one in enumerate(shown):
        if one.starts and place:
            text.append(BORDER, style="bold red")
        red, green, blue = background(one.entropy, top)
        text.append(_printable(one.text), style=f"black on rgb({red},{green},{blue})")
    return text


def _printable(text: str) -> str:
    """The text without characters that control a terminal."""
    return "".join(code if code.isprintable() or code in "\n\t" else INCOMPLETE for code in text)


def write_patches(
    path: pathlib.Path, title: str, facts: Mapping[str, str], figures: PatchFigures, shown: Sequence[Shown]
) -> None:
    """Writes the page. It needs no other file.

    Args:
      path: the file.
      title: heading of the page.
      facts: rows of the table, name to text.
      figures: lengths of the patches.
      shown: the characters of the picture.

    Raises:
      UserError: the file cannot be written.
    """
    page = "\n".join(_page(title, facts, figures, shown))
    try:
        with replacing(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the page cannot be written to {path}: {error.strerror}; give another --output") from error


def _page(title: str, facts: Mapping[str, str], figures: PatchFigures, shown: Sequence[Shown]) -> list[str]:
    heading = html.escape(title)
    rows = [f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in facts.items()]
    top = largest(shown)
    ends = ", ".join(f"rgb{background(entropy, top)}" for entropy in (0.0, top))
    scale = f'0 <span class="scale" style="background: linear-gradient(to right, {ends})"></span> {top:.2f} nats'
    return [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{heading}</title><style>{STYLE}</style></head><body>",
        f"<h1>{heading}</h1>",
        f"<table>{''.join(rows)}</table>",
        "<h2>Lengths</h2>",
        f"<table>{''.join(_bars(figures))}</table>",
        "<h2>Text</h2>",
        f"<p>Background: entropy of the character, {scale}. A red line begins a patch.</p>",
        f'<div class="text">{"".join(_span(one, top) for one in shown)}</div>',
        "</body></html>",
    ]


def _bars(figures: PatchFigures) -> list[str]:
    counts = figures.counts(LONGEST_BAR)
    most = max(counts)
    rows = []
    for length, count in enumerate(counts, start=1):
        name = f"{length}" if length < LONGEST_BAR else f"{length} or more"
        bar = f'<span class="bar" style="width: {20 * count / most:.2f}em"></span> {count:,}'
        rows.append(f"<tr><td>{name}</td><td>{bar}</td></tr>")
    return rows


def _span(one: Shown, top: float) -> str:
    kind = ' class="start"' if one.starts else ""
    known = "" if math.isnan(one.entropy) else f' title="{one.entropy:.2f} nats"'
    text = html.escape(one.text).replace("\n", "⏎\n")
    return f'<span{kind}{known} style="background: rgb{background(one.entropy, top)}">{text}</span>'
