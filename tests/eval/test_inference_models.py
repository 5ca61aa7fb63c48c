"""Methods over a model: samples, chains of revisions, the model as its own judge, and thinking that is cut."""

import functools
import itertools

import pytest
from reference.decoding import CHAIN_CONFIG, loaded, loud_params
from reference.scripted_sampler import MODEL, TOKENIZER, Sampler

from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.decode.memory import CacheTooLarge
from mtp_jax.errors import UserError
from mtp_jax.eval import best_of_n
from mtp_jax.eval.inference.responses import Drawing, sample_n
from mtp_jax.eval.inference.revision import REVISE, revision_prompt, sequential_revision
from mtp_jax.eval.inference.scorers import self_judged
from mtp_jax.eval.inference.thinking import thinking_tokens, truncate_reasoning


@functools.cache
def wandering():
    """A model with the bytes tokenizer that draws something else with every seed."""
    return loaded(CHAIN_CONFIG, loud_params(CHAIN_CONFIG, seed=6), bytes_tokenizer())


@pytest.fixture
def scripted(monkeypatch):
    """Puts a `Sampler` in the place of `generate`."""

    def put(write):
        sampler = Sampler(write)
        monkeypatch.setattr("mtp_jax.eval.inference.responses.generate", sampler)
        return sampler

    return put


@pytest.mark.grid
def test_drafts_change_no_sample():
    """samples(draft) = samples(no draft): text, tokens and end, with log-probabilities up to rounding; and samples of a
    prompt differ. Breaks under a rule that takes drafts, or if the seeds are not handed on."""
    drawn = {}
    for draft in ("none", "heads"):
        drawing = Drawing(max_new_tokens=12, temperature=1.0, draft=draft)
        drawn[draft] = sample_n(wandering(), ["ab", "c"], 3, drawing, seeds=[5, 6, 7, 8, 9, 10])
    for plain, drafted in zip(*(itertools.chain(*rows) for rows in drawn.values()), strict=True):
        assert (plain.text, plain.tokens, plain.finish_reason) == (drafted.text, drafted.tokens, drafted.finish_reason)
        assert plain.logprob == pytest.approx(drafted.logprob, abs=1e-3)
        assert plain.mean_logprob == pytest.approx(plain.logprob / len(plain.tokens))
    assert len({one.tokens for one in drawn["none"][0]}) == 3
    assert [one.prompt_tokens for row in drawn["none"] for one in row] == [3, 3, 3, 2, 2, 2]


def test_a_batch_that_does_not_fit_is_drawn_in_halves(scripted, monkeypatch):
    """Prompts first, then samples; every response keeps its seed. A single one that does not fit raises."""
    sampler = scripted(lambda prompt, seed: f"{prompt} {seed}")
    whole = sample_n(MODEL, ["a", "b", "c"], 5, Drawing(20))

    def at_most(rows):
        def generate(lm, prompts, **options):
            if len(options["seed"]) > rows:
                raise CacheTooLarge("too large")
            return sampler(lm, prompts, **options)

        return generate

    monkeypatch.setattr("mtp_jax.eval.inference.responses.generate", at_most(2))
    assert sample_n(MODEL, ["a", "b", "c"], 5, Drawing(20)) == whole
    assert [one.text for one in whole[1]] == [f"b {seed}" for seed in range(5, 10)]
    monkeypatch.setattr("mtp_jax.eval.inference.responses.generate", at_most(0))
    with pytest.raises(CacheTooLarge):
        sample_n(MODEL, ["a"], 1, Drawing(20))


def test_a_chain_revises_its_last_response(scripted):
    """Each round reads the question and the last answer. Breaks if a round reads the first answer again."""
    scripted(lambda prompt, seed: f"{len(prompt)}")
    (chain,) = sequential_revision(MODEL, ["q"], 3, Drawing(20))
    extra = len(f"\n\n{REVISE}\n\n")
    assert [one.text for one in chain] == ["1", f"{2 + extra}", f"{1 + len(str(2 + extra)) + extra}"]
    talk = [{"role": "user", "content": "q"}]
    last = {"role": "user", "content": REVISE}
    assert revision_prompt(talk, ["a", "b"]) == [*talk, {"role": "assistant", "content": "b"}, last]
    own = sequential_revision(MODEL, ["q"], 2, Drawing(20), prompt_fn=lambda prompt, answers: f"{prompt}{answers}")
    assert own[0][1].text == f"{len('q' + str(['1']))}"


def test_the_model_as_its_own_judge(scripted):
    """The response with the highest number wins; one without a number counts as unscored."""
    scripted(lambda prompt, seed: f"r{seed}")
    (responses,) = sample_n(MODEL, ["q"], 4, Drawing(20))
    scripted(lambda prompt, seed: next(mark for word, mark in JUDGED.items() if word in prompt))
    best = best_of_n(responses, self_judged(MODEL, "q"))
    assert (best.index, best.scores, best.unscored) == (2, (3.0, None, 8.0, 8.0), 1)


JUDGED = {"r0": "3", "r1": "good", "r2": "8", "r3": "8 of 10"}


@pytest.mark.parametrize(
    ("budget", "kept"), [(1, "a</t>"), (3, "abc</t>"), (4, None), (9, None)], ids=["1", "3", "whole", "above"]
)
def test_thinking_is_cut(budget, kept):
    """Up to the budget, and then the mark; None if the thinking ends before. Breaks if tokens after the mark count."""
    tokens = TOKENIZER.encode("abcd</t>and more")
    begun = truncate_reasoning(tokens, budget, TOKENIZER.encode("</t>"), TOKENIZER.decode)
    assert begun == (None if kept is None else TOKENIZER.encode(kept))


def test_the_end_of_thinking():
    """Found as tokens, or as text where the tokens differ; without it all is thinking."""
    text_of = "".join
    assert thinking_tokens(["x", "y", "</", "t>", "z"], ["</", "t>"], text_of) == 2
    assert thinking_tokens(["x", "y.<", "/t", ">z"], ["</", "t>"], text_of) == 1
    assert thinking_tokens(["x", "y"], ["</", "t>"], text_of) == 2
    with pytest.raises(UserError, match="a budget of 0 tokens"):
        truncate_reasoning(["x"], 0, ["e"], text_of)
    with pytest.raises(UserError, match="has no tokens; give another --end-think"):
        truncate_reasoning(["x"], 1, [], text_of)
