"""A model on held-out text with errors: bits per byte of the noisy text, next to those of the text itself.

Bits per byte of a noisy text are the loss on it, divided by its own bytes. Noise is new information, so that they rise
for every model. Compare models by this rise. The noise of a document depends only on its name and text,
so that all models see the same noise.
"""

from collections.abc import Callable, Mapping

from mtp_jax.config.noise import read_noise
from mtp_jax.data.loader import pack_documents
from mtp_jax.data.noise import noisy_document
from mtp_jax.errors import UserError
from mtp_jax.eval.comparison_page import cell
from mtp_jax.eval.intervals import Interval, difference
from mtp_jax.eval.measured import HeldText, Measured, measure
from mtp_jax.eval.scoring import score
from mtp_jax.loading import LoadedModel

SEED = 0
"""Seed of the noise in evaluations."""


def noisy(text: HeldText, noise: str, lm: LoadedModel) -> HeldText:
    """The text with noise, as the model reads it.

    Args:
      text: the text.
      noise: as in `data.noise`.
      lm: the model.

    Raises:
      UserError: the text is token ids, or conversations.
    """
    if text.documents is None:
        raise UserError(f"--noise {noise} changes characters, but {text.kind} holds token ids; give text with --data")
    noises = read_noise(noise, "--noise")
    documents = [noisy_document(one, noises, SEED) for one in text.documents]
    rows = pack_documents(documents, lm.tokenizer, text.rows.seq_len, lm.config.model.vocab_size)
    return HeldText(f"{text.kind}, {noise}", rows, documents)


def measure_noisy(
    lm: LoadedModel, text: HeldText, noises: tuple[str, ...], progress: Callable[[str], None] = lambda _: None
) -> dict[str, Measured]:
    """The teacher-forced figures on the text with each noise, by noise.

    Raises:
      UserError: as `noisy`, or the bytes of the text are unknown.
    """
    found = {}
    for noise in noises:
        changed = noisy(text, noise, lm)
        progress(f"{changed.kind}: {changed.rows.bytes_ / 1e6:.2f} MB")
        found[noise] = measure(lm, changed, score(lm, changed.rows, progress=progress))
        if found[noise].bits_per_byte is None:
            raise UserError(
                f"--noise {noise} compares bits per byte, which are unknown for a run with data.prompt_tokens="
                f"{lm.config.data.prompt_tokens}; leave it out"
            )
    return found


def worse(clean: Measured, changed: Measured) -> Interval:
    """The rise of the bits per byte with the noise, with the interval of the paired difference."""
    return difference(changed.bits_per_byte, clean.bits_per_byte)


def facts(clean: Measured, changed: Mapping[str, Measured]) -> dict[str, str]:
    """Rows of a table: bits per byte with every noise, and their rise."""
    return {
        f"held-out bits per byte, {noise}": f"{one.bits_per_byte.value:.3f}, {cell(worse(clean, one), signed=True)}"
        for noise, one in changed.items()
    }


def as_json(clean: Measured, changed: Mapping[str, Measured]) -> dict[str, dict[str, object]]:
    """Bits per byte with every noise, and their rise, by noise."""
    return {
        noise: {
            "bits_per_byte": one.bits_per_byte.interval().as_json(),
            "worse": worse(clean, one).as_json(),
            "tf_tokens_per_round": None if one.tf_tokens_per_round is None else one.tf_tokens_per_round.value,
        }
        for noise, one in changed.items()
    }
