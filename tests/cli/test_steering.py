"""`mtp generate` with an expert and an anti-expert, and with soft thinking, on models that write fixed text."""

import json

import pytest
from reference.decoding import CHAIN, EOS_ID, chain_model

from mtp_jax.cli import options, run, steering

MODELS = {"base": chain_model(), "tuned": chain_model((*b"agec", EOS_ID))}
"""After an `a` they write `bé漢...` and `gec`."""


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Models by name instead of directories."""
    for module in (options, steering):
        monkeypatch.setattr(module, "load", lambda source, **others: MODELS[source])
    monkeypatch.setattr(options, "keep_compiled", lambda directory: None)


def generate(capsys, *arguments):
    """The completion of an `a`, the statistics and what is printed on the side."""
    assert run(["generate", "base", "--prompt", "a", "--max-new-tokens", "4", "--json", *arguments]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    return result["completions"][0], result["stats"], captured.err


def test_an_expert_steers(capsys):
    """With the base as anti-expert the expert is heard, and with alpha 0 the base. Breaks if --alpha, --expert or
    --draft expert is not passed on."""
    pair = ["--expert", "tuned", "--anti-expert", "base"]
    steered, stats, _ = generate(capsys, *pair, "--draft", "expert", "--num-draft", "3")
    assert (steered["text"], steered["finish_reason"]) == ("gec", "eos")
    assert stats["draft_accept_rate"] == 1
    assert generate(capsys, *pair, "--alpha", "0")[0]["tokens"] == list(CHAIN[1:5])


def test_soft_thinking(capsys):
    """Thinking ends at the string that is given; the mixtures are in the JSON, and what others found is printed. Breaks
    without the hook, without `thinking` in the JSON, or without the note."""
    settings = ["--thinking.max-topk", "1", "--thinking.end", chr(CHAIN[1])]
    completion, stats, said = generate(capsys, "--soft-thinking", *settings)
    assert completion["tokens"] == list(CHAIN[1:5])
    assert completion["thinking"] == {"ended": "end", "mixtures": []}
    assert stats["alone"] == 0
    completion, stats, said = generate(capsys, "--soft-thinking", *settings[:2], "--thinking.end", "z")
    assert completion["thinking"]["ended"] == "open"
    assert completion["thinking"]["mixtures"] == [{"ids": [token], "weights": [1.0]} for token in CHAIN[1:5]]
    assert stats["alone"] == 3
    assert "no gain from soft thinking without noise" in said


def test_soft_thinking_says_what_was_thought(capsys):
    """Without --json the statistics say how many positions were mixtures."""
    settings = ["--soft-thinking", "--thinking.max-topk", "1", "--thinking.end", "z", "--max-new-tokens", "4"]
    assert run(["generate", "base", "--prompt", "a", *settings]) == 0
    assert "[soft thinking: positions that were mixtures: 4 (not ended); drafts" in capsys.readouterr().err


REFUSED = {
    "an expert alone": (["--expert", "tuned"], "--expert needs --anti-expert"),
    "an anti-expert alone": (["--anti-expert", "tuned"], "--anti-expert needs --expert"),
    "alpha alone": (["--alpha", "2"], "--alpha needs --expert and --anti-expert"),
    "expert's chat alone": (["--expert-chat"], "--expert-chat needs --expert"),
    "drafts of nobody": (["--draft", "expert"], "--draft expert needs --expert"),
    "no number": (
        ["--expert", "tuned", "--anti-expert", "base", "--alpha", "nan"],
        "ProxyTuning.alpha=nan; it must be a finite",
    ),
    "no template": (
        ["--expert", "tuned", "--anti-expert", "base", "--expert-chat"],
        "ProxyTuning.expert: prompt 0: the tokenizer has no chat template",
    ),
    "idle settings": (["--thinking.top-k", "20"], "options --thinking.* have no effect without --soft-thinking"),
    "a threshold": (["--soft-thinking", "--thinking.top-p", "2"], "SoftThinking.top_p=2.0; it must be above 0"),
    "samples without noise": (["--soft-thinking", "--thinking.end", "z", "--n", "2"], "n=2 samples at temperature 0"),
    "too many tokens": (["--json", "--logprobs", "259"], "logprobs=259, but the vocabulary has 258 tokens; use 0..258"),
    "negative": (["--json", "--logprobs", "-2"], "logprobs=-2; it must be a whole number, 0 or above"),
    "several tokens": (["--soft-thinking"], "SoftThinking.end: '</think>' is 8 tokens of this model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, capsys):
    """Each is one line on standard error, with exit status 2."""
    arguments, message = REFUSED[name]
    assert run(["generate", "base", "--prompt", "a", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines()[-1].startswith(f"mtp: error: {message}")
