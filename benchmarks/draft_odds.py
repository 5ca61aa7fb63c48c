"""How often are drafts right, given how sure their drafter is? The numbers in `decode/drafters.py` come from here.

    python benchmarks/draft_odds.py smollm2 DATA [--skip 20] [--prompts 40] [--new-tokens 128]

DATA is the same as for `real_checkpoint.py`; the prompts used there are skipped. The model answers greedily. Then the
heads and lookup draft at every position of every answer, also where no round of decoding would begin. Each draft is
compared with the model's answer. The heads must not have caches (`heads.attention=False`).
"""

import argparse
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from real_checkpoint import KINDS, prompts_of
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.decode.drafters import LONGEST_MATCH, lookup
from mtp_jax.decode.prompts import prompt_ids
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp, trunk
from mtp_jax.model.heads import FAMILIES
from mtp_jax.model.heads.base import Round

BOUNDS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 0.95, 1.01)
TILE = 128
COUNT = 3


def drafted(lm: LoadedModel, params: Any, ids_S: jax.Array, first: jax.Array, new: int, count: int = COUNT) -> tuple:
    """After each of `new` tokens: the drafts of the heads, their probabilities, the drafts of lookup, and the number of
    tokens that lookup matched."""
    config = lm.config
    S = ids_S.shape[0]
    zero_B = jnp.zeros((1,), jnp.int32)
    tap_BQD = mtp.decode_forward(config.arch, params, ids_S[None], zero_B, trunk.init_caches(config.arch, 1, S))[1]
    at_T = first - 1 + jnp.arange(new)
    tokens_TS = jnp.broadcast_to(ids_S[None], (new, S))

    def propose(states_BPD: jax.Array, first: int) -> mtp_jax.Drafts:
        logits_BPV = mtp.draft_logits(config.arch, params, states_BPD, first)
        sure_BP = jnp.exp(logits_BPV.max(-1) - jax.nn.logsumexp(logits_BPV, axis=-1))
        return mtp_jax.Drafts(jnp.argmax(logits_BPV, axis=-1), sure_BP=sure_BP)

    def embed(ids: jax.Array) -> jax.Array:
        return trunk.embed(config.arch, params, ids)

    where = (at_T, jnp.zeros((new,), jnp.int32), jnp.ones((new,), bool), tokens_TS, at_T + 2)
    now = Round(tap_BQD[0][at_T][:, None], *where, count, embed, propose)
    pieces = FAMILIES[config.heads.kind].draft(config.arch, params, (), now)[0]
    drafts = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), *pieces)
    return drafts.tokens_BP, drafts.sure_BP, *lookup(tokens_TS, at_T + 2, count)


def answers(lm: LoadedModel, args: argparse.Namespace) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Token ids of prompts and of greedy answers, by kind of text; `args` has data, skip, prompts and new_tokens."""
    made = {}
    for kind in KINDS:
        prompts = prompts_of(args.data, kind, args.skip + args.prompts)[args.skip :]
        ids = [prompt_ids(lm, prompt, row) for row, prompt in enumerate(prompts)]
        new = mtp_jax.generate(lm, prompts, max_new_tokens=args.new_tokens, draft="none", ignore_eos=True).tokens
        made[kind] = list(zip(ids, new, strict=True))
        print(f"{kind}: {len(prompts)} prompts", flush=True)
    return made


def share(right: list[bool]) -> str:
    """The share of right drafts, and the number of drafts, as text."""
    return f"{np.mean(right):.2f} ({len(right):,})" if right else "-"


def main() -> None:
    """Counts right drafts and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    lm = mtp_jax.load(args.source, shipped_heads=True)
    if jax.tree.leaves(FAMILIES[lm.config.heads.kind].init_cache(lm.arch, 1, TILE, COUNT)):
        raise SystemExit(f"{args.source} has heads with caches; give a model with heads.attention=False")
    run = jax.jit(lambda params, ids_S, first: drafted(lm, params, ids_S, first, args.new_tokens - COUNT))
    by_sure: dict[int, list[bool]] = {}
    lookups: dict[tuple[str, int], list[bool]] = {}
    for answers_of_kind in answers(lm, args).values():
        for prompt, new in answers_of_kind:
            whole = [*prompt, *new]
            padded = jnp.asarray(whole + [0] * (-len(whole) % TILE), jnp.int32)
            count(new, [np.asarray(part) for part in run(lm.decode_params, padded, len(prompt))], by_sure, lookups)
    rows = [
        (f"head, p {low:.2f}-{min(high, 1):.2f}", share(by_sure.get(bucket, [])), "")
        for bucket, (low, high) in enumerate(itertools.pairwise(BOUNDS))
    ]
    for how in ("alone", "with heads", "against heads"):
        for matched in range(1, LONGEST_MATCH + 1):
            later = share(lookups.get(("next", matched), [])) if how == "alone" else ""
            rows.append((f"lookup {how}, {matched} matched", share(lookups.get((how, matched), [])), later))
    columns = ("drafter", "right (drafts)", "later tokens, if those before are right")
    notes = f"Prompts {args.skip} to {args.skip + args.prompts} of each kind, {args.new_tokens} greedy tokens each."
    Report(f"How often drafts are right: {args.source}", columns, rows, notes).publish(
        args.results, jax.devices()[0].device_kind
    )


def count(new: list[int], drafts: list[np.ndarray], by_sure: dict, lookups: dict) -> None:
    """Adds the counts of one answer. A draft counts only if all drafts before it were right."""
    heads_TP, sure_TP, found_TP, matched_T = drafts
    for t in range(len(heads_TP)):
        said = new[t + 1 : t + 1 + COUNT]
        for depth in range(COUNT):
            right = bool(heads_TP[t, depth] == said[depth])
            by_sure.setdefault(int(np.searchsorted(BOUNDS, sure_TP[t, depth], "right")) - 1, []).append(right)
            if not right:
                break
        matched = int(matched_T[t])
        how = "with heads" if found_TP[t, 0] == heads_TP[t, 0] else "against heads"
        first = bool(found_TP[t, 0] == said[0])
        lookups.setdefault((how, matched), []).append(first)
        lookups.setdefault(("alone", matched), []).append(first)
        for depth in range(1, COUNT):
            if found_TP[t, depth - 1] != said[depth - 1]:
                break
            lookups.setdefault(("next", matched), []).append(bool(found_TP[t, depth] == said[depth]))


if __name__ == "__main__":
    main()
