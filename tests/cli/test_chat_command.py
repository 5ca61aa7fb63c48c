"""`mtp chat` and `mtp generate --chat`, with a model that answers `HELO!` to everything."""

import io
import json
import sys
import types

import pytest
from reference.decoding import EOS_ID, chain_model

from mtp_jax.cli import chat, generate, options, run
from mtp_jax.cli.common import parse

LM = chain_model((10, *b"HELO!", EOS_ID))


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    monkeypatch.setattr(options, "load", lambda source, **others: LM)
    monkeypatch.setattr(options, "keep_compiled", lambda directory: None)


def say(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_line_by_line(monkeypatch, capsys):
    """Each line has an answer; drafted characters are green; the second turn runs what is new only; `/new` begins anew.
    Breaks without the colour, without `conversation.messages` in the condition of --system, or without `/new`."""
    say(monkeypatch, "a", "b", "", "/new", "a")
    arguments = ["--chat-template", "plain", "--system", "s", "--show-drafts", "--max-new-tokens", "7"]
    assert run(["chat", "model", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.out == "H\x1b[32mELO\x1b[0m!\n" * 3
    runs = [line.split("; ")[-1] for line in captured.err.splitlines() if "prompt tokens processed" in line]
    processed = ["29 of 29", "24 of 55", "29 of 29"]
    assert runs == [f"{counts} prompt tokens processed]" for counts in processed]


def test_plain_text_without_show_drafts(monkeypatch, capsys):
    """No colour unless it is asked for."""
    say(monkeypatch, "a")
    assert run(["chat", "model", "--chat-template", "plain", "--max-new-tokens", "7"]) == 0
    assert capsys.readouterr().out == "HELO!\n"


def test_ctrl_c_ends_an_answer(monkeypatch, capsys):
    """The answer stays as it was read, and the conversation goes on. Breaks without `except KeyboardInterrupt`."""
    say(monkeypatch, "a", "b")
    shown = []

    def stop(piece, show_drafts):
        shown.append(piece.text)
        if len(shown) == 2:
            raise KeyboardInterrupt
        return piece.text

    monkeypatch.setattr(chat, "_shown", stop)
    assert run(["chat", "model", "--chat-template", "plain", "--max-new-tokens", "7"]) == 0
    assert capsys.readouterr().out == "H\nHELO!\n"


def test_generate_takes_prompts_as_messages():
    """--chat: each prompt is a message of the user. Breaks without the last line of `_prompts`."""
    args = parse(generate.Args, ["model", "--chat", "--prompt", "a", "--prompt", "b"], "mtp generate", "")
    assert generate._prompts(args) == [[{"role": "user", "content": text}] for text in "ab"]


@pytest.mark.grid
def test_generate_prints_messages(capsys):
    """--chat prints what was asked and the answer, and the messages in JSON."""
    arguments = ["generate", "model", "--chat-template", "plain", "--chat", "--prompt", "a", "--max-new-tokens", "7"]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["completions"][0]
    assert (found["text"], found["prompt"]) == ("HELO!", [{"role": "user", "content": "a"}])
    assert run(arguments) == 0
    assert capsys.readouterr().out == "a\nHELO!\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "model"], "this model has no chat template; give it one: lm.with_chat_template('plain')"),
        (["chat", "model", "--chat-template", "no.jinja"], "chat template 'no.jinja' is neither 'plain' nor a file"),
        (["generate", "model", "--chat", "--prompt", "a"], "prompt 0: the tokenizer has no chat template; give it one"),
        (["generate", "model", "--chat", "--prompt-tokens", "1"], "--chat formats text messages, and --prompt-tokens"),
    ],
)
def test_refused_in_one_line(arguments, message, monkeypatch, capsys):
    """Exit status 2, and a line with the remedy."""
    say(monkeypatch, "a")
    assert run(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"mtp: error: {message}")


@pytest.mark.parametrize(
    ("source", "flags", "extra_heads", "wanted"),
    [
        ("smollm2", [], 3, ("heads+lookup", "auto")),
        ("smollm2", ["--num-draft", "2"], 3, ("heads+lookup", 2)),
        ("smollm2", ["--accept", "typical"], 3, ("heads+lookup", None)),
        ("smollm2", ["--draft", "heads"], 3, ("heads", None)),
        ("smollm2", [], 0, ("auto", None)),
        ("some/run", [], 3, ("auto", None)),
    ],
)
def test_heads_of_the_package_draft_as_it_was_measured(source, flags, extra_heads, wanted):
    """--draft auto is heads+lookup with --num-draft auto where the package brings the heads; else nothing changes.
    Breaks without `is_named`, without the look at `num_draft`, or where a user's choice is overruled."""
    args = parse(generate.Args, [source, "--prompt", "x", *flags], "mtp generate", "")
    lm = types.SimpleNamespace(config=types.SimpleNamespace(num_draft=extra_heads))
    made = options.with_best_draft(args, lm, options.options_of(args))
    assert (made["draft"], made["num_draft"]) == wanted
