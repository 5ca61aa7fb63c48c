"""The objective of shortened chains, from the caches of a shared row, is that of the shortened texts scored whole. Each
docstring names the line whose deletion breaks the test."""

import numpy as np
import pytest
from reference.decoding import CONFIG, compilations, model
from reference.pruning import slow_prune, value

import mtp_jax
from mtp_jax.errors import UserError
from mtp_jax.eval.pruning import scorer as scoring
from mtp_jax.eval.pruning.greedy import Screen, greedy_prune, without
from mtp_jax.eval.pruning.run import screen_of
from mtp_jax.eval.pruning.scorer import ChainScorer, Ids, Objective

LONGEST = CONFIG.model.max_seq_len
OBJECTIVES = [Objective(part, mean) for part in ("answer", "all") for mean in (False, True)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Chunks of 4 tokens and batches of up to 4 rows, so that short chains have several of both."""
    monkeypatch.setattr(scoring, "CHUNK", 4)
    monkeypatch.setattr(scoring, "ROWS", (4, 1))
    monkeypatch.setattr(scoring, "LEAST_WANTED", 2)


def drawn(prompt, chain, answer, seed=0):
    """Random parts of these lengths. The chain repeats some tokens, so that some deletions leave equal texts."""
    rng = np.random.default_rng(seed)
    return Ids(*(rng.integers(0, 40, count).tolist() for count in (prompt, chain - chain // 3, answer)))._replace(
        chain=[token for token in rng.integers(0, 40, chain - chain // 3).tolist() for _ in (0, 1)][:chain]
    )


def whole(ids, keep_BT, objective):
    """J by `mtp_jax.score` of every shortened text, token by token: one call scores all prefixes."""
    found = []
    for keep_T in keep_BT:
        kept = [token for token, is_kept in zip(ids.chain, keep_T, strict=True) if is_kept]
        behind = [*kept, *ids.answer]
        before = [[*ids.prompt, *behind[:at]] for at in range(len(behind))]
        scores = mtp_jax.score(model("random"), before, [[token] for token in behind])
        logprob = [one.logprob for one in scores]
        found.append(value(logprob, len(kept), objective.part, objective.mean))
    return np.array(found)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: f"{one.part}-{one.mean}")
def test_every_single_deletion_is_the_shortened_text(objective):
    """J(S without i) = that of the shortened ids, scored from the beginning, to 1e-5: for every i of the whole chain,
    and again after deletions at the beginning, in the middle and at the end, which move the base. Breaks with `same` in
    place of `same - 1`, without `old.logprob[:same]`, or if `start_B` is one number for all rows."""
    ids = drawn(5, 11, 3)
    scorer = ChainScorer(model("random"), ids, objective)
    keep_T = np.ones(11, bool)
    for gone in ([], [0], [6], [10], [1, 2]):
        keep_T[gone] = False
        keep_BT = without(keep_T, np.flatnonzero(keep_T))
        np.testing.assert_allclose(scorer(keep_BT), whole(ids, keep_BT, objective), rtol=1e-5, atol=1e-5)


def test_any_masks_in_any_order():
    """Masks that share little, a mask of all tokens and one of none, in one call and alone, after others. Breaks if a
    base is taken that a row does not begin with."""
    ids = drawn(1, 9, 2, seed=1)
    scorer = ChainScorer(model("random"), ids, Objective("all"))
    keep_BT = np.random.default_rng(0).random((7, 9)) < 0.5
    keep_BT[3] = True
    keep_BT[4] = False
    expected = whole(ids, keep_BT, Objective("all"))
    np.testing.assert_allclose(scorer(keep_BT), expected, rtol=1e-5, atol=1e-5)
    alone = [scorer(keep_BT[b : b + 1])[0] for b in (4, 0, 3, 6)]
    np.testing.assert_allclose(alone, expected[[4, 0, 3, 6]], rtol=1e-5, atol=1e-5)


def test_greedy_pruning_of_a_model():
    """Greedy pruning with the scorer is brute force over whole texts. Breaks with anything wrong above, or if a score
    belongs to another candidate."""
    ids = drawn(3, 6, 2, seed=2)
    objective = Objective("all", mean=True)
    protected = np.array([False, True, False, False, False, False])

    def slow(kept):
        return whole(ids, np.isin(np.arange(6), kept)[None], objective)[0]

    found = greedy_prune(ChainScorer(model("random"), ids, objective), protected, 2)
    assert found.order.tolist() == slow_prune(slow, protected, 2)


def test_surprisal():
    """surprisal = -ln p of each kept token after the kept tokens before it. The screen of the answer takes the smallest
    ones, and that of everything the largest. Breaks without `-` or `sign`."""
    ids = drawn(4, 6, 2, seed=3)
    scorer = ChainScorer(model("random"), ids, Objective("all"))
    keep_T = np.array([True, True, False, True, True, True])
    kept = [ids.chain[i] for i in np.flatnonzero(keep_T)]
    before = [[*ids.prompt, *kept[:at]] for at in range(5)]
    expected = [-one.logprob for one in mtp_jax.score(model("random"), before, [[token] for token in kept])]
    found = scorer.surprisal(keep_T)
    np.testing.assert_allclose(found[keep_T], expected, rtol=1e-5, atol=1e-5)
    assert np.isnan(found[2])
    for part, sign in (("answer", 1), ("all", -1)):
        screen = screen_of(scorer, 3, Objective(part))
        assert isinstance(screen, Screen) and screen.count == 3
        np.testing.assert_allclose(screen.first(keep_T)[keep_T], sign * np.array(expected), rtol=1e-5, atol=1e-5)


def test_number_of_programs():
    """Chains of other lengths compile nothing, as long as the caches have the same number of slots. Breaks if the
    number of rows or of tokens of a call depends on the chain."""
    for part in ("all", "answer"):
        greedy_prune(ChainScorer(model("random"), drawn(3, 12, 3), Objective(part)), np.zeros(12, bool), 0)
    with compilations() as compiled:
        for prompt, chain, answer in ((9, 5, 2), (4, 17, 4), (1, 14, 3)):
            ids = drawn(prompt, chain, answer, seed=4)
            for part in ("all", "answer"):
                greedy_prune(ChainScorer(model("random"), ids, Objective(part)), np.zeros(chain, bool), chain - 3)
    assert compiled == []


def test_the_prompt_runs_once(monkeypatch):
    """A step runs no token of the prompt again, and of a candidate only what follows its deletion. Breaks without
    `_common` in `_rebase`, or with `same = 1` in `__call__`."""
    ids = Ids(list(range(20)), list(range(20, 30)), [1, 2])
    scorer = ChainScorer(model("random"), ids, Objective("all"))
    scorer(np.ones((1, 10), bool))
    # In chunks of 4: 19 tokens before the last one of the prompt, and that one with all but the last of the rest.
    assert scorer.tokens == 20 + 12
    starts = []
    inner = ChainScorer._run

    def watched(self, caches, rows, first, wanted):
        starts.append((sorted(first), [len(row) for row in rows]))
        return inner(self, caches, rows, first, wanted)

    monkeypatch.setattr(ChainScorer, "_run", watched)
    scorer(without(np.ones(10, bool), np.arange(10)))
    assert starts[0] == ([31], [32])  # the base again: nothing to run
    assert sorted(at for first, _ in starts[1:] for at in first)[:10] == list(range(19, 29))


REFUSED = {
    "no prompt": (([], [1], [2]), "the prompt has no token"),
    "no chain": (([1], [], [2]), "the chain has no token"),
    "no answer": (([1], [2], []), "the answer has no token"),
    "outside": (([1], [2, 99], [3]), r"the chain holds token id 99; the vocabulary is 0\.\.39"),
    "too long": (
        ([1], [2] * LONGEST, [3]),
        f"question, chain and answer have {LONGEST + 2} tokens, and at most model.max_seq_len",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    """Each is one line; a text of max_seq_len + 1 tokens is scored. Breaks without its check."""
    parts, message = REFUSED[name]
    with pytest.raises(UserError, match=f"^{message}"):
        ChainScorer(model("random"), Ids(*parts), Objective())


def test_the_longest_text():
    """A text of max_seq_len + 1 tokens is scored, with the last chunk behind its end. Breaks without `+ CHUNK` for the
    slots."""
    ids = drawn(30, LONGEST - 31, 2, seed=5)
    keep_BT = without(np.ones(LONGEST - 31, bool), np.array([0, LONGEST - 32]))
    found = ChainScorer(model("random"), ids, Objective())(keep_BT)
    np.testing.assert_allclose(found, whole(ids, keep_BT, Objective()), rtol=1e-5, atol=1e-5)


def test_an_objective_that_is_none():
    """Breaks without the check of `Objective`."""
    with pytest.raises(UserError, match=r"Objective\.part='chain'; it must be 'answer' or 'all'"):
        Objective("chain")
