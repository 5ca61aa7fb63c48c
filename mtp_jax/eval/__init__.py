"""Evaluation of a trained model: held-out loss by head, acceptance, speed, tasks, and a report.

The names below are imported when they are first used, so that importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_jax.eval.inference.estimates import maj_at_k as maj_at_k
    from mtp_jax.eval.inference.estimates import pass_at_k as pass_at_k
    from mtp_jax.eval.inference.ledger import TokenLedger as TokenLedger
    from mtp_jax.eval.inference.ledger import pareto_front as pareto_front
    from mtp_jax.eval.inference.scorers import best_of_n as best_of_n
    from mtp_jax.eval.inference.votes import majority_vote as majority_vote

_HOMES = {
    "pass_at_k": "estimates",
    "maj_at_k": "estimates",
    "majority_vote": "votes",
    "best_of_n": "scorers",
    "TokenLedger": "ledger",
    "pareto_front": "ledger",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtp_jax.eval' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mtp_jax.eval.inference.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
