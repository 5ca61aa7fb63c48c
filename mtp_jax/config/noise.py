"""Noise in a text, as a setting: `drop:0.1`, or several with commas, which act one after the other."""

from typing import NamedTuple

from mtp_jax.errors import UserError

KINDS = ("case", "drop", "repeat", "swap")
"""The kinds of noise; `data.noise` says what each does."""


class Noise(NamedTuple):
    """One kind of noise, and the probability that it changes a character."""

    kind: str
    rate: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.rate:g}"


def read_noise(text: str, what: str) -> tuple[Noise, ...]:
    """Reads the setting.

    Args:
      text: `KIND:RATE,KIND:RATE,...`; the empty text is no noise.
      what: name of the setting in error messages.

    Raises:
      UserError: a kind that does not exist, or a rate that is no probability.
    """
    return tuple(_one(part.strip(), text, what) for part in text.split(",")) if text else ()


def _one(part: str, text: str, what: str) -> Noise:
    kind, _, rate = part.partition(":")
    if kind not in KINDS:
        raise UserError(
            f"{what}={text!r} has the kind of noise {kind!r}; use one of {', '.join(KINDS)}, as in drop:0.1"
        )
    try:
        value = float(rate)
    except ValueError:
        raise UserError(f"{what}={text!r} has the rate {rate!r} for {kind}; give a number, as in {kind}:0.1") from None
    if not 0 <= value <= 1:
        raise UserError(f"{what}={text!r} has the rate {rate} for {kind}; it is a probability, from 0 to 1")
    if kind == "drop" and value == 1:
        raise UserError(f"{what}={text!r} drops every character; use a rate below 1")
    return Noise(kind, value)
