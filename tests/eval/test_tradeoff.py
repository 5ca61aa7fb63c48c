"""The judge of lossy decoding = the teacher's whole forward pass. Each docstring names the line whose deletion breaks
the test."""

import jax
import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, loaded, loud_params, model, plain
from reference.tiny import tiny_config

from mtp_jax.errors import UserError
from mtp_jax.eval.tradeoff import Setting, quality, settings, under


def test_judged_by_the_whole_forward_pass():
    """agreement and nll = means over all new tokens of [token = arg-max] and -log p, from `lm.logits` row by row.

    Breaks if prompts count, if padding counts, or if a row is judged one position off.
    """
    teacher = model("random")
    outputs = [plain("random", prompt)[:length] for prompt, length in zip(PROMPTS, (9, 3, 7, 5), strict=True)]
    outputs[0][4] = (outputs[0][4] + 1) % 40
    nll, agreed = [], []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        logits_TV = np.asarray(teacher.logits(np.array([[*prompt, *output]]))[0, 0])[len(prompt) - 1 : -1]
        nll += (-np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(output)), output]).tolist()
        agreed += (logits_TV.argmax(-1) == output).tolist()
    agreement, found_nll = under(teacher, PROMPTS, outputs)
    assert 0 < np.mean(agreed) < 1
    np.testing.assert_allclose(agreement, np.mean(agreed), rtol=1e-6)
    np.testing.assert_allclose(found_nll, np.mean(nll), rtol=1e-5)


def test_a_model_agrees_with_itself():
    """Greedy decoding of the teacher agrees everywhere, one token per pass, and `is_right` is asked once per prompt.

    Breaks if the tokens are judged in another order than the prompts.
    """
    teacher = model("random")
    asked = []

    def is_right(row, tokens):
        asked.append(row)
        return tokens == plain("random", PROMPTS[row])[:NEW]

    point = quality(teacher, teacher, PROMPTS, Setting("plain", {"draft": "none"}), NEW, is_right)
    assert (point.tokens_per_pass, point.agreement, point.right) == (1, 1, 1)
    assert asked == [0, 1, 2, 3]


def test_settings():
    """One setting for every k, with k - 1 drafts, and one per threshold. Breaks if k counts drafts."""
    names = [one.name for one in settings(3, (0.9, 0.5))]
    assert names == ["k = 1", "k = 2", "k = 3", "tau = 0.9", "tau = 0.5"]
    assert [one.options["num_draft"] for one in settings(3, (0.9,))] == [0, 1, 2, 2]


def test_other_vocabulary_is_refused():
    """A teacher with another number of tokens is refused. Breaks without the check."""
    config = tiny_config(model={"vocab_size": 24})
    other = loaded(config, loud_params(config))
    with pytest.raises(UserError, match="the model has 40 tokens and the teacher 24"):
        quality(model("random"), other, PROMPTS, Setting("plain", {}), 2)
