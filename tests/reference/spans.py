"""Span measures computed one span and one token at a time, from `lm.logits`."""

import math

import numpy as np


def log_probs(lm, rows):
    """`{(head, position in the stream): log-probabilities [V]}` at every position that has a token after it in its row
    and document; each piece of a document stands alone in its row."""
    found = {}
    for r in range(len(rows)):
        row = rows[r]
        for segment in range(1, row["segment_ids"].max() + 1):
            places = np.flatnonzero(row["segment_ids"] == segment)
            padded = np.pad(row["tokens"][places], (0, rows.seq_len - len(places)))
            logits_MTV = np.asarray(lm.logits(padded[None]), np.float64)[:, 0]
            for m, t in np.ndindex(len(logits_MTV), len(places)):
                if t + 1 + m < len(places):
                    z_V = logits_MTV[m, t]
                    top = z_V.max()
                    at = r * (rows.seq_len - 1) + int(places[t])
                    found[m, at] = z_V - top - math.log(np.exp(z_V - top).sum())
    return found


def slow_spans(log_p, tokens, spans, num_heads):
    """The figures of `span_metrics` over all spans [(start, length, characters)], as plain numbers."""
    kept = [one for one in spans if all((0, one[0] - 1 + k) in log_p for k in range(one[1]))]
    nlls = []
    exact = []
    gaps = []
    commitments = []
    by_heads = []
    profile = {}
    covered = set()
    for start, length, _ in kept:
        own = [-log_p[0, start - 1 + k][tokens[start + k]] for k in range(length)]
        nlls.append(sum(own))
        exact.append(all(log_p[0, start - 1 + k].argmax() == tokens[start + k] for k in range(length)))
        covered |= {start - 1 + k for k in range(length)}
        for k in range(length):
            chances = np.exp(log_p[0, start - 1 + k])
            profile.setdefault(k, []).append((own[k], -(chances * log_p[0, start - 1 + k]).sum()))
        if 2 <= length <= num_heads and all((k, start - 1) in log_p for k in range(length)):
            at_start = [-log_p[k, start - 1][tokens[start + k]] for k in range(length)]
            gaps.append(sum(at_start) - sum(own))
            commitments += [math.exp(-one) for one in at_start[1:]]
            by_heads.append(all(log_p[k, start - 1].argmax() == tokens[start + k] for k in range(length)))
    outside = [-log_p[0, t][tokens[t + 1]] for head, t in log_p if head == 0 and t not in covered]
    return {
        "fertility": np.mean([length for _, length, _ in kept]),
        "bits_per_character": sum(nlls) / math.log(2) / sum(characters for *_, characters in kept),
        "exact": np.mean(exact),
        "drawn": np.mean(np.exp(-np.array(nlls))),
        "joint_gap": np.mean(gaps),
        "commitment": np.mean(commitments),
        "exact_heads": np.mean(by_heads),
        "profile": [np.mean(profile[k], axis=0) for k in sorted(profile)],
        "outside": np.mean(outside),
        "spans": len(kept),
    }
