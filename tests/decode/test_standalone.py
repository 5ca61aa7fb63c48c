"""Decoding without a verifier = one ordinary causal row of tokens and masks per pass, and what is refused. Each
docstring names the line whose deletion breaks the test."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from reference import decoding
from reference.decoding import CONFIG, NEW, PROMPTS, compilations, loaded, loud_params
from reference.standalone import row_logits, slow_ahead
from reference.tiers import sampled

from mtp_jax.decode.generate import generate
from mtp_jax.decode.hooks import Hook
from mtp_jax.decode.verify import Rule, take_sure
from mtp_jax.errors import UserError
from mtp_jax.model.heads import masks

K = CONFIG.heads.num_future


@functools.cache
def model():
    """The trunk of `decoding.model("random")` with loud masks."""
    config = dataclasses.replace(CONFIG, heads=dataclasses.replace(CONFIG.heads, kind="standalone"))
    trunk = decoding.model("random").params
    return loaded(config, trunk | {"heads": loud_params(config, seed=6)["heads"]})


def passes(rows):
    """Rounds by accepted drafts, from the tokens that each pass of the reference emits.

    The first token of a row comes from its prefill. A round emits the drafts that it takes, and one more token.
    """
    histogram = [0] * K
    for emitted in rows:
        left = NEW - 1
        for count in emitted:
            if left <= 0:
                break
            histogram[min(count - 1, left)] += 1
            left -= min(count, left)
    return tuple(histogram)


@pytest.mark.parametrize("tau", sampled([None, 0.45], 0.45))
def test_tokens_are_those_of_the_row(tau):
    """all and confadapt = `slow_ahead`: the same tokens and the same number in every pass, alone and in a batch.

    Breaks if masks stand behind another token than the last emitted one, if a draft that is not taken is seen or
    emitted, or if the pending token's probability is left out.
    """
    rule = Rule("all") if tau is None else Rule("confadapt", tau=tau)
    slow = [slow_ahead(model(), prompt, NEW, K, tau) for prompt in PROMPTS]
    whole = generate(model(), PROMPTS, max_new_tokens=NEW, accept=rule)
    assert whole.tokens == [tokens for tokens, _ in slow]
    assert whole.stats.histogram == passes([emitted for _, emitted in slow])
    alone = generate(model(), PROMPTS[:1], max_new_tokens=NEW, accept=rule)
    assert alone.tokens == whole.tokens[:1]
    assert whole.stats.lossy
    assert whole.stats.as_json()["lossy"]


def test_confidence_decides():
    """The reference of the test above meets several lengths; tau 1 is one token per pass, as plain decoding. So is
    `exact`, with which the model checks its own predictions.

    Guards the test above: with a random model nearly nothing could be accepted.
    """
    counts = {count for prompt in PROMPTS for count in slow_ahead(model(), prompt, NEW, K, 0.45)[1]}
    assert len(counts) > 1
    plain = generate(decoding.model("random"), PROMPTS, max_new_tokens=NEW, draft="none")
    never = generate(model(), PROMPTS, max_new_tokens=NEW, accept=Rule("confadapt", tau=1.0))
    assert never.tokens == plain.tokens
    assert never.stats.tokens_per_round == 1
    assert never.stats.replaced == 0
    checked = generate(model(), PROMPTS, max_new_tokens=NEW)
    assert checked.tokens == plain.tokens
    assert not checked.stats.lossy


def test_longest_sure_beginning():
    """take_sure = (length of the longest beginning with probabilities above tau) - 1, at least 0: literals.

    Breaks if a sure draft behind an unsure one counts, or if an unsure pending token does not stop the drafts.
    """
    sure_BQ = jnp.array([[0.99, 0.95, 0.5, 0.99], [0.5, 0.99, 0.99, 0.99], [0.99, 0.99, 0.99, 0.99], [0.9, 0.9, 1, 1]])
    np.testing.assert_array_equal(take_sure(Rule("confadapt", tau=0.9), sure_BQ), [1, 0, 3, 0])


def test_replaced_counts_other_tokens():
    """stats.replaced = number of emitted tokens that are not the arg-max after the true tokens before them.

    Breaks if the model's own choices are not computed at the places of taken drafts.
    """
    out = generate(model(), PROMPTS, max_new_tokens=NEW, accept="all")
    differing = 0
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        own_T = row_logits(model().arch, model().params, [*prompt, *tokens]).argmax(-1)
        differing += int(np.sum(own_T[len(prompt) - 1 : -1] != np.array(tokens)))
    assert out.stats.replaced == differing > 0


def test_masks_at_one_token(monkeypatch):
    """A round under these rules has P masks, and one under `exact` P (P + 1).

    Breaks if the round does not tell the model which token has masks.
    """
    original = masks.decode_masks
    sizes = {}
    for accept in ("all", "exact"):

        def counted(params, start_BX, count, slots, accept=accept):
            sizes[accept] = start_BX.shape[1] * count
            return original(params, start_BX, count, slots)

        monkeypatch.setattr(masks, "decode_masks", counted)
        generate(model(), [PROMPTS[0]], max_new_tokens=5, num_draft=2, accept=accept)
    assert sizes == {"all": 2, "exact": 6}


def _every_second():
    """A hook that changes nothing, and lets rows emit no drafts in every second round, from the first on."""

    def apply(params, rounds_B, logits_BXV, context):
        return logits_BXV, rounds_B + 1

    def embed(params, rounds_B, embedded_B1D, context):
        return embedded_B1D

    def alone(rounds_B):
        return rounds_B % 2 == 1

    def init(arch, batch, slots):
        return jnp.zeros((batch,), jnp.int32)

    return Hook("every second", init, apply, embed, alone=alone)


def test_a_row_alone_has_its_masks_behind_its_token():
    """If a hook lets a row emit no drafts, the next predictions are those behind the one token that it emits.

    Breaks if masks stand behind the drafts that the row would have emitted.
    """
    tokens = list(PROMPTS[0])
    passes = 0
    while len(tokens) < len(PROMPTS[0]) + NEW:
        logits_kV = row_logits(model().arch, model().params, tokens, K - 1)[len(tokens) - 1 :]
        tokens += logits_kV.argmax(-1)[: K if passes % 2 else 1].tolist()
        passes += 1
    found = generate(model(), PROMPTS[:1], max_new_tokens=NEW, accept="all", hooks=[_every_second()])
    assert found.tokens == [tokens[len(PROMPTS[0]) :][:NEW]]


def test_second_call_compiles_nothing():
    """One program for all prompts of a length. Breaks if a rule or a number becomes static per call."""
    rule = Rule("confadapt", tau=0.3)
    generate(model(), PROMPTS, max_new_tokens=NEW, accept=rule)
    with compilations() as compiled:
        generate(model(), [prompt[::-1] for prompt in PROMPTS], max_new_tokens=NEW - 1, accept=rule)
    assert compiled == []


def test_end_token_cuts_a_pass():
    """A row ends at the first end token of a pass, and nothing after it is returned or counted.

    Breaks if end tokens are looked for in the first token of a pass only.
    """
    tokens, emitted = slow_ahead(model(), PROMPTS[0], NEW, K)
    assert emitted[0] == K
    at = next(i for i in range(2, NEW) if tokens[i] not in tokens[:i])
    lm = dataclasses.replace(model(), tokenizer=_Ends(tokens[at]))
    out = generate(lm, [list(PROMPTS[0])], max_new_tokens=NEW, accept="all")
    assert out.tokens == [tokens[: at + 1]]
    assert out.finish_reason == ["eos"]
    assert out.stats.emitted == at + 1


class _Ends:
    """A tokenizer with an end token, which writes ids as text."""

    def __init__(self, end):
        self.end_ids = (end,)
        self.special_tokens = {}

    def decode(self, ids):
        return " ".join(map(str, ids))


REFUSED = {
    "other family": (decoding.model, ("random",), {"accept": "all"}, "for which this model was not trained"),
    "lookup": (model, (), {"accept": "confadapt", "draft": "lookup"}, "not those of draft='lookup'"),
    "auto": (model, (), {"accept": "all", "num_draft": "auto"}, "from call to call"),
    "a hook": (
        model,
        (),
        {
            "accept": "all",
            "hooks": [Hook("mine", apply=lambda params, cache, logits_BXV, context: (logits_BXV, cache))],
        },
        "accept='all' emits tokens without verification, so hook 'mine' could not change them",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    """One line that names the setting. Breaks without `check_rule` or `check_heard`."""
    make, given, settings, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        generate(make(*given), [[1, 2]], max_new_tokens=4, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tau", [1.5, -0.1])
def test_tau_is_a_probability(tau):
    """tau outside [0, 1] is refused. Breaks without the check in `Rule`."""
    with pytest.raises(UserError, match=r"Rule\.tau=.* from 0 to 1"):
        Rule("confadapt", tau=tau)
