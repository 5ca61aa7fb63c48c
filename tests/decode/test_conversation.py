"""Turns of a conversation = generation for all its messages, from caches that stay.

The chain model writes `HELLO` and an end behind every prompt, and its heads are always right. Each docstring names the
line whose deletion breaks the test."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from reference.chats import FORGETS
from reference.decoding import EOS_ID, chain_model, compilations, loaded, loud_params
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode import engine
from mtp_jax.decode.adaptive import Chooser
from mtp_jax.decode.conversation import Conversation, Piece
from mtp_jax.decode.generate import Generation, generate
from mtp_jax.decode.options import Options
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.decode.request import Request
from mtp_jax.errors import UserError

CHAIN = (10, *b"HELO!", EOS_ID)  # Behind the end of a line, in which prompts end.
BYTES = bytes_tokenizer()
P = 3
"""Drafts of the chain model."""


def user(text):
    return {"role": "user", "content": text}


def chain(tokenizer=None):
    return dataclasses.replace(chain_model(CHAIN), tokenizer=tokenizer or BYTES.with_chat("plain"))


def written(template):
    """A tokenizer with a template, which ends prompts with the end of a line."""
    return dataclasses.replace(BYTES, chat=ChatTemplate("a template", template + "{{ '\\n' }}", {}))


def random_model(kind):
    """Whose output depends on all that it has read."""
    shape = {"vocab_size": 258, "num_layers": 1, "d_model": 16, "head_dim": 4, "d_ff": 24, "max_seq_len": 400}
    heads = {"kind": kind, "num_future": 3}
    config = tiny_config(model=shape | {"tie_embeddings": False}, heads=heads)
    return loaded(config, loud_params(config, seed=6), BYTES.with_chat("plain"))


def same(one, other):
    return (one.tokens, one.text, one.stats.histogram) == (other.tokens, other.text, other.stats.histogram)


DRAWN = {"temperature": 1.0, "seed": 3}
TURNS = [(kind, options) for kind in ("parallel", "sequential", "causal", "masks", "medusa") for options in ({}, DRAWN)]


@pytest.mark.parametrize(
    ("kind", "options"),
    sampled(TURNS, ("sequential", {}), grid=[("causal", {}), ("masks", {}), ("sequential", DRAWN)]),
    ids=str,
)
def test_turns_are_generations_of_the_whole(kind, options):
    """say(new) = generate(all messages so far), tokens, text and accepted drafts; and all entries of the caches, those
    of the heads included, are those of a conversation that runs everything at once.

    Breaks without `- num_draft` in `kept` (heads keep entries that rest on drafts), without `begin_B` (they write old
    states over good entries), with `+ 1` more of the same tokens, or if `held_of` takes the newest token for an entry.
    """
    lm = random_model(kind)
    conversation = Conversation(lm, max_new_tokens=9, **options)
    conversation.say("hello")
    history = [*conversation.messages, user("and?")]
    result = conversation.say("and?")
    at_once = Request(lm, [history], 9, "auto", None, Options(**options), (), False)  # what `generate` makes of it
    while not at_once.done:
        at_once.advance(99)
    assert same(result, at_once.result())
    assert conversation.messages == [*history, {"role": "assistant", "content": result.text[0]}]
    assert conversation.reused_tokens > 20
    held = conversation._held
    assert held.ids == at_once.state.tokens_BS[0, : len(held.ids)].tolist()
    sure = len(held.ids) - 2  # The last entries of heads may rest on the drafts of different rounds.
    both = (held.caches, held.drafter_cache), (at_once.state.caches, at_once.state.drafter_cache)
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        if a.ndim == 4:
            np.testing.assert_allclose(a[:, :, :sure], b[:, :, :sure], atol=1e-4)


def test_only_what_is_new_is_run(monkeypatch):
    """The chunks of a turn begin P tokens before what is new, and end with the prompt. Breaks if caches are dropped
    between turns."""
    conversation = Conversation(chain(), max_new_tokens=12)
    conversation.say("a")
    chunks, run = [], engine.prefill_chunk
    monkeypatch.setattr(engine, "prefill_chunk", lambda *args: chunks.append((args[1], int(args[-1]))) or run(*args))
    held = conversation.prompt_tokens + len("HELO!") - P
    assert conversation.say("b").text == ["HELO!"]
    assert chunks == [(32, held)] and conversation.reused_tokens == held
    assert held < conversation.prompt_tokens <= held + 32


@pytest.mark.grid
def test_a_template_that_writes_earlier_turns_otherwise():
    """Where the longer conversation parts from what is held, it is run from there. Breaks if `kept` counts tokens
    without comparing them: the answers would be other ones."""
    lm = dataclasses.replace(random_model("sequential"), tokenizer=written(FORGETS))
    conversation = Conversation(lm, max_new_tokens=9)
    conversation.say("hello")
    history = [*conversation.messages, user("and?")]
    assert same(conversation.say("and?"), generate(lm, [history], max_new_tokens=9))
    assert conversation.reused_tokens == len("(user)hello(assistant)") - 2


def test_a_turn_within_the_same_sizes_compiles_nothing():
    """The second turn of a bucket finds all its programs. Breaks if the first one makes its caches with `empty_state`,
    or if the arrays are as long as the turn."""
    conversation = Conversation(chain(), max_new_tokens=12)
    conversation.say("abcd")
    with compilations() as seen:
        conversation.say("ab")
    assert seen == []


@pytest.mark.grid
def test_pieces_say_what_was_drafted():
    """The prompt's token and the last one of each round are the model's own; with right heads all others are drafts.
    Breaks if `accepted` is that of all rounds, or a cut drops the end of a piece."""
    *pieces, result = Conversation(chain(), max_new_tokens=12).stream("a")
    assert pieces == [Piece("H", False), Piece("ELO", True), Piece("!", False)]
    assert isinstance(result, Generation) and result.text == ["HELO!"]


@pytest.mark.grid
def test_an_answer_that_is_not_read_to_its_end():
    """The answer is what was read, and the next turn is that of such a conversation. Breaks without `GeneratorExit`."""
    lm = random_model("sequential")
    conversation = Conversation(lm, max_new_tokens=9)
    items = conversation.stream("hello")
    first = next(items)
    items.close()
    answer = conversation.messages[-1]
    assert answer["role"] == "assistant" and answer["content"].startswith(first.text)
    history = [*conversation.messages, user("and?")]
    assert same(conversation.say("and?"), generate(lm, [history], max_new_tokens=9))
    assert conversation.reused_tokens >= len("user:\nhello\nassistant:\n") - 2


@pytest.mark.grid
def test_drafts_that_do_not_pay_are_given_up_for_good(monkeypatch):
    """When num_draft="auto" has taken the heads away, later turns go on without them, from the same caches. Breaks
    without `self._draft = NONE`: the entries of the heads are gone."""
    monkeypatch.setattr(Chooser, "hopeless", True)
    conversation = Conversation(chain(), max_new_tokens=12, num_draft="auto")
    assert conversation.say("a").text == ["HELO!"]
    assert conversation._held.drafter_cache == ()
    result = conversation.say("b")
    assert result.text == ["HELO!"] and conversation.reused_tokens > 0
    assert result.stats.histogram == (5,)  # Rounds without drafts.


def test_what_is_refused_changes_nothing():
    """No template, no message, too long a conversation: one line each, and the messages are as they were."""
    with pytest.raises(UserError, match=r"^this model has no chat template; give it one: lm.with_chat_template"):
        Conversation(chain(BYTES), max_new_tokens=3)
    conversation = Conversation(chain(), max_new_tokens=3)
    for new, message in (
        ([{"role": "user"}], "prompt 0: message 1: field 'content' is missing"),
        ([], "prompt 0 is empty; give at least one token"),
        ("x" * 80, "prompt 0 has 98 tokens; the limit, new tokens included, is model.max_seq_len=80"),
    ):
        with pytest.raises(UserError, match=r"^" + re.escape(message)):
            conversation.stream(new)
        assert conversation.messages == []


def test_messages_are_prompts():
    """ids(messages) = the tokenizer's; a message outside of a list is told apart. Breaks without `is_conversation`."""
    lm = chain()
    talk = [{"role": "system", "content": "s"}, user("a")]
    assert prompt_ids(lm, talk, 0) == lm.tokenizer.encode_chat(talk) == [*b"system:\ns\nuser:\na\nassistant:\n"]
    with pytest.raises(UserError, match=r"^a single message is not a prompt; put the list of messages into a"):
        generate(lm, talk, max_new_tokens=4)
    with pytest.raises(UserError, match=r"^prompt 1: the tokenizer has no chat template; give it one, 'plain' or"):
        prompt_ids(chain(BYTES), talk, 1)
