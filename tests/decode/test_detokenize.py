"""text(new tokens) = text(prompt and new tokens) - text(prompt), however the tokens are cut into rounds.

Tokenizers are made here, with the peculiarities of those of Llama 2, T5, BERT, GPT-2 and the first GPT. Each
docstring names the line whose deletion breaks the test."""

import itertools
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mtp_jax.decode.detokenize import CONTEXT, RowText, continuation
from mtp_jax.decode.stopping import StopSearch, StopStrings

TEXT = "the cat  sat, 漢字 on é😀 the mat. un able\nthe end"
WORDS = ("the", "cat", "sat", "on", "mat", "un", "able", "end", ",", ".", "\n")
SPECIAL = ("<s>", "</s>", "<|im_end|>")


def with_special(inner):
    inner.add_special_tokens(list(SPECIAL))
    return inner


def llama():
    """Blanks as ▁, one put before a text, bytes for what is unknown; the decoder takes the first blank off."""
    vocab = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghlmnostu,.", *("▁the", "▁cat", "▁sat")]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "c"), ("▁c", "at"), ("▁", "s"), ("▁s", "at")]
    vocab += ["▁t", "he", "at", "▁c", "▁s"]
    ids = {token: place for place, token in enumerate(dict.fromkeys(vocab))}
    inner = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return with_special(inner)


def metaspace():
    vocab = {"<unk>": 0} | {f"▁{word}": place for place, word in enumerate(WORDS, 1)} | {"▁": 20}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return with_special(inner)


def wordpiece():
    """Pieces inside a word begin with ##, and punctuation is pulled to the word before it."""
    words = [*WORDS[:-1], "[UNK]", *(f"##{piece}" for piece in ("t", "he", "able", "at", "d", "n"))]
    vocab = {word: place for place, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return with_special(inner)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: place for place, token in enumerate([*alphabet, "th", "the", "Ġthe", "Ġs"])}
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "s")]
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return with_special(inner)


def word_ends():
    """The end of a word is part of its last token; the blank of a text's last one is left out."""
    pieces = [f"{word}</w>" for word in WORDS] + ["un", "ca"]
    vocab = {piece: place for place, piece in enumerate(pieces)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="un"))
    inner.decoder = decoders.BPEDecoder("</w>")
    return with_special(inner)


TOKENIZERS = {f.__name__: f() for f in (llama, metaspace, wordpiece, byte_level, word_ends)}


def decode_of(inner):
    return lambda ids: inner.decode(list(ids), skip_special_tokens=True)


def documents(name, count=6):
    """Ids of real text where the tokenizer reads it, and of random whole tokens, special ones among them."""
    inner, rng = TOKENIZERS[name], random.Random(3)
    if name != "word_ends":
        yield inner.encode(TEXT, add_special_tokens=False).ids
    # A blank that the decoder takes off is still the first token.
    if "▁" in inner.get_vocab():
        yield [inner.token_to_id(piece) for piece in ("▁", "▁sat", "</s>", "▁", "▁", "▁cat")]
    whole = [
        token
        for piece, token in sorted(inner.get_vocab().items())
        if not piece.startswith("<0x") and "\N{REPLACEMENT CHARACTER}" not in inner.decode([token])
    ]
    for _ in range(count):
        yield [rng.choice(whole) for _ in range(20)]


def ends_inside_a_character(decode, ids):
    return decode(ids).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_is_the_rest_of_the_whole(name):
    """continuation(prompt, new) = decode(prompt + new) without decode(prompt), at every split between characters, and
    the text of special tokens is empty. Breaks with `decode(new)`, and with a context that holds special tokens
    alone."""
    decode = decode_of(TOKENIZERS[name])
    for ids in documents(name):
        for split in range(len(ids) + 1):
            prompt, new = ids[:split], ids[split:]
            if ends_inside_a_character(decode, prompt):
                continue
            assert decode(prompt) + continuation(TOKENIZERS[name], prompt, new) == decode(ids)


def test_the_case_that_was_reported():
    """Llama 2: the prompt `the cat` and the token ▁sat are `the cat sat`; a token ▁sat without a prompt is `sat`."""
    inner = TOKENIZERS["llama"]
    prompt, new = inner.encode("the cat", add_special_tokens=False).ids, [inner.token_to_id("▁sat")]
    assert continuation(inner, prompt, new) == " sat"
    assert continuation(inner, [inner.token_to_id("<s>")], new) == "sat"
    assert continuation(inner, [*prompt, *[inner.token_to_id("</s>")] * 3 * CONTEXT], new) == " sat"


@pytest.mark.parametrize("name", ["llama", "byte_level"])
def test_cuts_do_not_matter(name):
    """The text after any tokens is one function of them: added one by one, in pieces or at once, broken bytes among
    them. Breaks when a text with U+FFFD is taken as a whole."""
    inner, rng = TOKENIZERS[name], random.Random(5)
    decode = decode_of(inner)
    loose = [token for piece, token in sorted(inner.get_vocab().items()) if piece.startswith("<0x") or len(piece) == 1]
    for _ in range(40):
        ids = [rng.choice(loose) for _ in range(24)]
        prompt, new = ids[:4], ids[4:]
        texts = set()
        for size in (1, 3, 7, 20):
            row = RowText(decode, prompt)
            for start in range(0, len(new), size):
                row.add(new[start : start + size])
            texts.add(row.text)
        assert len(texts) == 1


def test_broken_bytes_read_as_a_whole():
    """Of bytes, text = the lossy reading of all of them, hundreds of broken ones in a row included. Breaks when they
    are settled without comparing both sides, or when `_take` settles an unfinished character."""
    decode, rng = decode_of(TOKENIZERS["byte_level"]), random.Random(7)
    symbol = {token: piece for piece, token in TOKENIZERS["byte_level"].get_vocab().items() if len(piece) == 1}
    for kind in (range(256), range(128, 256), (0xE6, 0xBC, 0xA2, 0xF0)):
        tokens = [token for token in sorted(symbol) if decode_byte(symbol[token]) in kind]
        ids = [rng.choice(tokens) for _ in range(120)]
        raw = bytes(decode_byte(symbol[token]) for token in ids)
        row = RowText(decode, [])
        for token in ids:
            row.add([token])
        assert row.text == raw.decode(errors="replace")


def decode_byte(shown):
    """The byte that byte-level BPE shows as a character."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return ord(shown) if ord(shown) in printable else others[ord(shown) - 0x100]


def test_characters_in_bytes_do_not_break_those_before():
    """A run of byte tokens that begins another character leaves the one before it alone; cut short, it is U+FFFD.
    Breaks without the second way of `_read`."""
    inner = TOKENIZERS["llama"]
    ids = [inner.token_to_id(f"<0x{byte:02X}>") for byte in "漢字".encode()]
    for start in (0, 3):
        row = RowText(decode_of(inner), [inner.token_to_id("▁the"), *ids[:start]])
        seen = []
        for token in ids[start:]:
            row.add([token])
            seen.append(row.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        assert seen == (["", "", "漢", "漢", "漢", "漢字"] if start == 0 else ["", "", "字"])
    row = RowText(decode_of(inner), [inner.token_to_id("▁the")])
    row.add([*ids[:4], inner.token_to_id("▁sat")])
    assert row.text == "漢\N{REPLACEMENT CHARACTER} sat"


@pytest.mark.parametrize("size", [1, 5])
def test_the_cost_grows_with_the_tokens(size):
    """Tokens decoded per new token stay below a bound, whatever the lengths of prompt and output; so they do for
    broken bytes and special tokens. Breaks when nothing is settled, or the whole prompt is the context."""
    inner, decoded = TOKENIZERS["byte_level"], []

    def decode(ids):
        decoded.append(len(ids))
        return inner.decode(list(ids), skip_special_tokens=True)

    vocab = inner.get_vocab()
    for token in (vocab["the"], vocab["½"], vocab["\u0122"]):
        row = RowText(decode, [vocab["the"]] * 5000)
        decoded.clear()
        for _ in range(0, 2000, size):
            row.add([token] * size)
        assert sum(decoded) <= 2000 * 40 * CONTEXT


STOPS = ("sat", " sat", "cat</s>", "</s>", "<|im_end|>the", "at<|im_end|>", "he</s> c", "zz", "t c", "</s><|im_end|>")


def first_stop(inner, prompt, new, stops):
    """Tokens up to the one that completes a stop string, and the text before it, by reading everything anew."""
    names = {inner.token_to_id(name): name for name in SPECIAL}
    for count in range(1, len(new) + 1):
        text = continuation(inner, prompt, new[:count])
        spelled = ""
        for at in range(count):
            piece = continuation(inner, prompt, new[: at + 1])[len(continuation(inner, prompt, new[:at])) :]
            spelled += names.get(new[at], piece)
        cuts = [text.find(stop) for stop in stops if stop in text]
        for stop in stops:
            if stop in spelled and any(name in stop for name in SPECIAL):
                before = spelled[: spelled.find(stop)]
                for name in SPECIAL:
                    before = before.replace(name, "")
                cuts.append(len(before))
        if cuts:
            return count, text[: min(cuts)]
    return None


@pytest.mark.parametrize("name", ["llama", "byte_level"])
def test_stop_strings_among_special_tokens(name):
    """The search finds a stop string with the token that completes it, the text is cut before it, and what streaming
    had shown until then is a beginning of that text: by every single stop string and all pairs, over texts with special
    tokens. Breaks without `spelling`, `plain`, or the second `held`."""
    inner, rng = TOKENIZERS[name], random.Random(1)
    vocab = inner.get_vocab()
    words = [inner.encode(word, add_special_tokens=False).ids for word in ("the", " cat", " sat")]
    units = [*words, [vocab["</s>"]], [vocab["<|im_end|>"]]]
    prompt, found = inner.encode("the cat", add_special_tokens=False).ids, 0
    for stops in [(stop,) for stop in STOPS] + list(itertools.combinations(STOPS, 2))[::3]:
        for _ in range(6):
            new = [token for unit in rng.choices(units, k=8) for token in unit]
            expected = first_stop(inner, prompt, new, stops)
            assert searched(inner, prompt, new, stops) == expected
            found += expected is not None
    assert found > 50


def searched(inner, prompt, new, stops):
    """What `first_stop` says, by the search of the product, one token after the other."""
    special = {inner.token_to_id(name): name for name in SPECIAL}
    stop = StopStrings(stops, special.values())
    row = RowText(decode_of(inner), prompt, special if stop.spelling is not None else {})
    search, shown = StopSearch(stop), ""
    for count, token in enumerate(new, 1):
        row.add([token])
        at = search.find(row)
        if at >= 0:
            assert row.text[:at].startswith(shown)
            return count, row.text[:at]
        search.passed(row)
        assert search.settled(row).startswith(shown)
        shown = search.settled(row)
    return None
