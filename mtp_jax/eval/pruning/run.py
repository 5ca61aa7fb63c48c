"""Prunes the chains of a file, one after the other. A run that was killed goes on behind the last whole chain.

The deletions are kept in `deletions.jsonl`, a line per chain. The first line says what they were made from; with
anything else the file is not continued.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mtp_jax.errors import UserError
from mtp_jax.eval.kept import append, open_kept
from mtp_jax.eval.pruning.chains import Chain, Form
from mtp_jax.eval.pruning.greedy import Pruned, Screen, greedy_prune
from mtp_jax.eval.pruning.scorer import ChainScorer, Objective
from mtp_jax.loading import LoadedModel

FIELDS = {"line": int, "order": list, "deleted_step": list, "trace": list, "seconds": float}
"""What a line of the file must have."""


@dataclasses.dataclass(frozen=True)
class Pruning:
    """How chains are pruned."""

    keep: float = 0.5
    """Share of the tokens of a chain to keep, rounded up. Protected tokens always stay."""
    objective: Objective = dataclasses.field(default_factory=Objective)
    block: int = 1
    """Tokens that a step deletes. 1 is exact greedy search."""
    screen: int = 0
    """Number of tokens that a step scores; 0 scores all. They are chosen by their surprisal, see `screen_of`."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise UserError(f"keep={self.keep}; it must be at least 0 and below 1")
        if self.block < 1:
            raise UserError(f"block={self.block}; a step deletes at least 1 token")
        if self.screen < 0:
            raise UserError(f"screen={self.screen}; give 1 or more tokens, or 0 to score all")

    def target(self, protected: np.ndarray) -> int:
        """Number of tokens that are kept."""
        return max(math.ceil(self.keep * len(protected)), int(protected.sum()))


def screen_of(scorer: ChainScorer, count: int, objective: Objective) -> Screen:
    """The screen by surprisal, -ln p of a token after the kept tokens before it.

    For the answer alone it takes the most predictable tokens, because what the model expects tells it little. If the
    chain counts too, it takes the least predictable ones, because the sum rises by their surprisal when they go.

    Args:
      scorer: the scorer of the chain.
      count: tokens that a step scores.
      objective: the objective of the scorer.
    """
    sign = 1 if objective.part == "answer" else -1
    return Screen(count, lambda keep_T: sign * scorer.surprisal(keep_T))


def prune_chain(lm: LoadedModel, chain: Chain, how: Pruning) -> Pruned:
    """Prunes one chain; see `greedy.greedy_prune`."""
    scorer = ChainScorer(lm, chain.ids, how.objective)
    screen = screen_of(scorer, how.screen, how.objective) if how.screen else None
    return greedy_prune(scorer, chain.protected, how.target(chain.protected), block=how.block, screen=screen)


def prune_chains(
    lm: LoadedModel,
    chains: Sequence[Chain],
    how: Pruning,
    path: pathlib.Path,
    *,
    made_from: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
) -> list[tuple[Pruned, float]]:
    """Prunes all chains that `path` does not have yet.

    Args:
      lm: the model; it may be one that only decodes.
      chains: the chains.
      how: how they are pruned.
      path: the file for the deletions.
      made_from: what identifies the work besides `how` and the chains: the model, the form of the texts.
      progress: is called with a line of text about the progress.

    Returns:
      For each chain its deletions, and the seconds that they took.

    Raises:
      UserError: `path` has deletions that were made from something else, or cannot be read or written.
    """
    header = json.loads(json.dumps({"made_from": made_from | dataclasses.asdict(how) | {"chains": _digest(chains)}}))
    done = open_kept(path, header, FIELDS, ("line",), "deletions")
    if done:
        progress(f"{path} has {len(done)} of {len(chains)} chains")
    for number, chain in enumerate(chains, start=1):
        key = (chain.record.line,)
        if key in done:
            continue
        began = time.perf_counter()
        pruned = prune_chain(lm, chain, how)
        seconds = time.perf_counter() - began
        done[key] = {
            "line": chain.record.line,
            "order": pruned.order.tolist(),
            "deleted_step": pruned.step.tolist(),
            "trace": pruned.trace.tolist(),
            "seconds": seconds,
        }
        append(path, [done[key]])
        kept = f"{int(pruned.keep.sum())} of {len(pruned.keep)} tokens kept"
        progress(f"chain {number} of {len(chains)}: {kept}, {pruned.trace[0]:.2f} to {pruned.trace[-1]:.2f} nats")
    records = [done[(chain.record.line,)] for chain in chains]
    return [(_pruned(one), one["seconds"]) for one in records]


def made_from_form(form: Form) -> dict[str, Any]:
    """What identifies the texts of chains, for `made_from`."""
    return {"form": dataclasses.asdict(form)}


def _pruned(record: dict[str, Any]) -> Pruned:
    order, step = (np.array(record[name], np.int64) for name in ("order", "deleted_step"))
    return Pruned(order, step, np.array(record["trace"]))


def _digest(chains: Sequence[Chain]) -> str:
    """A digest of the chains as tokens, with what is protected."""
    told = [[chain.record.line, *chain.ids, chain.protected.tolist()] for chain in chains]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
