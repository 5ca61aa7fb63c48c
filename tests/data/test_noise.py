"""Noise in characters: rate 0 is the identity, the expected share changes, and a document has one result."""

import dataclasses

import numpy as np
import pytest
from reference.tiny import tiny_config, write_text

from mtp_jax.config.noise import KINDS, Noise, read_noise
from mtp_jax.data import loader, noise
from mtp_jax.data.conversations import Document
from mtp_jax.errors import UserError

TEXT = "The quick brown fox, aßé€😀 and 1234 lazy dogs.\n" * 600
LETTERS = [code.swapcase() != code and len(code.swapcase()) == 1 for code in TEXT]
every = pytest.mark.parametrize("kind", KINDS)


def changed(kind, rate, text=TEXT, seed=0, name="a"):
    return noise.noisy_text(text, (Noise(kind, rate),), seed, name)


@every
def test_rate_zero_is_the_identity(kind):
    """noise(text, 0) = text. Breaks with `<=` in place of `<` for the draw (a draw of 0 is rare: also the seed)."""
    assert changed(kind, 0.0) == TEXT
    assert changed(kind, 0.3) != TEXT


@every
def test_a_document_has_one_result(kind):
    """noise(text; seed, name) is a function, and seed, name and place in a list each change it.

    Breaks if a draw comes from a shared generator, or if one of the three is left out of the key.
    """
    once = changed(kind, 0.3)
    assert changed(kind, 0.3) == once
    assert changed(kind, 0.3, seed=1) != once
    assert changed(kind, 0.3, name="b") != once
    twice = (Noise(kind, 0.3), Noise(kind, 0.3))
    one_after_other = noise.noisy_text(once, twice[1:], 0, "a")
    assert noise.noisy_text(TEXT, twice, 0, "a") != one_after_other


def share_of(kind, rate):
    """The share that `rate` names, and the number of draws that it is a mean of."""
    new = changed(kind, rate)
    size = len(TEXT)
    if kind == "case":
        assert new.lower() == TEXT.lower()
        return sum(a != b for a, b in zip(TEXT, new, strict=True)) / sum(LETTERS), sum(LETTERS)
    if kind == "drop":
        return 1 - len(new) / size, size
    if kind == "repeat":
        return (len(new) / size - 1) / 2, size
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
    pairs = sum(a != b for a, b in zip(distinct, changed("swap", rate, distinct), strict=True))
    return pairs / len(distinct), len(distinct) / 2


@every
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_the_expected_share_changes(kind, rate):
    """E[share] = p: letters in the other case, dropped characters, (length - 1) / 2 for repeats, swapped characters.

    Within five standard deviations of a binomial share. Breaks if a repeat stands 2 to 3 times, or pairs overlap.
    """
    share, draws = share_of(kind, rate)
    # A repeat adds 1, 2 or 3 characters: its half has a larger variance than a yes or no.
    spread = 5 * np.sqrt((rate * (1 - rate) + rate / 6) / draws)
    assert abs(share - rate) < spread


def test_repeats_stand_two_to_four_times():
    """Runs of `repeat:1` are 2, 3 and 4 long, each in a third. Breaks with another LONGEST_REPEAT."""
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    new = changed("repeat", 1.0, distinct)
    lengths = np.array([new.count(code) for code in distinct])
    assert set(lengths) == {2, 3, 4}
    assert np.bincount(lengths)[2:] == pytest.approx(1000, abs=5 * np.sqrt(3000 * 2 / 9))


def test_a_swap_moves_nothing_else():
    """A swap of every pair is its own inverse up to where pairs begin: each character moves by one place at most."""
    distinct = "".join(map(chr, range(0x4E00, 0x4E00 + 101)))
    new = changed("swap", 1.0, distinct)
    assert sorted(new) == list(distinct)
    assert max(abs(new.index(code) - place) for place, code in enumerate(distinct)) == 1


def test_learned_parts_stay_the_same_parts():
    """The learned part of a noisy record holds the characters of the completion, and no others.

    Breaks if the spans are not moved.
    """
    record = Document("r", "ask" * 40 + "TELL" * 40, ((120, 280),))
    new = noise.noisy_document(record, read_noise("drop:0.3", "--noise"), 0)
    start, stop = new.learned[0]
    assert set(new.text[:start]) == set("ask")
    assert set(new.text[start:stop]) == set("TEL")
    assert (stop, start < 120) == (len(new.text), True)
    gone = noise.noisy_document(Document("r", "abc", ((2, 3),)), (Noise("drop", 0.999),), 0)
    assert len(gone.text) == 2  # a part keeps a character


def test_messages_are_refused():
    """Breaks without the check: the marks of the template would change."""
    with pytest.raises(UserError, match=r"^chat:1 holds messages that a chat template wrote, and noise \(drop:0.1\) "):
        noise.noisy_document(Document("chat:1", "text", None, rendered=True), read_noise("drop:0.1", "x"), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("typo:0.1", "--noise='typo:0.1' has the kind of noise 'typo'; use one of case, drop, repeat, swap"),
        ("drop", "--noise='drop' has the rate '' for drop; give a number, as in drop:0.1"),
        ("drop:x", "--noise='drop:x' has the rate 'x' for drop"),
        ("swap:1.5", "has the rate 1.5 for swap; it is a probability, from 0 to 1"),
        ("swap:nan", "has the rate nan for swap; it is a probability"),
        ("case:0.1,drop:1", "drops every character; use a rate below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(text, message):
    """Each on one line with the value. Breaks without its check in `config.noise`."""
    with pytest.raises(UserError) as caught:
        read_noise(text, "--noise")
    assert message in str(caught.value)


def test_training_text_is_noisy_and_held_out_text_is_not(tmp_path):
    """train rows = noise(clean documents; data.seed, name), held-out rows = the clean ones; a second call reuses them.

    So a run resumes on the text that it was trained on. Breaks without the choice of training documents in
    `_from_text`, or if `noise` is not in the fingerprint.
    """
    config = tiny_config(write_text(tmp_path / "text", files=6, words=60), data={"noise": "drop:0.2,case:0.3"})
    clean = dataclasses.replace(config, data=dataclasses.replace(config.data, noise=""))
    plain = loader.prepare(clean, None)
    corpus = loader.prepare(config, tmp_path / "data")
    assert corpus.heldout.tokens.tolist() == plain.heldout.tokens.tolist()
    read = plain.tokenizer.decode
    ends = [*plain.train.doc_starts[1:], len(plain.train.tokens)]
    texts = [read(plain.train.tokens[a:b]) for a, b in zip(plain.train.doc_starts, ends, strict=True)]
    names = {path.read_text(encoding="utf-8"): path.name for path in (tmp_path / "text").iterdir()}
    noises = read_noise(config.data.noise, "data.noise")
    expected = [noise.noisy_text(text, noises, config.data.seed, names[text]) for text in texts]
    ends = [*corpus.train.doc_starts[1:], len(corpus.train.tokens)]
    assert [read(corpus.train.tokens[a:b]) for a, b in zip(corpus.train.doc_starts, ends, strict=True)] == expected
    assert "; noise in the training text: drop:0.2,case:0.3" in corpus.description
    again = loader.prepare(config, tmp_path / "data", corpus.digest)
    assert (again.reused, again.digest) == (True, corpus.digest)
    with pytest.raises(UserError, match="was made from other text or with another tokenizer"):
        loader.prepare(clean, tmp_path / "data", corpus.digest)


def test_token_ids_have_no_characters(tmp_path):
    """Noise needs text. Breaks without the check in `_from_token_file`."""
    np.save(tmp_path / "ids.npy", np.arange(200).reshape(4, 50))
    config = tiny_config(tmp_path / "ids.npy", data={"noise": "drop:0.1"})
    with pytest.raises(UserError, match=r"^data.noise='drop:0.1' changes characters, but data.source="):
        loader.prepare(config, None)
