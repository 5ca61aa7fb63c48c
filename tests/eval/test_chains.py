"""Chains of reasoning from a file to tokens, and from deletions to files. Each docstring names the line whose deletion
breaks the test."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from reference.decoding import loaded, loud_params
from reference.tiny import tiny_config

from mtp_jax.data import loader
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.errors import UserError
from mtp_jax.eval.pruning.chains import Form, Record, read_records, tokenise
from mtp_jax.eval.pruning.greedy import Pruned
from mtp_jax.eval.pruning.kinds import kind_of, survival
from mtp_jax.eval.pruning.output import order_lines, weighted_ids, write_results
from mtp_jax.training.objectives import token_weights

CONFIG = tiny_config(model={"vocab_size": 258, "num_layers": 1, "max_seq_len": 64}, heads={"num_future": 1})
BOS, EOS = 256, 257
FORM = Form(before_chain="|", before_answer="=")
RECORDS = [Record(1, "2 bé?", "a 2+1, b.", "3"), Record(4, "q", "né", "12")]


@pytest.fixture(scope="module")
def lm():
    """A model of texts, a token per byte."""
    return loaded(CONFIG, loud_params(CONFIG, seed=3), bytes_tokenizer().with_chat("plain"))


def pruned(chain, step):
    """Deletions with these steps."""
    step = np.array(step)
    assert len(step) == len(chain.pieces)
    order = np.argsort(step, kind="stable")[np.count_nonzero(step == 0) :]
    return Pruned(order, step, np.zeros(step.max() + 1))


def test_a_text_in_three_parts(lm):
    """ids = first token, question and what is between | chain | what is between and answer; no end token. The pieces
    are the chain, and the parts of a character are protected. Breaks without `count`, `before_answer`, or `partial`."""
    chain, accented = tokenise(lm, RECORDS, FORM)
    assert chain.ids.prompt == [BOS, *"2 bé?|".encode()]
    assert chain.ids.chain == [*b"a 2+1, b."]
    assert chain.ids.answer == [*b"=3"]
    assert "".join(chain.pieces) == "a 2+1, b."
    assert (chain.prompt_text, chain.answer_text) == ("2 bé?|", "=3")
    assert not chain.protected.any()
    assert accented.protected.tolist() == [False, True, True]
    assert "".join(accented.pieces) == "né"
    marked = tokenise(lm, [RECORDS[1]._replace(chain="n\ufffd")], FORM)[0]
    assert marked.protected.tolist() == [False, True, True, True]


def test_what_is_protected(lm):
    """A token is protected if a match has one of its characters; what matches in the question or answer protects
    nothing. Breaks with `stop + 1`, or if the whole text is searched."""
    form = dataclasses.replace(FORM, protect=r"\d.|=|b$")
    chain = tokenise(lm, RECORDS[:1], form)[0]
    assert "".join(piece for piece, kept in zip(chain.pieces, chain.protected, strict=True) if kept) == "2+1,"


def test_questions_as_messages(lm):
    """With `chat` the question is a message of a user, in the template; a list of messages always is. The template
    writes what stands between. Breaks without `rendered`."""
    text = "user:\nq\nassistant:\n"
    for form, question in ((dataclasses.replace(FORM, chat=True), "q"), (FORM, [{"role": "user", "content": "q"}])):
        chain = tokenise(lm, [Record(1, question, "ab", "3")], form)[0]
        assert chain.ids == ([*text.encode()], [*b"ab"], [*b"=3"])
        assert chain.messages == [{"role": "user", "content": "q"}]


def test_a_token_across_a_border(lm):
    """A token with characters of the question and the chain belongs to the question, and one with characters of the
    chain and the answer to the answer; the texts around the chain have these characters, so that nothing is written
    twice. Breaks with `places[first:last]`, or with the whole chain as `pieces`."""

    class Pairs:
        chat = None

        def encode_placed(self, text, rendered):
            places = [(at, min(at + 2, len(text))) for at in range(0, len(text), 2)]
            return [ord(text[start]) for start, _ in places], places

        def decode(self, ids):
            return "".join(map(chr, ids))

    chain = tokenise(dataclasses.replace(lm, tokenizer=Pairs()), [Record(1, "qq", "abcdef", "3")], FORM)[0]
    assert (chain.prompt_text, chain.pieces, chain.answer_text) == ("qq|a", ("bc", "de"), "f=3")
    assert chain.ids == ([ord("q"), ord("|")], [ord("b"), ord("d")], [ord("f"), ord("3")])


def lines(tmp_path, *records):
    path = tmp_path / "chains.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records), encoding="utf-8")
    return str(path)


def test_records(tmp_path):
    """A record with a chain; one of GSM8K, cut at the last ####; a number as answer; blank lines; a limit."""
    found = read_records(
        lines(
            tmp_path,
            {"question": "q", "chain": " c\n", "answer": 3},
            "",
            {"problem": "p", "answer": "6 #### 7.\nSo 8.\n#### 8"},
        )
    )
    assert found == [Record(1, "q", "c", "3"), Record(3, "p", "6 #### 7.\nSo 8.", "8")]
    assert read_records(str(tmp_path / "chains.jsonl"), limit=1) == found[:1]


BAD_LINES = {
    "no answer": ({"question": "q", "chain": "c"}, "it has no answer; a field 'answer' is needed"),
    "no chain": ({"question": "q", "answer": "18"}, "it has no chain; a field 'chain' is needed, or an answer with"),
    "empty chain": ({"question": "q", "chain": " ", "answer": "1"}, "field 'chain' is ' '; it must be a text that is"),
    "empty answer": ({"question": "q", "answer": "c ####"}, "field 'answer' is ''; it must be a text"),
    "no question": ({"chain": "c", "answer": "1"}, "it has no question; a field 'messages' or 'prompt'"),
    "no text": ({"question": 3, "chain": "c", "answer": "1"}, "field 'question' is '3'; it must be a text"),
    "half a pair": ({"question": "q", "chain": "\ud800", "answer": "1"}, "field 'chain' is not Unicode text"),
    "no object": ([1], "it is a list, not an object"),
    "no JSON": ("{", "it is not JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_records_that_are_refused(tmp_path, name):
    """Each error names the file and the line. Breaks without its check."""
    record, message = BAD_LINES[name]
    path = lines(tmp_path, {"question": "q", "chain": "c", "answer": "1"}, record)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(error.value).startswith(f"--data {path}, line 2: {message}")


def test_chains_that_are_refused(lm):
    """A chain that is all protected, one that is too long, a regular expression that is none, a model without what is
    needed. Breaks without its check."""
    for form, record, message in (
        (Form(protect="."), RECORDS[0], "line 1: all tokens of the chain are protected"),
        (FORM, RECORDS[0]._replace(chain="a" * 64), "line 1: question, chain and answer have 74 tokens, and at most"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            tokenise(lm, [record], form)
    with pytest.raises(UserError, match=r"^protect='\(' is not a regular expression: missing \), unterminated"):
        Form(protect="(")
    with pytest.raises(UserError, match=r"^this model has no tokenizer"):
        tokenise(dataclasses.replace(lm, tokenizer=None), RECORDS, FORM)
    plain = dataclasses.replace(lm, tokenizer=bytes_tokenizer())
    with pytest.raises(UserError, match=r"^line 1: the tokenizer has no chat template"):
        tokenise(plain, RECORDS, Form(chat=True))


def test_kinds_of_tokens(lm):
    """symbol = a digit or an operator, word = a letter, punctuation = the rest. The survival of a kind is the mean rank
    of its tokens that are not protected, over all chains."""
    assert [kind_of(piece) for piece in (" 12", "x2", "=", " the", "é", ".", "\n", " -")] == (
        ["symbol"] * 3 + ["word"] * 2 + ["punctuation"] * 2 + ["symbol"]
    )
    chain = tokenise(lm, RECORDS[:1], dataclasses.replace(FORM, protect=" 2"))[0]
    one = pruned(chain, [1, 0, 0, 3, 4, 2, 5, 6, 0])
    ratios = {kind: ratio.value for kind, ratio in survival([chain], [one]).items()}
    assert ratios == pytest.approx({"symbol": 7 / 14, "word": 7 / 14, "punctuation": (2 + 5 + 7) / 21})


@pytest.fixture
def results(lm):
    """Two chains with their deletions; of the second, two tokens are protected."""
    chains = tokenise(lm, RECORDS, FORM)
    return [(chains[0], pruned(chains[0], [1, 2, 0, 0, 0, 3, 3, 1, 4])), (chains[1], pruned(chains[1], [1, 0, 0]))]


def written(path):
    """The records of a file."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]


def test_order_and_training_text(results, lm, tmp_path):
    """order.jsonl has the fields of the authors' page, one line per token, from step 1 on; train.jsonl has the pruned
    chain between question and answer, and `mtp train` reads it. Breaks with `~keep`, or without `answer_text`."""
    files = write_results(tmp_path, results, EOS, "a <title>")
    told = written(files["order"])
    assert len(told) == 12
    assert told[1] == {"chain": 0, "token_position": 1, "token_text": " ", "deleted_step": 2, "category": "punctuation"}
    assert [one["deleted_step"] for one in told[9:]] == [1, None, None]
    assert told[:9] == order_lines(0, *results[0])
    records = written(files["train"])
    assert records == [{"prompt": "2 bé?|", "completion": "2+1=3"}, {"prompt": "q|", "completion": "é=12"}]
    data = {"source": files["train"], "tokenizer": "bytes", "seq_len": 8, "eval_fraction": 0.5}
    corpus = loader.prepare(dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data)), None)
    texts = {lm.tokenizer.decode(rows.tokens.tolist()) for rows in (corpus.train, corpus.heldout)}
    assert texts == {"2 bé?|2+1=3", "q|é=12"}


def test_a_conversation_stays_one(lm, tmp_path):
    """A question in messages becomes a conversation whose last message is the pruned chain and the answer."""
    chain = tokenise(lm, [RECORDS[0]._replace(question="q")], dataclasses.replace(FORM, chat=True))[0]
    files = write_results(tmp_path, [(chain, pruned(chain, [1, 1, 0, 0, 0, 1, 1, 1, 1]))], EOS, "")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "2+1=3"}]
    assert written(files["train"]) == [{"messages": messages}]


def test_weights_of_a_batch_are_the_ranks(results, lm, tmp_path):
    """In the batches that `mtp train` makes from ranks.npy, the weight of each target is the rank of its token: 0 for
    the question, 1 for kept tokens, the answer and the end. The end token inside a text does not cut it. Breaks if
    weights are shifted, without `documents`, or if `documents` is an array of the batch."""
    chains = [chain for chain, _ in results]
    cut = dataclasses.replace(chains[1], ids=chains[1].ids._replace(prompt=[BOS, EOS, *b"q|"]))
    results = [results[0], (cut, results[1][1])]
    files = write_results(tmp_path, results, EOS, "")
    expected = {}
    for chain, one in results:
        ids, weights = weighted_ids(chain, one, EOS)
        assert len(ids) == len(weights) and ids[-1] == EOS and weights[-1] == 1
        expected[tuple(ids)] = weights
    ranks = [1 / 5, 2 / 5, 1, 1, 1, 3 / 5, 3 / 5, 1 / 5, 4 / 5]
    np.testing.assert_allclose(expected[tuple(weighted_ids(*results[0], EOS)[0])], [0] * 8 + ranks + [1, 1, 1])
    for tokenizer in ("bytes", "none"):
        data = {"source": files["ranks"], "tokenizer": tokenizer, "seq_len": 8, "eval_fraction": 0.5}
        corpus = loader.prepare(dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **data)), None)
        found = {ids: weights for rows in (corpus.train, corpus.heldout) for ids, weights in of_batches(rows)}
        assert found.keys() == expected.keys()
        for ids, weights in expected.items():
            np.testing.assert_allclose(found[ids], weights, rtol=1e-6)


def of_batches(rows):
    """The ids of every document with the weights that the loss takes for them, from batches. A row begins with the last
    token of the row before it."""
    ids = []
    weights = []
    for batch in loader.heldout_batches(rows, 1):
        assert set(batch) == {"tokens", "segment_ids", "positions", "weights"}
        new = slice(1 if ids else 0, np.count_nonzero(batch["segment_ids"]))
        ids += batch["tokens"][0, new].tolist()
        weights += np.asarray(token_weights(jax.tree.map(jax.numpy.asarray, batch)))[0, new].tolist()
    for start, stop in itertools.pairwise([*rows.doc_starts.tolist(), len(ids)]):
        yield tuple(ids[start:stop]), weights[start:stop]


def test_the_page_shows_every_token(lm, results, tmp_path):
    """The page has every token once, escaped, in the order of the text, with its step. Breaks without `html.escape`."""
    files = write_results(tmp_path, results, EOS, "a <title>")
    page = pathlib.Path(files["page"]).read_text(encoding="utf-8")
    assert "<h1>a &lt;title&gt;</h1>" in page
    assert page.count('title="step') == 7 and page.count('title="kept') == 3 and page.count('title="protected"') == 2
    for piece, step in (("a", 1), (",", 3), (".", 4)):
        assert f'title="step {step}, {kind_of(piece)}">{piece}</span>' in page
    assert page.index(">2</span>") < page.index(">+</span>") < page.index(">1</span>")
    chain = tokenise(lm, [RECORDS[0]._replace(chain="1<2")], FORM)[0]
    files = write_results(tmp_path, [(chain, pruned(chain, [0, 1, 0]))], EOS, "")
    assert ">&lt;</span>" in pathlib.Path(files["page"]).read_text(encoding="utf-8")
