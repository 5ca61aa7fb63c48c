"""Marginals by enumeration: every continuation is a row of its own, in float64, without a cache."""

import numpy as np

ROWS = 400
WIDTH = 8


def next_probs(lm, rows):
    """Head 0's distribution after the last token of each row, [rows, V], from the whole forward."""
    found = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        tokens_BT = np.zeros((ROWS, WIDTH), np.int32)
        for row_T, row in zip(tokens_BT, part, strict=False):
            row_T[: len(row)] = row
        logits_BTV = np.asarray(lm.logits(tokens_BT)[0], np.float64)
        z_BV = np.stack([logits_BTV[b, len(row) - 1] for b, row in enumerate(part)])
        found.append(np.exp(z_BV - z_BV.max(axis=1, keepdims=True)))
    weights_BV = np.concatenate(found)
    return weights_BV / weights_BV.sum(axis=1, keepdims=True)


def enumerated(lm, row, offset, top_k, most=None):
    """sum over paths of p(path) p(v | row, path), and sum over paths of p(path). Each path is followed by its `top_k`
    most probable tokens, and the `most` most probable paths of a level are kept."""
    paths = [(1.0, [])]
    for _ in range(offset - 1):
        probs_BV = next_probs(lm, [[*row, *path] for _, path in paths])
        longer = [
            (mass * probs_V[v], [*path, int(v)])
            for (mass, path), probs_V in zip(paths, probs_BV, strict=True)
            for v in np.argsort(-probs_V)[:top_k]
        ]
        paths = sorted(longer, key=lambda pair: -pair[0])[:most]
    mass_B = np.array([mass for mass, _ in paths])
    return mass_B @ next_probs(lm, [[*row, *path] for _, path in paths]), mass_B.sum()
