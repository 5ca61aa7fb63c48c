"""What is learned of records: stored next to the tokens, packed with them, and respected by every head.

In all conversations here the assistant alone writes capitals, and tokens are bytes: a token shows whether it is to be
learned. Each docstring names the line whose deletion breaks the test."""

import json

import numpy as np
import pytest
from reference.chats import BARE, MARKED, TALK
from reference.tiny import tiny_config

from mtp_jax.config import override
from mtp_jax.data import loader, store
from mtp_jax.data.draft_vocab import DraftVocab
from mtp_jax.data.tokenize import bytes_tokenizer, load_tokenizer, train_bpe
from mtp_jax.errors import UserError
from mtp_jax.training.objectives import batch_targets

LONG = [{"role": "user", "content": "tell me a story"}, {"role": "assistant", "content": "ONCETWICE" * 9}]
SHORT = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Y"}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def config(tmp_path, records, template=BARE, **data):
    (tmp_path / "template.jinja").write_text(template)
    source = write(tmp_path / "talk.jsonl", records)
    data = {"chat_template": str(tmp_path / "template.jinja"), "seq_len": 16, "eval_fraction": 0.1} | data
    return tiny_config(source, data=data)


def expected(tokens_T, segments_T, num_future):
    """weight[m, t] = 1 exactly where token t+1+m is the assistant's, of the same document; from the rows alone."""
    T = len(tokens_T)
    weights_MT = np.zeros((num_future, T))
    for m in range(num_future):
        for t in range(T - 1 - m):
            is_his = chr(tokens_T[t + 1 + m]).isupper()
            same = segments_T[t] == segments_T[t + 1 + m] != 0
            weights_MT[m, t] = is_his and same
    return weights_MT


@pytest.mark.parametrize("template", [BARE, MARKED], ids=["bare", "marked"])
def test_every_head_learns_the_assistants_tokens_and_no_others(template, tmp_path):
    """weight[m, t] = 1 exactly where token t+1+m is an assistant token of the document of t, for every head, through
    store and rows, where documents are cut and share rows. Breaks without `learn` in `concatenate`, in `_rows` or in
    `__getitem__`, with `start + 1` there, or if a head asks for the token at its own position."""
    talk = [{**one, "content": one["content"].replace(" ", "")} for one in TALK]
    run = config(tmp_path, [{"messages": one} for one in (talk, LONG, SHORT, talk, LONG, SHORT)], template)
    corpus = loader.prepare(run, tmp_path / "data")
    again = loader.prepare(run, tmp_path / "data")
    assert again.reused and "of the tokens learned" in again.description
    shared = several = 0
    for rows in (corpus.train, again.train, again.heldout):
        for batch in loader.heldout_batches(rows, 4):
            weights_MBT = np.asarray(batch_targets(run, {}, batch).weights_MBT)
            for b, (tokens_T, segments_T) in enumerate(zip(batch["tokens"], batch["segment_ids"], strict=True)):
                np.testing.assert_array_equal(weights_MBT[:, b], expected(tokens_T, segments_T, 3))
                several += segments_T.max() > 1
                shared += 0 < weights_MBT[:, b].sum() < (segments_T > 0).sum()
    assert several > 3 and shared > 3  # rows in which something can go wrong


def test_bits_per_byte_count_what_is_learned(tmp_path):
    """predicted_bytes = bytes of the assistant's text. Breaks if `unpredicted` takes first tokens only."""
    run = config(tmp_path, [{"messages": SHORT}, {"messages": LONG}])
    corpus = loader.prepare(run, None)
    assert corpus.train.predicted_bytes + corpus.heldout.predicted_bytes == len("Y") + len("ONCETWICE" * 9)


def test_heads_draft_the_tokens_that_are_learned(tmp_path):
    """A draft vocabulary has the tokens of the assistant. Breaks without `learn` in `DraftVocab.of`."""
    talk = [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "BBCD"}]
    rows = loader.prepare(config(tmp_path, [{"messages": talk}] * 2), None).train
    vocab = DraftVocab.of(rows, 2, 264)
    assert bytes(vocab.ids.tolist()) == b"BC" and vocab.covers == 0.75


def test_completions_and_texts(tmp_path):
    """Of a prompt with a completion the completion and the end are learned, of a text everything, in one corpus. Breaks
    without the span of `document_of`, or if `_of_all` takes documents without weights for zeros."""
    run = config(
        tmp_path, [{"prompt": "ab", "completion": "CD"}, {"text": "efg"}, {"prompt": "h", "completion": "I"}], seq_len=4
    )
    corpus = loader.prepare(run, None)
    found = {}
    for rows in (corpus.train, corpus.heldout):
        stops = [*rows.doc_starts[1:], len(rows.tokens)]
        for start, stop in zip(rows.doc_starts, stops, strict=True):
            found[bytes(rows.tokens[start + 1 : stop - 1].tolist()).decode()] = rows.learn[start:stop].tolist()
    assert found == {"abCD": [0, 0, 0, 1, 1, 1], "efg": [1, 1, 1, 1, 1], "hI": [0, 0, 1, 1]}


def test_text_alone_is_stored_as_ever(tmp_path):
    """A corpus of texts has no weights: no file, no array in its batches. Breaks if weights of 1 are written."""
    (tmp_path / "text.jsonl").write_text('{"text": "some words"}\n{"text": "others, and more"}\n')
    corpus = loader.prepare(tiny_config(tmp_path / "text.jsonl", data={"seq_len": 8}), tmp_path / "data")
    assert set(corpus.train[0]) == {"tokens", "segment_ids", "positions"}
    assert [path.name for path in (tmp_path / "data").glob("*learn*")] == []


def test_damaged_weights_make_the_corpus_anew(tmp_path):
    """The weights count for checksums and digest. Breaks without their names in `FILES`."""
    run = config(tmp_path, [{"messages": TALK}, {"messages": SHORT}, {"messages": LONG}])
    first = loader.prepare(run, tmp_path / "data")
    path = tmp_path / "data" / "train_learn.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    again = loader.prepare(run, tmp_path / "data", first.digest)
    assert not again.reused and again.digest == first.digest


def test_another_template_makes_conversations_anew_and_leaves_texts(tmp_path):
    """The fingerprint has the template, of files that were made with one. Breaks without `TEMPLATE`, or if files of an
    earlier version, which have none, count as made from something else."""
    run = config(tmp_path, [{"messages": TALK}, {"messages": SHORT}, {"messages": LONG}])
    loader.prepare(run, tmp_path / "data")
    (tmp_path / "template.jinja").write_text(MARKED)
    assert not loader.prepare(run, tmp_path / "data").reused
    write(tmp_path / "talk.jsonl", [{"text": "some words"}, {"text": "others, and more words"}])
    plain = override(run, {"data.chat_template": ""})
    loader.prepare(plain, tmp_path / "texts")
    assert loader.prepare(run, tmp_path / "texts").reused


def test_the_template_stays_with_the_corpus(tmp_path):
    """A run's tokenizer writes messages as its training did, from the run alone, also after a move. Breaks if `save` or
    `load_tokenizer` leaves the template out, or `reuse` does not look for damage of its file."""
    run = config(tmp_path, [{"messages": TALK}, {"messages": SHORT}, {"messages": LONG}])
    made = loader.prepare(run, tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "template.jinja").unlink()
    held = store.open_prepared(tmp_path / "moved", 16)
    asked = made.tokenizer.encode_chat(TALK[:2])
    assert bytes(asked) == b"(system)be brief(user)hi(assistant)"
    assert held.tokenizer.encode_chat(TALK[:2]) == load_tokenizer(tmp_path / "moved").encode_chat(TALK[:2]) == asked
    path = tmp_path / "moved" / "chat.json"
    path.write_text(path.read_text().replace("(assistant)", "(other)"))
    with pytest.raises(UserError, match="no complete corpus"):
        store.open_prepared(tmp_path / "moved", 16)


def test_a_trained_tokenizer_has_a_template_too(tmp_path):
    """bpe trained on conversations: the end of a turn is one token, and no merge is spent on its spelling. Breaks
    without `with_chat` behind `train_bpe`, or without the split in it."""
    run = config(tmp_path, [{"messages": TALK}, {"messages": LONG}], tokenizer="bpe", chat_template="plain")
    tokenizer = loader.prepare(run, None).tokenizer
    ended = [*SHORT, SHORT[0]]
    assert tokenizer.encode_chat(ended).count(tokenizer.eos_id) == 1
    vocabulary = train_bpe([tokenizer.chat.prompt(ended)] * 9, 300).inner.get_vocab()
    assert {token for token in vocabulary if "|" in token and len(token) > 1} == {"<|bos|>", "<|eos|>"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, "'hi' is not a conversation; give a list of one or more messages"),
        ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing; it must be a text"),
        ({"messages": SHORT[:1]}, "no message has the role 'assistant'"),
        (
            {"prompt": "a", "completion": 5},
            "field 'completion' is a int, not a string; put conversations into 'messages'",
        ),
        ({"prompt": "a"}, "has no field 'text'; fields present: 'prompt'; set data.text_field"),
    ],
)
def test_malformed_lines_are_named(record, message, tmp_path):
    """The error has file and line. Breaks without `where`."""
    run = config(tmp_path, [{"messages": SHORT}, record])
    with pytest.raises(UserError) as error:
        loader.prepare(run, None)
    line = f"{tmp_path}/talk.jsonl line 2"
    assert str(error.value).startswith((f"{line}: {message}", f"{line} {message}"))


def test_messages_without_a_template_are_refused(tmp_path):
    """One line names the remedy, in training and in evaluation. Breaks without the check in `_conversation`."""
    run = config(tmp_path, [{"messages": SHORT}, {"messages": LONG}], chat_template="")
    refused = (
        "talk.jsonl line 1 holds messages, and the tokenizer has no chat template .* set data.chat_template to the "
    )
    with pytest.raises(UserError, match=refused + "path of a template, or to 'plain'$"):
        loader.prepare(run, None)
    with pytest.raises(UserError, match=refused):
        loader.load_heldout(run.data.source, "text", bytes_tokenizer(), 16)


def test_a_row_whose_only_learned_token_comes_first_is_refused(tmp_path):
    """Nothing predicts a document's first token. Breaks with `learn` in the place of `learn[1:]`."""
    only = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    talk = [{"role": "assistant", "content": "Y"}]
    run = config(tmp_path, [{"messages": LONG}, {"messages": talk}], only)
    with pytest.raises(UserError, match=r"^talk.jsonl:2: none of its 1 tokens can be learned"):
        loader.prepare(run, None)
