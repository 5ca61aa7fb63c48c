"""Noise in the characters of documents, for training and for evaluation on text with errors.

The kinds follow the character tests of the Byte Latent Transformer (Pagnoni et al. 2024, arXiv:2412.09871, section 6).
Each character is changed independently, with the probability p of its noise:

    case     a letter changes between upper and lower case
    drop     the character is left out
    repeat   the character stands 2, 3 or 4 times, with equal probability
    swap     text is cut into pairs of neighbours; the two characters of a pair change places

So the expected share of letters in the other case, of dropped characters, of repeated characters, and of characters in
a swapped pair is p. The mean length of a text becomes 1 - p times as large with drop, and 1 + 2p with repeat. What
happens to a document depends only on the seed, its name and its text.
"""

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import numpy as np

from mtp_jax.config.noise import Noise
from mtp_jax.data.conversations import Document
from mtp_jax.errors import UserError

LONGEST_REPEAT = 4
"""Most times that `repeat` writes a character."""

_CODE = "utf-32-le"  # one number per character


def noised(
    documents: Iterable[Document], noises: Sequence[Noise], seed: int, chosen: Collection[int] | None = None
) -> Iterator[Document]:
    """The documents with noise.

    Args:
      documents: a stream of documents.
      noises: the noise; its parts act one after the other.
      seed: seed of the random numbers.
      chosen: the numbers of the documents that get noise; None for all.

    Raises:
      UserError: a chat template wrote a document; noise would also change its marks.
    """
    for number, one in enumerate(documents):
        yield one if chosen is not None and number not in chosen else noisy_document(one, noises, seed)


def noisy_document(document: Document, noises: Sequence[Noise], seed: int) -> Document:
    """A document with noise. Its learned parts are the same parts, at their new positions.

    Raises:
      UserError: a chat template wrote the document.
    """
    if not noises:
        return document
    if document.rendered:
        raise UserError(
            f"{document.name} holds messages that a chat template wrote, and noise ({_named(noises)}) would change its "
            "marks, too; leave out the noise, or give plain text"
        )
    size = len(document.text)
    spans = document.learned or ()
    cuts = sorted({0, size, *itertools.chain(*spans)})
    pieces = [document.text[start:stop] for start, stop in itertools.pairwise(cuts)]
    for place, noise in enumerate(noises):
        rng = _random(seed, place, noise, document.name)
        pieces = [_changed(piece, noise, rng) for piece in pieces]
    ends = dict(zip(cuts, itertools.accumulate(map(len, pieces), initial=0), strict=True))
    learned = None if document.learned is None else tuple((ends[start], ends[stop]) for start, stop in spans)
    return document._replace(text="".join(pieces), learned=learned)


def noisy_text(text: str, noises: Sequence[Noise], seed: int, name: str = "") -> str:
    """`noisy_document` of a text alone. A text that is not empty keeps at least one character."""
    return noisy_document(Document(name, text), noises, seed).text


def _named(noises: Sequence[Noise]) -> str:
    return ",".join(map(str, noises))


def _random(seed: int, place: int, noise: Noise, name: str) -> np.random.Generator:
    key = f"{seed}\0{place}\0{noise.kind}\0{name}".encode(errors="surrogateescape")
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=16).digest()))


def _changed(text: str, noise: Noise, rng: np.random.Generator) -> str:
    if not text:
        return text
    codes_T = np.frombuffer(text.encode(_CODE), "<u4")
    return _CHANGES[noise.kind](codes_T, noise.rate, rng).tobytes().decode(_CODE)


def _case(codes_T: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    kinds, which_T = np.unique(codes_T, return_inverse=True)
    other = np.array([_other_case(code) for code in kinds.tolist()], "<u4")
    return np.where(rng.random(len(codes_T)) < rate, other[which_T], codes_T)


def _other_case(code: int) -> int:
    other = chr(code).swapcase()
    return ord(other) if len(other) == 1 else code


def _drop(codes_T: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    kept_T = rng.random(len(codes_T)) >= rate
    return codes_T[kept_T] if kept_T.any() else codes_T[:1]


def _repeat(codes_T: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    repeated_T = rng.random(len(codes_T)) < rate
    extra_T = 1 + np.floor(rng.random(len(codes_T)) * (LONGEST_REPEAT - 1)).astype(int)
    return np.repeat(codes_T, 1 + repeated_T * extra_T)


def _swap(codes_T: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    first = int(rng.random() < 0.5)  # where the pairs begin
    pairs = (len(codes_T) - first) // 2
    stop = first + 2 * pairs
    pairs_P2 = codes_T[first:stop].reshape(pairs, 2)
    swapped_P2 = np.where(rng.random((pairs, 1)) < rate, pairs_P2[:, ::-1], pairs_P2)
    return np.concatenate([codes_T[:first], swapped_P2.reshape(-1), codes_T[stop:]])


_CHANGES: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "case": _case,
    "drop": _drop,
    "repeat": _repeat,
    "swap": _swap,
}
