"""One reading of a text: training document = evaluation document = prompt + end, token for token, and as transformers
reads it, for tokenizers with every peculiarity of `reference.odd_tokenizers`."""

import dataclasses
import functools
import json
import types

import numpy as np
import pytest
import transformers
from reference.odd_tokenizers import ODD, byte_level, spaced

import mtp_jax
from mtp_jax.config import Config, DataConfig, ModelConfig, to_json
from mtp_jax.convert.importer import _save_tokenizer
from mtp_jax.convert.layouts import layout_of
from mtp_jax.convert.tokenizer import check_size, load_hub_tokenizer, load_run_tokenizer, save_for_transformers
from mtp_jax.data import loader, marks, store
from mtp_jax.data.marks import Marks
from mtp_jax.data.tokenize import blt_bytes_tokenizer, bytes_tokenizer, load_tokenizer, train_bpe
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.errors import UserError

TEXTS = [
    "the cat sat",
    " the cat",
    "The CAT\n\n  sat é😀 ",
    "a<s>b</s> c",
    "<s>the cat",
    "the cat</s>",
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n",
    "<bos><turn>user\nthe cat</turn>\n",
    "[gMASK]<sop><|user|>the cat",
    "x <mask> y<|end|> z[EOS]",
    "a<stop>b <eos>",
]
CHAT = [{"role": "user", "content": "the cat"}]
each = pytest.mark.parametrize("name", ODD)
USUAL = ("bos by template", "an end of another name", "end of turn before end of text", "Llama 2", "Gemma 3")
some = pytest.mark.parametrize(
    "name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.grid) for name in ODD]
)


@dataclasses.dataclass(frozen=True)
class Places:
    """A Hugging Face directory, its import, and a run that started from the import."""

    hub: object
    imported: object
    run: object
    config: Config
    corpus: store.Corpus


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The three directories of a tokenizer, without weights; each is made once."""

    @functools.cache
    def make(name):
        root = tmp_path_factory.mktemp("readings")
        hub = ODD[name].save(root / "hub")
        imported, run = root / "imported", root / "run"
        (imported / "hf").mkdir(parents=True)
        layout_of(hub).copy_sidecars(imported / "hf")
        place = _save_tokenizer(imported, load_hub_tokenizer(hub), imported, print)
        rows = ODD[name].inner.get_vocab_size() - (name == "Gemma 3")
        config = Config(model=ModelConfig(vocab_size=rows), data=DataConfig(tokenizer=place))
        (imported / "config.json").write_text(to_json(config))
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
        (root / "text.jsonl").write_text("".join(lines))
        data = {"source": str(root / "text.jsonl"), "seq_len": 16, "eval_fraction": 0.3}
        config = mtp_jax.start_from(imported, data=data)
        corpus = loader.prepare(config, run / "data")
        return Places(hub, imported, run, config, corpus)

    return make


def readers(places):
    """The tokenizer as each part of the program gets it."""
    return {
        "checkpoint": load_hub_tokenizer(places.hub),
        "import": load_run_tokenizer(places.imported / "data", places.imported / "hf", trained=False),
        "run": load_run_tokenizer(places.run / "data", places.imported / "hf", trained=True),
        "run without its import": load_run_tokenizer(places.run / "data", None, trained=True),
        "training": places.corpus.tokenizer,
        "training, continued": store.open_prepared(places.run / "data", 16).tokenizer,
    }


def documents(rows):
    stops = [*rows.doc_starts[1:], len(rows.tokens)]
    return [rows.tokens[start:stop].tolist() for start, stop in zip(rows.doc_starts, stops, strict=True)]


@each
def test_one_reading(name, made):
    """prompt = first tokens (unless the text begins with them) + transformers' ids of the text, and document = prompt +
    end (unless it is there), for every reader. Breaks if a reader takes its marks from somewhere else, or without
    `_begun`, `_ended`, or `split_special_tokens` in `HubTokenizer._ids`."""
    odd, places = ODD[name], made(name)
    theirs = transformers.AutoTokenizer.from_pretrained(places.hub)
    first, ends = odd.ids(odd.first), odd.ids(odd.ends)
    (end,) = odd.ids((odd.end,))
    found = readers(places)
    for reader, tokenizer in found.items():
        assert tokenizer.marks == Marks(first, end, ends, odd.special), reader
        assert (tokenizer.eos_id, tokenizer.end_ids) == (end, ends)
        assert tokenizer.encode_documents([]) == []  # transformers raises an IndexError for no text
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        prompt = ids if tuple(ids[: len(first)]) == first else [*first, *ids]
        if prompt != ids or not first:
            added = theirs(text)["input_ids"]  # with an end too where the tokenizer puts one, which no prompt has
            assert prompt == added[: len(prompt)] and added[len(prompt) :] in ([], [end])
        document = prompt if prompt[-1:] == [end] else [*prompt, end]
        for reader, tokenizer in found.items():
            assert tokenizer.encode_prompt(text) == prompt, (reader, text)
            assert tokenizer.encode_document(text) == document, (reader, text)
            assert tokenizer.decode(prompt) == theirs.decode(prompt, skip_special_tokens=True), (reader, text)


@some
def test_the_corpus_is_what_evaluation_reads(name, made):
    """Documents of the prepared corpus = those that `mtp eval` makes of the same text with the tokenizer of the run and
    of the checkpoint = `encode_document`. Breaks if `_given_tokenizer` or `store.reuse` loses the marks."""
    places = made(name)
    found = readers(places)
    expected = sorted(found["checkpoint"].encode_documents(TEXTS))
    assert sorted(documents(places.corpus.train) + documents(places.corpus.heldout)) == expected
    for reader in ("checkpoint", "run"):
        rows = loader.load_heldout(places.config.data.source, "text", found[reader], 16)
        assert sorted(documents(rows)) == expected


@some
def test_a_directory_as_the_tokenizer(name, made):
    """`data.tokenizer` = a Hugging Face directory has the marks of its checkpoint. Breaks without `declared_beside`."""
    odd, places = ODD[name], made(name)
    assert load_tokenizer(places.hub).marks == load_hub_tokenizer(places.hub).marks
    if not odd.rebuilt:
        hub = load_hub_tokenizer(places.hub)
        assert load_tokenizer(places.hub).encode_documents(TEXTS) == hub.encode_documents(TEXTS)


@pytest.mark.parametrize("name", ["end of turn before end of text", "Gemma 3"])
def test_a_rendered_chat(name, made):
    """ids(rendered text) = the rendered ids, with one BOS; both are prompts as they come. Breaks without `_begun`."""
    places = made(name)
    theirs = transformers.AutoTokenizer.from_pretrained(places.hub)
    text = theirs.apply_chat_template(CHAT, tokenize=False)
    tokenised = theirs.apply_chat_template(CHAT, tokenize=True)
    for tokenizer in readers(places).values():
        model = types.SimpleNamespace(tokenizer=tokenizer, arch=places.config.arch)
        assert prompt_ids(model, text, 0) == prompt_ids(model, tokenised, 0) == tokenised["input_ids"]


def test_export_of_a_tokenizer_of_ours(tmp_path):
    """marks(export(t)) = marks(t), where they are of ours or declared. Breaks if `save_for_transformers` leaves the
    template of the tokenizer.json, or does not say that special tokens are text."""
    declared = load_tokenizer(ODD["an end of another name"].save(tmp_path / "declared"))
    silent = load_tokenizer(ODD["bos by template"].save(tmp_path / "silent"))
    silent = dataclasses.replace(silent, marks=dataclasses.replace(silent.marks, first=()))
    given = [bytes_tokenizer(), blt_bytes_tokenizer(), bytes_tokenizer().reading("read"), declared, silent]
    for i, tokenizer in enumerate(given):
        (tmp_path / f"{i}").mkdir()
        save_for_transformers(tokenizer, tmp_path / f"{i}")
        found = load_hub_tokenizer(tmp_path / f"{i}")
        assert found.marks == tokenizer.marks
        assert found.encode_documents(["a<|eos|>", "<s>b"]) == tokenizer.encode_documents(["a<|eos|>", "<s>b"])


@pytest.mark.parametrize(("setting", "kept"), [("auto", "read"), ("read", "read"), ("text", "text")])
def test_the_setting_is_for_all_readers(setting, kept, made, tmp_path):
    """data.special_tokens holds for the corpus, for evaluation and for prompts of the run, and a remark counts what the
    text spells. Breaks if `prepare` ignores the setting, or the run's file loses it."""
    places = made("end of turn before end of text")
    config = dataclasses.replace(places.config, data=dataclasses.replace(places.config.data, special_tokens=setting))
    corpus = loader.prepare(config, tmp_path / "data")
    run = load_run_tokenizer(tmp_path / "data", places.imported / "hf", trained=True)
    assert run.marks.special == corpus.tokenizer.marks.special == kept
    chat = TEXTS[6]
    assert run.encode_prompt(chat) == corpus.tokenizer.encode_prompt(chat)
    start = ODD["end of turn before end of text"].inner.token_to_id("<|im_start|>")
    assert run.encode_prompt(chat).count(start) == (2 if kept == "read" else 0)
    assert run.encode_document(chat) in documents(corpus.train) + documents(corpus.heldout)
    became = "are read as these tokens" if kept == "read" else "are read as ordinary characters"
    remark = f"special tokens in 1 document(s) ('<|im_start|>' 2 times, '<|im_end|>' once) {became}"
    assert remark in corpus.description
    said = []
    loader.load_heldout(config.data.source, "text", run, 16, notify=said.append)
    assert said[0] == "files read: 1 as lines of JSON" and remark in said[1]


def test_a_run_of_an_older_version(made):
    """Without special_tokens.json, a run that was trained ends its documents with the end that is known by name, and
    generation ends there as well; special tokens in prompts stay what they are. An import that nothing was trained on
    has what its checkpoint declares. Breaks without the last line of `load_run_tokenizer`."""
    places = made("end of turn before end of text")
    (places.run / "data" / marks.FILE).rename(places.run / "kept")
    text, turn = ODD["end of turn before end of text"].ids(("<|endoftext|>", "<|im_end|>"))
    try:
        old = load_run_tokenizer(places.run / "data", places.imported / "hf", trained=True)
        assert (old.eos_id, old.end_ids, old.marks.special) == (text, (turn, text), "read")
        fresh = load_run_tokenizer(places.run / "data", places.imported / "hf", trained=False)
        assert fresh.eos_id == turn
    finally:
        (places.run / "kept").rename(places.run / "data" / marks.FILE)


def test_a_damaged_record_is_refused(tmp_path):
    """Breaks without the checks of `marks.read`."""
    bytes_tokenizer().save(tmp_path / "tokenizer.json")
    for content in ('{"first": []}', '{"first": ["a"], "end": 1, "ends": [1], "special_tokens": "read"}', "[]",
                    '{"first": [], "end": 1, "ends": [1], "special_tokens": "maybe"}'):  # fmt: skip
        (tmp_path / marks.FILE).write_text(content)
        with pytest.raises(UserError, match=r"special_tokens\.json (is damaged|holds no JSON object)"):
            load_tokenizer(tmp_path)


# Tokens without an embedding.


def test_tokens_beyond_the_embedding(made, tmp_path):
    """An added token beyond the embedding is named once, and refused where it is used: in a prompt, in a document for
    evaluation or training. Breaks without `check` in `tokenise`, or with `vocab_size > limit` in `_check_vocab`."""
    places = made("Gemma 3")
    hub, rows = load_hub_tokenizer(places.hub), places.config.model.vocab_size
    assert hub.vocab_size == rows + 1
    said = []
    check_size(hub, places.config.arch, places.hub, said.append)
    assert said == [
        f"the tokenizer in {places.hub} has tokens beyond the {rows} embeddings: '<picture>' ({rows}); text that "
        "contains one is refused"
    ]
    model = types.SimpleNamespace(tokenizer=hub, arch=places.config.arch)
    assert prompt_ids(model, "the cat", 0) == hub.encode_prompt("the cat")
    with pytest.raises(UserError, match=f"prompt 0 holds token id {rows}; the vocabulary is 0..{rows - 1}"):
        prompt_ids(model, "a <picture>", 0)
    for i, text in enumerate(["the cat sat on the mat", "a <picture> of a cat"]):
        (tmp_path / f"{i}.txt").write_text(text)
    message = f"document '1.txt' contains '<picture>', token {rows}, for which a model with model.vocab_size={rows}"
    with pytest.raises(UserError, match=message):
        loader.load_heldout(str(tmp_path), "text", hub, 8, vocab_size=rows)
    data = dataclasses.replace(places.config.data, source=str(tmp_path), seq_len=8)
    with pytest.raises(UserError, match=message):
        loader.prepare(dataclasses.replace(places.config, data=data), None)


@pytest.mark.parametrize("short", [2, 300])
def test_a_tokenizer_of_another_model(short, tmp_path):
    """Ordinary tokens beyond the embedding, or the end token of the documents, belong to another model: refused before
    any text is read. Breaks if `without_embedding` takes every token."""
    tokenizer = train_bpe(["the cat sat on the mat"] * 4, 280)
    rows = max(tokenizer.vocab_size - short, 16)
    tokenizer.save(tmp_path / "tokenizer.json")
    config = Config(model=ModelConfig(vocab_size=rows), data=DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    with pytest.raises(UserError, match="belongs to another model"):
        check_size(tokenizer, config.arch, tmp_path, print)
    with pytest.raises(UserError, match=f"set model.vocab_size to {tokenizer.vocab_size} or more"):
        loader._check_vocab(tokenizer, config)


def test_an_end_without_an_embedding(tmp_path):
    """An added end token beyond the embedding is refused for training. Breaks without `around` in `_check_vocab`."""
    inner = byte_level("<s>")
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    rows = inner.get_vocab_size() - 1
    config = Config(model=ModelConfig(vocab_size=rows), data=DataConfig(tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match=r"set model\.vocab_size to"):
        loader._check_vocab(load_tokenizer(tmp_path), config)


# Bytes of tokens.


@some
def test_bytes_of_tokens(name, made):
    """The bytes of a document's tokens add up to those of its text, wherever the tokenizer keeps the text; those of the
    first token alone are what nothing predicts. Breaks if `num_bytes` counts U+FFFD for a part of a character."""
    tokenizer = readers(made(name))["run"]
    for text in ["the cat", "é😀 x", "\u4e2d\u6587"]:
        ids = tokenizer.encode_document(text)
        if tokenizer.decode(ids) != text:
            continue
        front = len(tokenizer.marks.first)
        decoded = [tokenizer.decode([token]) for token in ids]
        # A token in the middle of the text may stand for a blank that its own decoding strips, or that none has.
        blanks = sum(tokenizer._piece(token).startswith("▁") for token in ids[front + 1 :]) + (name == "words")
        assert sum(map(tokenizer.num_bytes, ids)) + blanks == len(text.encode()), decoded
        assert tokenizer.unpredicted_bytes(text, ids) == (0 if front else tokenizer.num_bytes(ids[0]))


def test_bytes_of_a_special_first_token(made):
    """A special token that the text spells counts with its characters, one that was put in front with none. Breaks
    without `startswith` in `unpredicted_bytes`."""
    chat = readers(made("end of turn before end of text"))["run"]
    assert chat.unpredicted_bytes(TEXTS[6], chat.encode_document(TEXTS[6])) == len("<|im_start|>")
    bos = readers(made("bos by template"))["run"]
    assert bos.unpredicted_bytes("<s>a", bos.encode_document("<s>a")) == 3
    assert bos.unpredicted_bytes("a", bos.encode_document("a")) == 0
    assert bytes_tokenizer().unpredicted_bytes("<|bos|>", bytes_tokenizer().encode_document("<|bos|>")) == 0


def test_part_of_a_character():
    """é without its first byte is one byte, with byte fallback and with byte-level symbols."""
    fallback = load_like(spaced("<s>", "</s>"))
    assert [fallback.num_bytes(token) for token in fallback.encode("é")[1:]] == [1, 1]
    assert [bytes_tokenizer().num_bytes(token) for token in "é😀".encode()] == [1] * 6


def load_like(inner):
    from mtp_jax.data.tokenize import _wrap

    return _wrap(inner, "test")


def test_counts_do_not_depend_on_the_reading():
    """Special tokens are counted as spelled, by the tokenizer's own rules, whatever becomes of them."""
    for reading in ("read", "text"):
        counter = bytes_tokenizer().reading(reading).special_counter()
        counter.add(["a<|eos|>b<|eos|><|bos|>", "<|eos>", ""])
        counter.add(["<|bos|>"])
        assert (counter.counts, counter.documents) == ({"<|eos|>": 2, "<|bos|>": 2}, 2)


def test_tokens_are_arrays_of_the_size_they_need(made):
    """Ids beyond 65,535 are kept; the corpus of a small vocabulary has 16 bits."""
    assert made("words").corpus.train.tokens.dtype == np.uint16
