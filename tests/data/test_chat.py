"""Chat templates: the text of a conversation, the assistant's part of it, and what is refused.

Each docstring names the line whose deletion breaks the test."""

import json
import re

import pytest
from reference.chats import BARE, DROPS_SYSTEM, MARKED, SHAPELESS, STRIPS, TALK, template, texts_of
from reference.odd_tokenizers import ODD
from transformers import AutoTokenizer

from mtp_jax.convert.tokenizer import load_hub_tokenizer
from mtp_jax.data import chat
from mtp_jax.data.conversations import document_of
from mtp_jax.data.tokenize import bytes_tokenizer, load_tokenizer, train_bpe
from mtp_jax.errors import UserError


@pytest.mark.parametrize("name", ["end of turn before end of text", "Gemma 3"])
def test_a_prompt_is_that_of_transformers(name, tmp_path):
    """encode_chat(messages) = apply_chat_template(messages, add_generation_prompt=True), of the tokenizer as
    transformers reads it and as training does, also after it was saved for a run. Breaks without `beside`, without
    `add_special_tokens=False`, or if `save` loses the template."""
    ours = ODD[name].save(tmp_path / "hub")
    expected = AutoTokenizer.from_pretrained(ours).apply_chat_template(TALK[:2], add_generation_prompt=True)
    trained = load_tokenizer(ours)
    trained.save(tmp_path / "tokenizer.json")
    for one in (load_hub_tokenizer(ours), trained, load_tokenizer(tmp_path)):
        assert one.encode_chat(TALK[:2]) == expected["input_ids"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MARKED, ["HELLO", "BYE"]),
        (BARE, [" HELLO ", "BYE"]),
        (STRIPS, ["HELLO</s>", "BYE</s>"]),
        (DROPS_SYSTEM, [" HELLO ", "BYE"]),
        (chat.NAMED["plain"], ["HELLO<|eos|>", "BYE<|eos|>"]),
    ],
    ids=["marked", "bare", "strips", "drops system", "plain"],
)
def test_the_assistants_words(text, expected):
    """What is learned = what the assistant says, with the end of its turn where the template writes one. Breaks without
    `add_generation_prompt` in `before` (the role would be learned), or with the places of another message."""
    assert texts_of(*template(text).learned(TALK)) == expected


def test_a_template_whose_beginnings_are_others_is_refused():
    """A template that says first how many messages there are begins otherwise for fewer of them. Breaks without
    `startswith`: other characters would be learned."""
    with pytest.raises(
        UserError, match=r"^the shapeless template writes .* up to message 3 in another way .* set data"
    ):
        template(SHAPELESS, "the shapeless template").learned(TALK)
    marked = SHAPELESS.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
    assert "BYE" in texts_of(*template(marked).learned(TALK))


def test_a_template_that_leaves_nothing_to_learn_is_refused():
    """Breaks without `if not spans`: the record would be trained on without a target."""
    empty = "{% for m in messages %}{{ m['role'] }}{% generation %}{% endgeneration %}{% endfor %}"
    with pytest.raises(UserError, match=r"^the mute template leaves out the text of the assistant's messages"):
        template(empty, "the mute template").learned(TALK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "[] is not a conversation; give a list"),
        ("hi", "'hi' is not a conversation; give a list"),
        ([{"role": "user", "content": "a"}, "b"], "message 2 is 'b'; it must have the fields 'role' and 'content'"),
        ([{"content": "a"}], "message 1: field 'role' is missing; it must be a text"),
        ([{"role": "user", "content": 5}], "message 1: field 'content' is 5; it must be a text"),
        (
            [{"role": "user", "content": "\ud83d"}],
            "message 1: field 'content' holds half a surrogate pair at 0; fix it",
        ),
        ([{"role": "user", "content": "a"}], "no message has the role 'assistant'"),
    ],
)
def test_malformed_messages(messages, message):
    """Each has one line. Breaks without the matching check in `check_messages` or `learned`."""
    with pytest.raises(UserError, match=r"^" + re.escape(message)):
        template(BARE).learned(messages)


def test_what_a_template_refuses_is_said():
    """The template's own words are in the error; one that is no Jinja has an error, too."""
    with pytest.raises(UserError, match=r"^t cannot write this conversation: roles must alternate$"):
        template("{{ raise_exception('roles must alternate') }}", "t").prompt(TALK)
    with pytest.raises(UserError, match=r"^t cannot write this conversation: "):
        template("{% for %}", "t").prompt(TALK)


def test_special_tokens_of_a_template_are_tokens():
    """A tokenizer that reads `<|eos|>` in a text as characters reads it as the token where a template wrote it. Breaks
    without `_reads_special`: the model would never see the end of a turn."""
    plain = bytes_tokenizer().with_chat("plain")
    text, learned = plain.chat.learned(TALK[:3])
    one = plain.encode_learned(text, learned, rendered=True)
    assert [token for token, learn in zip(one.ids, one.learn, strict=True) if learn] == [*b"HELLO", plain.eos_id]
    assert one.ids.count(plain.eos_id) == 1
    assert one.unpredicted == len(text) - len("HELLO<|eos|>")
    assert plain.encode("<|eos|>") == [*b"<|eos|>"]


def test_a_token_with_a_learned_character_is_learned():
    """Learned = every token that has a character of the part, also where it begins before it. Breaks with `begins`
    in the place of `ends`."""
    bpe = train_bpe(["say yes"] * 9, 300)
    one = bpe.encode_learned("say yes", ((4, 7),), rendered=False)  # `yes` without the blank of its token
    assert one.ids == [bpe.bos_id, *bpe.encode("say"), *bpe.encode(" yes"), bpe.eos_id]
    assert one.learn == [False, False, True, True]
    assert one.unpredicted == len("say")


def test_no_template_has_a_remedy(tmp_path):
    """A setting that names no template, and a tokenizer without one, say what to give."""
    with pytest.raises(
        UserError, match=r"no chat template; give it one, 'plain' or the path of a file: --chat-template"
    ):
        bytes_tokenizer().encode_chat(TALK)
    with pytest.raises(UserError, match=r"^chat template 'nowhere' is neither 'plain' nor a file that can be read"):
        bytes_tokenizer().with_chat("nowhere")
    with pytest.raises(UserError, match=r"has no chat template; give a file with a template, or 'plain'$"):
        bytes_tokenizer().with_chat(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": BARE, "eos_token": "X"}))
    assert bytes_tokenizer().with_chat(str(tmp_path)).chat.tokens["eos_token"] == "<|eos|>"


def test_where_a_users_message_begins():
    """`opening` is the text up to the user's own words, behind other messages; a template that leaves them out, or
    writes them twice, cannot be used so.

    Breaks without the count in `opening`.
    """
    assert template(BARE).opening() == "(user)"
    assert template(BARE).opening([{"role": "system", "content": "be brief"}]) == "(system)be brief(user)"
    for text in ("{{ messages | length }}", BARE + BARE):
        with pytest.raises(UserError, match=r"^t changes the text of a user's message"):
            template(text, "t").opening()


def test_a_cut_answer_has_no_end():
    """Of a conversation that is not finished the last answer is learned as it stands, behind what a prompt would be;
    a completion that is not finished has no end token behind it.

    Breaks if `learned_of_cut` renders the last message, or `encode_learned` ends what is not finished.
    """
    ends = "{% for m in messages %}({{ m['role'] }}){{ m['content'] }}</s>{% endfor %}" + _GENERATE
    text, learned = template(ends).learned_of_cut(TALK[:3])
    assert text == template(ends).prompt(TALK[:2]) + TALK[2]["content"]
    assert texts_of(text, learned) == [TALK[2]["content"]]
    with pytest.raises(UserError, match="its last message must be the assistant's"):
        template(ends).learned_of_cut(TALK[:2])
    plain = bytes_tokenizer()
    whole, cut = (plain.encode_learned("abc", ((1, 3),), False, finished) for finished in (True, False))
    assert whole.ids == [*cut.ids, plain.eos_id] and whole.learn == [*cut.learn, True]


def test_unfinished_records():
    """`finished` of a record reaches its document; what is neither true nor false is refused.

    Breaks without `_finished` in `document_of`.
    """
    asked = {"prompt": "ab", "completion": "cd"}
    document = lambda record: document_of("n", record, "text", template(BARE), "file, line 1")  # noqa: E731
    assert document(asked).finished and not document(asked | {"finished": False}).finished
    talk = {"messages": TALK[:3], "finished": False}
    assert document(talk).text == template(BARE).learned_of_cut(TALK[:3])[0]
    with pytest.raises(UserError, match=r"^file, line 1: field 'finished' is 'no'; it must be true or false"):
        document(asked | {"finished": "no"})


_GENERATE = "{% if add_generation_prompt %}(assistant){% endif %}"
