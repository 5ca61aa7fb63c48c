"""Heads that we trained, drafting in transformers."""

import collections

import pytest
import torch
import transformers

import mtp_jax

PROMPTS = ["def return self", "open close read", "print if else", "range in"]
NEW = 60


@pytest.fixture
def served(trained, tmp_path, monkeypatch):
    """Our model in transformers, with the one line that its class needs, and the numbers of drafts that it accepts."""
    generator = transformers.generation.candidate_generator.MTPCandidateGenerator
    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp.*"])
    assert mtp_jax.export_model(mtp_jax.load(trained), tmp_path / "out", notify=str) == "mtp"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    accepted, candidates = [], generator.get_candidates

    def spy(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **others):
        accepted.append(int(n_last_matches))
        return candidates(self, input_ids, model_kwargs, model_outputs, is_first_iteration, n_last_matches, **others)

    monkeypatch.setattr(generator, "get_candidates", spy)
    return model, accepted


@pytest.mark.grid
def test_transformers_drafts_with_our_heads(trained, served):
    """generate(use_mtp=True): the text of plain search, ours and theirs, and as many rounds that accept k drafts as
    with us. Fails on a projection in the other order, on the state before the final norm, or a chain before it."""
    (model, accepted), lm = served, mtp_jax.load(trained)
    total = collections.Counter()
    for prompt in PROMPTS:
        ids = lm.tokenizer.encode_prompt(prompt)
        ours = mtp_jax.generate(lm, [ids], max_new_tokens=NEW, ignore_eos=True)
        given = torch.tensor([ids])
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        options["attention_mask"] = torch.ones_like(given)
        plain = model.generate(given, **options)[0, len(ids) :].tolist()
        accepted.clear()
        drafted = model.generate(given, use_mtp=True, **options)[0, len(ids) :].tolist()
        assert ours.tokens[0] == plain == drafted
        # Their first two calls come before any draft. Of the last round they only know how many tokens were left: it
        # accepted one less than that, or, where the limit cut its last token off, as many.
        theirs, left = collections.Counter(accepted[2:]), NEW - 1 - sum(count + 1 for count in accepted[2:])
        mine = collections.Counter(dict(enumerate(ours.stats.histogram)))
        last = mine - theirs
        assert theirs <= mine and last.total() == 1 and set(last) <= {left - 1, left}
        total += mine
    assert total[1] + total[2] + total[3] > 10  # the heads are right often enough for this to say something
