"""The chosen width has the most tokens per second; what is chosen never changes a token. Each docstring names the line
whose deletion breaks the test."""

import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, model, plain, scripted, with_script
from reference.tiers import sampled

from mtp_jax.decode import adaptive
from mtp_jax.decode.adaptive import BLOCK, WidthChooser, widths
from mtp_jax.decode.generate import generate


def histogram(accept_B, width, num_draft=4):
    """A block in which every draft of a row is right with the row's probability, as expected counts."""
    rows = [[a**k * (1 - a) for k in range(width)] + [a**width] + [0.0] * (num_draft - width) for a in accept_B]
    return np.array(rows) * BLOCK


def run(chooser, accept_B, costs, blocks, remaining_B=(100,)):
    """The widths chosen over some blocks."""
    chosen = []
    for _ in range(blocks):
        width = chooser.choose(np.array(remaining_B))
        chooser.record(width, histogram(accept_B, width), costs[width] * BLOCK)
        chosen.append(width)
    return chosen


def test_widths():
    """None, half and all."""
    assert [widths(n) for n in (1, 2, 3, 4, 8)] == [(0, 1), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 4, 8)]


@pytest.mark.parametrize(
    ("accept", "costs", "best"),
    [
        (0.9, {0: 1.0, 2: 1.2, 4: 1.4}, 4),  # 2.71 / 1.2 < 4.10 / 1.4
        (0.5, {0: 1.0, 2: 1.2, 4: 1.6}, 2),  # 1.75 / 1.2 > 1.94 / 1.6 > 1
        (0.1, {0: 1.0, 2: 1.2, 4: 1.4}, 0),  # 1.11 / 1.2 < 1
        (0.9, {0: 1.0, 2: 3.0, 4: 5.0}, 0),  # a wider round costs as much as it brings
    ],
)
def test_takes_what_pays(accept, costs, best):
    """argmax of (1 + a_1 + ... + a_w) / c_w for one row. Breaks without the costs, the product of acceptances, or width
    0."""
    assert run(WidthChooser(4, 1, {}), [accept], costs, 6)[-1] == best


def test_the_slowest_row_decides():
    """A batch is done when its last row is: rows that accept everything do not pay for one that accepts nothing, unless
    they have much further to go. Breaks with a mean over rows, or without `remaining_B`."""
    costs = {0: 1.0, 2: 1.5, 4: 2.0}
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 100))[-1] == 0
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 10))[-1] == 4
    assert run(WidthChooser(4, 3, {}), [0.95, 0.95, 0.0], costs, 6, (100, 100, 0))[-1] == 4


def test_a_first_block_does_not_tell_the_cost():
    """A width is tried again until it has been timed. Breaks when a compilation counts as the cost of a round."""
    chooser, tried = WidthChooser(4, 1, {}), []
    for seconds in (None, None, 8.0, None, 9.6, 16.0):
        tried.append(chooser.choose(np.array([100])))
        chooser.record(tried[-1], histogram([0.1], tried[-1]), seconds)
    assert tried == [4, 0, 0, 2, 2, 4]
    assert chooser.costs == pytest.approx({4: 2.0, 0: 1.0, 2: 1.2})
    assert chooser.choose(np.array([100])) == 0


def test_blocks_grow_while_nothing_changes():
    """8, 16, 32, 64, 64 rounds, and 8 again with another width."""
    chooser, lengths = WidthChooser(4, 1, {0: 1.0, 2: 1.2, 4: 1.4}), []
    for _ in range(6):
        width = chooser.choose(np.array([100]))
        lengths.append((width, chooser.rounds))
        chooser.record(width, histogram([0.95], width), None)
    assert lengths == [(4, n) for n in (8, 16, 32, 64, 64, 64)]
    chooser.record(4, 30 * histogram([0.0], 4), None)
    assert chooser.choose(np.array([100])) == 0 and chooser.rounds == 8


def test_follows_a_change():
    """Acceptance that falls is left within a few blocks; one that comes back is found again by a probe."""
    chooser, costs = WidthChooser(4, 1, {}), {0: 1.0, 2: 1.2, 4: 1.4}
    assert run(chooser, [0.95], costs, 8)[-1] == 4
    fallen = run(chooser, [0.0], costs, 30)
    assert not any(fallen[12:16]) and chooser.hopeless
    assert run(chooser, [0.95], costs, 60)[-1] == 4 and not chooser.hopeless


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(["random", "trained"], "trained", others="slow"))
@pytest.mark.parametrize("draft", ["heads", "lookup"])
def test_changes_nothing(name, draft):
    """auto = reference, through every width."""
    adaptive.COSTS.clear()
    result = generate(model(name), PROMPTS, max_new_tokens=44, draft=draft, num_draft="auto")
    assert [row[:NEW] for row in result.tokens] == [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert result.tokens == generate(model(name), PROMPTS, max_new_tokens=44, draft="none").tokens


@pytest.mark.grid
def test_stops_hopeless_drafts(monkeypatch):
    """Drafts that are always wrong are soon not verified any more, and `drafted` counts what was. Breaks when a width
    is compiled in but never chosen."""
    monkeypatch.setattr(adaptive, "BLOCK", 1)
    adaptive.COSTS.clear()
    lm = with_script(model("random"), [[*p, *plain("random", p)] for p in PROMPTS], np.zeros((4, 60), int))
    stats = generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(3), num_draft="auto").stats
    assert stats.histogram == (4 * (NEW - 1), 0, 0, 0)
    assert stats.drafted < 3 * stats.rounds
    assert stats.draft_accept_rate == 0
