"""Streaming = generation, in pieces: joined they are the text, and no piece has to be taken back.

Each docstring names the line of `generate.py` whose deletion breaks the test.
"""

import pytest
from reference.decoding import CHAIN, EOS_ID, TEXT, chain_model, model

from mtp_jax.decode.generate import Generation, generate, stream
from mtp_jax.errors import UserError

LONG = 32
END = CHAIN.index(EOS_ID)
PROMPTS = ["a", "ab", [CHAIN[2]], "c"]
STOPS = {
    "no stop": (),
    "never": ("cdX", "😀cdef!"),
    "inside": ("efg", "漢字é"),
    "bytes": ("字😀",),
    "first": ("b", "é"),
}


def run(lm, prompts=PROMPTS, **options):
    """Pieces of every row, and the last item."""
    *pieces, result = stream(lm, prompts, **{"max_new_tokens": LONG, **options})
    assert isinstance(result, Generation)
    rows = [[piece for row, piece in pieces if row == b] for b in range(len(prompts))]
    return rows, result


def same(one, other):
    return (one.tokens, one.text, one.finish_reason, one.stats.histogram) == (
        *(other.tokens, other.text, other.finish_reason),
        other.stats.histogram,
    )


@pytest.mark.parametrize("draft", ["none", "heads"])
@pytest.mark.parametrize("name", STOPS)
def test_pieces_make_the_text(name, draft):
    """join(pieces) = generate().text for several prompts, no piece is empty, none but a first one that starts inside a
    character shows U+FFFD, and the last item is generate()'s. Breaks without `rstrip(INCOMPLETE)`, `held`, or
    `shown[row] = text`."""
    lm = chain_model()
    rows, result = run(lm, draft=draft, stop=STOPS[name])
    whole = generate(lm, PROMPTS, max_new_tokens=LONG, draft=draft, stop=STOPS[name])
    assert same(result, whole)
    assert ["".join(pieces) for pieces in rows] == whole.text
    assert all(all(pieces) for pieces in rows)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for row in (0, 1, 3) for piece in rows[row])


def decided(text, stops):
    """The text up to the first character from which on a stop string may be under way."""
    under_way = (start for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops))
    return text[: next(under_way, len(text))]


@pytest.mark.parametrize("stops", [(), ("cdX",), ("de!", "cdeg", "é字"), ("漢字é", "字😀!", "efX")], ids=str)
def test_pieces_come_as_soon_as_they_are_decided(stops):
    """With one token a round, the pieces are the differences of `decided(complete characters so far)`. Nothing comes
    late and nothing too early. Breaks with `held = 0`, `held = longest stop`, or without `rstrip(INCOMPLETE)`."""
    rows, result = run(chain_model(), [[CHAIN[0]]] * 4, draft="none", stop=stops)
    shown, expected = "", []
    for count in range(1, END):
        text = decided(bytes(CHAIN[1 : count + 1]).decode(errors="ignore"), stops)
        expected += [text[len(shown) :]] if text != shown else []
        shown = text
    assert rows == [expected] * 4
    assert result.text == [TEXT[1:]] * 4


def test_one_piece_per_round():
    """With P = 3 right drafts a piece holds what its round emitted: text is not kept back until the end."""
    rows, _ = run(chain_model(), [[CHAIN[END + 1]]] * 4, draft="heads", max_new_tokens=17)
    assert rows == [["j", "klmn", "oppp", "pppp", "pppp"]] * 4


@pytest.mark.parametrize("left", [1, 2, 3])
def test_a_character_cut_by_the_limit(left):
    """What the limit leaves of a character shows as U+FFFD, at the very end, as in generate(). Breaks without
    `if self.done`."""
    ids = (*range(1, 26), *"😀".encode(), EOS_ID)
    rows, result = run(chain_model(ids), [[4]] * 4, max_new_tokens=21 + left)
    assert rows[0][-1] == "\N{REPLACEMENT CHARACTER}"
    assert ["".join(row) for row in rows] == result.text == [bytes(range(5, 26)).decode() + rows[0][-1]] * 4
    assert result.finish_reason == ["length"] * 4


ODD = {
    "a real U+FFFD": (*b"ab\xef\xbf\xbdcd", EOS_ID),
    "bytes that are no text": (97, 0xFF, 98, 0xC3, 99, 0xE6, 0xBC, 100, EOS_ID),
    "nothing but broken bytes": (97, 0x80, 0x81, 0x82, 0x83, EOS_ID),
    "ends inside a character": (97, 98, 0xF0, 0x9F, 0x98, EOS_ID),
    "a special token inside a character": (97, 0xE6, 256, 0xBC, 0xA2, 98, EOS_ID),
}


@pytest.mark.parametrize("draft", ["none", "heads"])
@pytest.mark.parametrize("name", ODD)
def test_bytes_that_are_no_characters(name, draft):
    """join(pieces) = text also where U+FFFD is what the model wrote. Breaks when a piece is measured on stripped
    text."""
    ids = ODD[name]
    lm = chain_model(ids)
    rows, result = run(lm, [[ids[0]]] * 4, draft=draft)
    expected = bytes(t for t in ids[1:-1] if t < 256).decode(errors="replace")
    assert result.text == ["".join(row) for row in rows] == [expected] * 4
    assert result.tokens == [list(ids[1:])] * 4


def test_needs_a_tokenizer():
    """A model without a tokenizer has no text to stream; the call says so. Breaks when `stream` is a generator."""
    with pytest.raises(UserError, match="streaming needs a tokenizer"):
        stream(model("random"), [[1]] * 4, max_new_tokens=16)


def test_prompts_are_read_once():
    """Any iterable of prompts will do. Breaks with `len(prompts)`."""
    *_, result = stream(chain_model(), iter([[CHAIN[0]]] * 4), max_new_tokens=LONG)
    assert result.text == [TEXT[1:]] * 4


def test_a_finished_row_is_shown_at_once():
    """A row that has ended is decided, whatever may look like the start of a stop string: it does not wait for the
    others."""
    row_of = [
        piece[0] for piece in list(stream(chain_model(), [[CHAIN[END - 2]], *[[CHAIN[END + 1]]] * 3], **LATE))[:-1]
    ]
    last_of_first_row = max(i for i, row in enumerate(row_of) if row == 0)
    assert row_of[last_of_first_row:].count(1) > 10


LATE = {"max_new_tokens": 20, "draft": "none", "stop": ("h and so on",)}
