"""The chosen width has the most tokens per second; what is chosen never changes a token. Each docstring names the line
whose deletion breaks the test."""

import numpy as np
import pytest
from reference.decoding import NEW, PROMPTS, model, plain, scripted, with_script

from mtp_jax.decode import generate as module
from mtp_jax.decode.adaptive import BLOCK, WidthChooser, widths
from mtp_jax.decode.generate import generate


def histogram(accept, num_draft, rounds=BLOCK):
    """Rounds in which every draft is right with probability `accept`, as expected counts."""
    shares = [accept**k * (1 - accept) for k in range(num_draft)] + [accept**num_draft]
    return np.pad(np.array(shares) * rounds, (0, 8 - num_draft))


def settle(accept, costs, num_draft=4, blocks=12):
    """The width after some blocks of the given acceptance and seconds per round."""
    chooser = WidthChooser(8, {}) if num_draft == 8 else WidthChooser(num_draft, {})
    for _ in range(blocks):
        width = chooser.choose()
        counted = histogram(accept, width)[: num_draft + 1]
        chooser.record(width, counted, costs[width] * BLOCK, BLOCK)
    return chooser.choose()


def test_widths():
    """None, half and all."""
    assert [widths(n) for n in (1, 2, 3, 4, 8)] == [(0, 1), (0, 1, 2), (0, 2, 3), (0, 2, 4), (0, 4, 8)]


@pytest.mark.parametrize(
    ("accept", "costs", "best"),
    [
        (0.9, {0: 1.0, 2: 1.2, 4: 1.4}, 4),  # 2.71 / 1.2 < 4.10 / 1.4
        (0.5, {0: 1.0, 2: 1.2, 4: 1.6}, 2),  # 1.75 / 1.2 > 1.94 / 1.6 > 1
        (0.1, {0: 1.0, 2: 1.2, 4: 1.4}, 0),  # 1.11 / 1.2 < 1
        (0.9, {0: 1.0, 2: 3.0, 4: 5.0}, 0),  # a batch in which a wider round costs as much as it brings
    ],
)
def test_takes_what_pays(accept, costs, best):
    """argmax of (1 + a_1 + ... + a_w) / c_w. Breaks without the costs, the product of acceptances, or width 0."""
    assert settle(accept, costs) == best


def test_follows_a_change():
    """Acceptance that falls is left within a few blocks; one that comes back is found again by a probe."""
    chooser, costs = WidthChooser(4, {}), {0: 1.0, 2: 1.2, 4: 1.4}

    def run(accept, blocks):
        chosen = []
        for _ in range(blocks):
            width = chooser.choose()
            chooser.record(width, histogram(accept, width)[:5], costs[width] * BLOCK, BLOCK)
            chosen.append(width)
        return chosen

    assert run(0.95, 8)[-1] == 4
    fallen = run(0.0, 30)
    assert fallen[6:14].count(0) >= 7 and fallen.count(4) <= 7
    assert run(0.95, 60)[-1] == 4


@pytest.mark.parametrize("name", ["random", "trained"])
@pytest.mark.parametrize("draft", ["heads", "lookup"])
def test_changes_nothing(name, draft):
    """auto = reference, through every width."""
    module._COSTS.clear()
    result = generate(model(name), PROMPTS, max_new_tokens=44, draft=draft, num_draft="auto")
    assert [row[:NEW] for row in result.tokens] == [plain(name, prompt)[:NEW] for prompt in PROMPTS]
    assert result.tokens == generate(model(name), PROMPTS, max_new_tokens=44, draft="none").tokens


def test_stops_hopeless_drafts(monkeypatch):
    """Drafts that are always wrong are soon not verified any more, and `drafted` counts what was. Breaks when a width
    is compiled in but never chosen."""
    monkeypatch.setattr(module, "BLOCK", 2)
    module._COSTS.clear()
    lm = with_script(model("random"), [[*p, *plain("random", p)] for p in PROMPTS], np.zeros((4, 60), int))
    stats = generate(lm, PROMPTS, max_new_tokens=NEW, draft=scripted(3), num_draft="auto").stats
    assert stats.histogram == (4 * (NEW - 1), 0, 0, 0)
    assert stats.drafted < 3 * stats.rounds
    assert stats.draft_accept_rate == 0
