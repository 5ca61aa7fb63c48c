"""The metrics of a step: what the rollouts say, what the updates say, and the line that is shown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.config import Config
from mtp_jax.rl.rollouts import Group, Rolled

SHOWN = {
    "reward": "reward {:.3f}",
    "right": "right {:.0%}",
    "response_tokens": "{:.1f} tokens",
    "entropy": "entropy {:.3f}",
    "tokens_per_round": "{:.2f} tokens/round",
    "rollout_seconds": "rollout {:.1f} s",
    "reward_seconds": "reward {:.1f} s",
    "update_seconds": "update {:.1f} s",
}
"""The metrics in a line of progress, with their form."""


def of_rollouts(config: Config, rolled: Rolled) -> dict[str, Any]:
    """What the rollouts of a step say. Figures of rewards and responses are of the first round of prompts, because the
    groups that replace others are chosen by their rewards.

        reward            mean over all responses; 1 is the most
        reward_within     standard deviation of the rewards of a group, mean over groups
        reward_between    standard deviation of the mean rewards of the groups
        right             share of the responses that are right
        mixed             share of the groups in which some are right and some are wrong
        response_tokens   mean number of tokens of a response
        cut               share of the responses that were ended by rl.max_new_tokens
        entropy           mean entropy of the policy at the tokens of the responses, in nats
        refills           rounds of further prompts
        without_signal    groups of the batch that do not count, because no round replaced them
        verifier_failed   responses on which the verifier failed
        tokens_per_round, accept_at    as in `DecodeStats`, over all rounds of prompts
    """
    groups = rolled.first
    rewards_GN = np.array([[one.value for one in group.scored] for group in groups])
    tokens = _flat(groups, "tokens")
    record = {
        "reward": float(rewards_GN.mean()),
        "reward_within": float(rewards_GN.std(axis=1).mean()),
        "reward_between": float(rewards_GN.mean(axis=1).std()),
        "right": float(np.mean([one.right for one in _flat(groups, "scored")])),
        "mixed": float(np.mean([group.mixed for group in groups])),
        "response_tokens": float(np.mean([len(one) for one in tokens])),
        "cut": float(np.mean(_flat(groups, "cut"))),
        "entropy": float(np.mean(np.concatenate(_flat(groups, "entropies")))),
        "refills": rolled.rounds,
        "without_signal": len(rolled.counted) - sum(rolled.counted),
        "verifier_failed": sum(rolled.failures.values()),
        "tokens_per_round": rolled.stats.tokens_per_round,
    }
    return record | ({"accept_at": rolled.stats.accept_at} if rolled.stats.accept_at else {})


def _flat(groups: Sequence[Group], name: str) -> list[Any]:
    return [one for group in groups for one in getattr(group, name)]


def mean_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The metrics of the updates of a step: means over updates. A value that an update lacks is nan and left out, such
    as a loss of heads where no token counts."""
    values = {name: np.ma.masked_invalid([one[name] for one in metrics]) for name in metrics[0]}
    return {name: np.ma.filled(found_U.mean(axis=0), np.nan).tolist() for name, found_U in values.items()}


def status(record: Mapping[str, Any]) -> str:
    """A step in a line."""
    return "  ".join(form.format(record[name]) for name, form in SHOWN.items())
