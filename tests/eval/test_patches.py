"""`mtp patches`: entropies of a byte model, lengths of patches, and the picture."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import loaded, loud_params, model
from reference.tiny import tiny_config, write_text

from mtp_jax.cli import patches as command
from mtp_jax.cli import run
from mtp_jax.config.patching import PatchRule
from mtp_jax.data.tokenize import blt_bytes_tokenizer
from mtp_jax.decode.sampling import entropy
from mtp_jax.eval import patches
from mtp_jax.eval.patches_page import background, for_terminal
from mtp_jax.model.blt.patching import patch_starts
from mtp_jax.model.entropies import next_entropy

CONFIG = tiny_config(model={"vocab_size": 260, "num_layers": 1}, data={"tokenizer": "blt_bytes"})
LM = loaded(CONFIG, loud_params(CONFIG), blt_bytes_tokenizer())
TEXT = "naïve <b>&\n😀 def f(x): return x"


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    monkeypatch.setattr(command, "load", lambda source: {"lm": LM, "tokens": model("random")}[source])
    monkeypatch.setattr(command, "keep_compiled", lambda directory: None)


def test_entropies_are_those_of_the_logits():
    """H_t = -sum p ln p of head 0's logits at t, over the whole vocabulary. Breaks if another head or base is read."""
    tokens_BT = np.array([LM.tokenizer.encode_prompt(TEXT)])
    expected_BT = entropy(jax.nn.log_softmax(LM.logits(tokens_BT)[0]))
    np.testing.assert_allclose(next_entropy(LM.arch, LM.params, tokens_BT), expected_BT, rtol=2e-5)


def test_entropies_of_packed_documents_are_those_of_each():
    """Two documents in a row have the entropies that each has alone. Breaks if positions or segments leak."""
    one = LM.tokenizer.encode_document("a = 1")
    two = LM.tokenizer.encode_document("return")
    packed_BT = next_entropy(LM.arch, LM.params, jnp.array([one + two]), jnp.array([[1] * len(one) + [2] * len(two)]))
    alone = [next_entropy(LM.arch, LM.params, jnp.array([ids]))[0] for ids in (one, two)]
    np.testing.assert_allclose(packed_BT[0], np.concatenate(alone), rtol=2e-5)


def test_lengths_add_up_without_padding():
    """sum of lengths = tokens, number of lengths = starts. Breaks if padding counts, or a row's last patch is lost."""
    starts_BT = np.array([[1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0]], bool)
    figures = patches.PatchFigures.of(starts_BT, np.array([[1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0]]))
    assert figures.lengths_P.tolist() == [1, 3, 2, 2, 1]
    assert (figures.tokens, figures.mean, figures.quantile(0.5), figures.quantile(0.9)) == (9, 1.8, 2, 3)
    assert figures.counts(2) == [2, 3]


def test_characters_have_the_largest_entropy_of_their_bytes():
    """A character is its bytes decoded, their largest entropy, and a start if one of them is one.

    A broken byte is U+FFFD. Breaks if a character is cut at its first byte, or a start inside it is lost.
    """
    ids = [1, *LM.tokenizer.encode("a€"), 4 + 0xE2, 4 + 0x82, *LM.tokenizer.encode("b")]
    entropy_T = np.array([np.nan, 0.5, 0.1, 0.9, 0.2, 0.3, 0.4, 0.6])
    assert len(ids) == 8
    starts_T = np.array([1, 0, 0, 1, 0, 0, 1, 0], bool)
    found = list(patches.characters(LM.tokenizer, ids, entropy_T, starts_T))
    assert [(one.text, one.starts) for one in found] == [
        ("<|bos|>", True),
        ("a", False),
        ("€", True),
        ("\ufffd", False),
        ("\ufffd", True),
        ("b", False),
    ]
    assert np.isnan(found[0].entropy)
    assert [one.entropy for one in found[1:]] == [0.5, 0.9, 0.3, 0.4, 0.6]


def test_colours_go_from_white_to_the_largest_entropy():
    """background(0) is white, background(top) is full, an unknown entropy is white; borders are in the plain text.

    A character that controls a terminal is replaced. Breaks without `_printable`.
    """
    assert background(0.0, 2.0) == background(float("nan"), 2.0) == (255, 255, 255)
    assert background(2.0, 2.0) == (224, 138, 30)
    shown = [patches.Shown(text, 0.1, starts) for text, starts in zip("ab\x1b", (True, False, True), strict=True)]
    assert for_terminal(shown).plain == "ab|\ufffd"


def test_command_on_a_text(tmp_path, capsys):
    """--json gives the fitted rule, and starts that are those of `patch_starts` with it. The page is the whole text.

    Breaks if another threshold is printed than the one that cuts, or if text is not escaped in HTML.
    """
    page = tmp_path / "page.html"
    arguments = ["patches", "lm", "--text", TEXT, "--mean-length", "3", "--output", str(page)]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rule = PatchRule(**found["rule"])
    assert (rule.kind, rule.byte_offset, found["bytes"]) == ("global", 4, len(TEXT.encode()) + 1)
    tokens_BT = jnp.array([found["tokens"]])
    starts_BT = patch_starts(next_entropy(LM.arch, LM.params, tokens_BT), rule)
    assert found["starts"] == np.flatnonzero(starts_BT[0, :-1]).tolist()
    assert found["mean_length"] == pytest.approx(3, abs=0.3) == found["bytes"] / found["patches"]
    assert found["entropies"][0] is None
    text = page.read_text(encoding="utf-8")
    shown = re.sub("<[^>]*>", "", text[text.index('class="text">') + len('class="text">') : text.index("</div>")])
    assert shown == "&lt;|bos|&gt;" + TEXT.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace(
        "\n", "⏎\n"
    )
    # A patch may begin inside a character. Then the border is before the character, which has one border.
    ends = np.cumsum([1, *(len(one.encode()) for one in TEXT)])
    assert text.count('class="start"') == len(set(np.searchsorted(ends, found["starts"], side="right")))
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert f"{rule.threshold:.4f} nats" in out
    assert TEXT.split("\n")[1][:2] in out.replace("|", "")


@pytest.mark.parametrize(
    ("kind", "more"), [("relative", []), ("static", []), ("space", []), ("global", ["--text", "ab"])]
)
def test_command_on_data(kind, more, tmp_path, capsys):
    """The figures are of the first rows of the data; --text is only shown. Breaks if --text is fitted on."""
    source = str(write_text(tmp_path, files=3, words=60))
    assert run(["patches", "lm", "--data", source, "--rule", kind, "--rows", "3", "--json", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == 3 * CONFIG.data.seq_len
    if kind != "space":
        wanted = {"static": 4, "global": 4.5, "relative": 4.5}[kind]
        assert found["mean_length"] == pytest.approx(wanted, rel=0.2)
    assert ("tokens" in found) == bool(more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lm"], "there is nothing to cut; give --text TEXT or --data PATH, or both"),
        (["tokens", "--text", "a"], "tokens does not read bytes, so it cannot cut them into patches; train a model"),
        (["lm", "--text", "a" * 200], "the text has 201 tokens; give 1 to 128 (model.max_seq_len), or a longer text"),
        (["lm", "--text", "a b", "--rule", "static", "--mean-length", "4.5"], "--mean-length 4.5 with --rule static: "),
        (
            ["lm", "--text", "a b", "--rule", "space", "--mean-length", "4"],
            "--mean-length 4 has no effect with --rule s",
        ),
        (["lm", "--text", "a b", "--mean-length", "0.5"], "--mean-length 0.5 is no length of a patch; give 1 or more"),
        (["lm", "--text", "a b", "--mean-length", "nan"], "--mean-length nan is no length of a patch; give 1 or more"),
        (["lm", "--text", "a b", "--mean-length", "40"], "no threshold gives a mean patch length of 40"),
        (["lm", "--text", "a b", "--rows", "4"], "--rows 4 has no effect without --data; leave it out"),
        (["lm", "--text", "a b", "--text-field", "x"], "--text-field x has no effect without --data; leave it out"),
        (["lm", "--data", "nowhere"], "data source 'nowhere' does not exist"),
        (["lm", "--text", "a b c d e f", "--mean-length", "2", "--output", "/nowhere/x"], "the page cannot be written"),
    ],
)
def test_refused_in_one_line(arguments, message, capsys):
    """Exit status 2, and a line with the remedy."""
    assert run(["patches", *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"mtp: error: {message}")
