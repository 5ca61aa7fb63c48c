"""Prompts: what is left out, what comes from where, and files of a user's own."""

import json
import types

import pytest

from mtp_jax.accelerate import prompts
from mtp_jax.accelerate.overlap import Excluded, read_excluded
from mtp_jax.accelerate.prompts import library_texts, make_prompts, read_prompts
from mtp_jax.errors import UserError

QUESTION = "How many apples does Anna have after she gives three of them to Ben?"


def test_what_is_close_is_left_out(tmp_path):
    """A text is close that shares eight words in a row with an excluded one, whatever its case and punctuation, or that
    is one as a whole; seven words in a row are not close.

    Breaks if `_runs` ends a run early, or `words_of` keeps case.
    """
    file = tmp_path / "tests.jsonl"
    file.write_text(json.dumps({"question": QUESTION, "more": [{"text": "Short one."}]}) + "\n")
    excluded = read_excluded([str(file)])
    words = QUESTION.lower().split()
    assert excluded.is_close("Tell me: " + " ".join(words[3:11]).upper() + " now")
    assert not excluded.is_close("Tell me: " + " ".join(words[3:10]) + " now")
    assert excluded.is_close("short one")
    assert not Excluded().is_close(QUESTION)
    with pytest.raises(UserError, match=r"--exclude nowhere\.txt does not exist"):
        read_excluded(["nowhere.txt"])


def tokenizer(**changes):
    chat = types.SimpleNamespace(opening=lambda: "<user>")
    return types.SimpleNamespace(chat=chat, encode_rendered=lambda text: [text], **changes)


def test_made_prompts(tmp_path, monkeypatch):
    """Messages come from the model, given a user's header alone, or the first words of a problem behind it; cut ones,
    short ones, doubles and what is close to an excluded text are left out. The same seed gives the same prompts, and
    what lies on the disk is not made again.

    Breaks if `_written` keeps what did not end, if `make` asks with another opening, or without `_distinct`.
    """
    asked = []

    def generate(lm, ids, **options):
        asked.append(ids)
        texts = ["Can you say this again ?", "can you say this AGAIN", "no", QUESTION, "It was cut in the mid"]
        texts += [f"Tell me about the number {len(asked)} {i} please" for i in range(len(ids) - 5)]
        reasons = ["eos"] * 4 + ["length"] + ["eos"] * (len(ids) - 5)
        return types.SimpleNamespace(text=texts, finish_reason=reasons)

    monkeypatch.setattr(prompts, "generate", generate)
    lm = types.SimpleNamespace(tokenizer=tokenizer())
    given = (lm, 100, 3, tmp_path, Excluded([QUESTION]), lambda line: None)
    made = make_prompts(*given)
    kinds = {kind: [one for one in made if one["kind"] == kind] for kind in prompts.SHARES}
    assert [len(kinds[kind]) for kind in prompts.SHARES] == [40, 20, 30, 10]
    said = [one["messages"][0]["content"] for one in kinds["chat"]]
    assert sum("again" in text.lower() for text in said) <= 1 and QUESTION not in said
    assert not any(text in ("no", "It was cut in the mid") for text in said)
    beginnings = {text for ids in asked for (text,) in ids}
    assert "<user>" in beginnings and beginnings - {"<user>"} <= {f"<user>{one}" for one in prompts.BEGINNINGS}
    assert all(one["messages"][0]["content"].startswith(prompts.BEGINNINGS) for one in kinds["mathematics"])
    count = len(asked)
    assert make_prompts(*given) == made and len(asked) == count


def test_beginnings_from_the_standard_library(tmp_path):
    """Without a template there are code and prose alone. Code is the head of a function, with its documentation and a
    new line behind; prose is cut behind a word.

    Breaks if `_code` takes the body too, or `make_prompts` asks a model without a template to write.
    """
    lm = types.SimpleNamespace(tokenizer=types.SimpleNamespace(chat=None))
    made = make_prompts(lm, 20, 0, tmp_path, Excluded(), lambda line: None)
    assert sorted({one["kind"] for one in made}) == ["code", "prose"] and len(made) == 20
    for one in made:
        if one["kind"] == "code":
            compile(one["text"] + "    pass\n", "head", "exec")
            assert "def " in one["text"] and one["text"].endswith("\n")
        else:
            assert not one["text"].endswith(" ") and "\n" not in one["text"]


def test_texts_of_the_library():
    """About so many characters, half code and half documentation, the same for a seed, and nothing that is excluded.

    Breaks if `library_texts` counts both halves together, or does not ask `excluded`.
    """
    texts = [one["text"] for one in library_texts(6000, 1, Excluded())]
    code = [text for text in texts if text.startswith(("def ", "@"))]
    for text in code:
        compile(text, "function", "exec")
    sizes = [sum(map(len, chosen)) for chosen in (code, set(texts) - set(code))]
    assert all(3000 <= size <= 3000 + 3 * 1500 for size in sizes)
    assert [one["text"] for one in library_texts(6000, 1, Excluded())] == texts
    others = [one["text"] for one in library_texts(6000, 1, Excluded([texts[0], texts[-1]]))]
    assert texts[0] not in others and texts[-1] not in others


def test_prompts_of_a_file(tmp_path):
    """Lines of a text are what a user says, or texts to go on with where there is no template; records are what they
    say they are.

    Breaks if `_given` exchanges the two, or `read_prompts` keeps empty lines.
    """
    text = tmp_path / "prompts.txt"
    text.write_text("one line\n\nanother line\none line\nlast\n")
    user = [{"role": "user", "content": "one line"}]
    assert read_prompts(str(text), True)[0] == {"kind": "given", "messages": user}
    assert [one["text"] for one in read_prompts(str(text), False)] == ["one line", "another line", "last"]
    records = tmp_path / "prompts.jsonl"
    records.write_text(
        json.dumps({"messages": user, "kind": "talk"}) + "\n" + '{"prompt": "def f("}\n{"prompt": "x"}\n'
    )
    expected = [{"kind": "talk", "messages": user}, {"kind": "given", "text": "def f("}]
    assert read_prompts(str(records), True)[:2] == expected


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("one.txt", "alone\n", "holds 1 different prompts; at least 3"),
        ("a.jsonl", '{"question": "?"}\n', "record 1 has neither 'messages' nor a text 'prompt'"),
        ("b.jsonl", '{"prompt": "x"\n', r"b\.jsonl, line 1 is not JSON"),
        ("c.jsonl", "[1]\n", "line 1 is a list, not an object"),
    ],
)
def test_refused_files(tmp_path, name, content, said):
    """A file that holds no prompts is refused, with the place.

    Breaks without the check that the pattern names.
    """
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said):
        read_prompts(str(tmp_path / name), True)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "nothing.txt"), True)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user"}]}, "message 1: field 'content' is missing"),
        ({"messages": ["hi"]}, "message 1 is 'hi'"),
        ({"prompt": "a \ud83d b"}, "field 'prompt' is not Unicode text"),
    ],
)
def test_odd_records_are_named(tmp_path, record, message):
    """By their number. Breaks without `check_messages`, or `encode`."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ({"prompt": "a"}, record)))
    with pytest.raises(UserError, match=r"p\.jsonl, record 2: " + message):
        read_prompts(str(path), True)


def test_prompts_of_a_file_are_kept_apart(tmp_path):
    """1+1 and 1-1 are two prompts, the second 1+1 is none; a mark at the beginning of the file is no text; two prompts
    are too few, and an array is refused.

    Breaks if files are compared by words, or read without "utf-8-sig".
    """
    path = tmp_path / "p.txt"
    path.write_text("\ufeff1+1\n1-1\n1+1\n2*2\n", encoding="utf-8")
    assert [one["text"] for one in read_prompts(str(path), False)] == ["1+1", "1-1", "2*2"]
    path.write_text("1+1\n1-1\n")
    with pytest.raises(UserError, match="holds 2 different prompts; at least 3"):
        read_prompts(str(path), False)
    with pytest.raises(UserError, match=r"give a \.jsonl"):
        read_prompts(str(tmp_path / "p.json"), False)
