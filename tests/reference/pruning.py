"""Slow greedy pruning, and shortened texts scored whole."""

import itertools

import numpy as np


def slow_prune(score, protected, target_len):
    """The deleted positions in order, from the definition: of all shorter subsequences that keep what is protected, the
    one with the highest score; of equal scores the one without the earliest position."""
    chain = tuple(range(len(protected)))
    order = []
    while len(chain) > target_len:
        shorter = itertools.combinations(chain, len(chain) - 1)
        allowed = [kept for kept in shorter if {i for i in chain if protected[i]} <= set(kept)]
        best = max(allowed, key=lambda kept: (score(kept), -missing(chain, kept)))
        order.append(missing(chain, best))
        chain = best
    return order


def missing(chain, kept):
    """The position that one chain has and the other lacks."""
    return next(iter(set(chain) - set(kept)))


def from_masks(score):
    """A function of sets of positions as a function of masks."""
    return lambda keep_BT: np.array([score(tuple(np.flatnonzero(keep_T).tolist())) for keep_T in keep_BT])


def value(logprob, kept, part, mean):
    """J from the log-probabilities of all scored tokens of a text, `kept` of which belong to the chain."""
    chain, answer = logprob[:kept], logprob[kept:]
    if part == "answer":
        return sum(answer) / (len(answer) if mean else 1)
    if not mean:
        return sum(chain) + sum(answer)
    return sum(chain) / max(len(chain), 1) + sum(answer) / len(answer)
