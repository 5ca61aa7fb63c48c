"""Which kind of heads drafts best for a checkpoint? All kinds learn from the same text, for the same number of steps.

    python benchmarks/head_kinds.py ACCELERATED DATA OUT [--steps 50] [--kinds ...]

ACCELERATED is a finished workdir of `mtp accelerate`. All kinds use its text and the states that it kept. DATA is the
same as for `real_checkpoint.py`. OUT keeps the runs; a run that exists already is not trained again. The model answers
the prompts greedily, and the heads draft at every position of every answer. Tokens per round are counted as if every
round verified all drafts: for heads alone, and for heads with lookup by the rule of `decode/drafters.py`.

`markov` is not a family of the package. It is medusa heads with a bias of rank 128 that depends on the token before
(DSpark's `W2 W1[token]`, here from the token's embedding and through the shared unembedding).
"""

import argparse
import dataclasses
import pathlib
import pickle
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from draft_odds import COUNT, TILE, answers, drafted
from real_checkpoint import KINDS
from reporting import RESULTS, Report

import mtp_jax
from mtp_jax.axes import EMBED, LAYERS
from mtp_jax.config import FamilyFacts, from_json, override
from mtp_jax.decode.drafters import better
from mtp_jax.model import heads
from mtp_jax.model.heads import base, medusa
from mtp_jax.runs.workdir import STATES

RANK = 128
CHAINED = {"norm": "own", "init": "random", "attention": False}
VARIANTS: dict[str, dict[str, Any]] = {
    "recursive, 3 depths": {"kind": "recursive", "num_future": 4} | CHAINED,
    "sequential, 2 depths": {"kind": "sequential", "num_future": 3} | CHAINED,
    "sequential, 3 depths": {"kind": "sequential", "num_future": 4} | CHAINED,
    "medusa, 3 heads": {"kind": "medusa", "num_future": 4, "norm": "own"},
    "markov, 3 heads": {"kind": "markov", "num_future": 4, "norm": "own"},
}


def markov_init(arch: mtp_jax.Arch, key: jax.Array, trunk: Any) -> Any:
    """Medusa's layers, and two small matrices per head; the second starts at zero."""
    down_key, up_key = jax.random.split(jax.random.fold_in(key, 1))
    D = arch.model.d_model
    count = base.sets(arch)
    down = base.weight(arch, down_key, (count, D, RANK), (LAYERS, EMBED, None), gain=D**0.5)
    up = base.weight(arch, up_key, (count, RANK, D), (LAYERS, None, EMBED), gain=0.0)
    return medusa.init(arch, key, trunk) | {"down": down, "up": up}


def markov_train(arch: mtp_jax.Arch, params: Any, rows: base.Rows) -> jax.Array:
    """States [M-1, B, T, D]: head m reads the state at t and the token at t + m."""
    states_MBTD = medusa.train(arch, params, rows)
    biases = []
    for head in range(len(states_MBTD)):
        ahead_BTD = jnp.roll(rows.embedded_BTD, -(head + 1), axis=1)  # what runs over the end has no target
        biases.append(ahead_BTD @ params["heads"]["down"][head] @ params["heads"]["up"][head])
    return states_MBTD + jnp.stack(biases)


def markov_draft(arch: mtp_jax.Arch, params: Any, cache: tuple, now: base.Round) -> tuple[tuple, tuple]:
    """One draft after the other: each reads the one before."""
    token_B1 = jnp.take_along_axis(now.tokens_BS, now.total_B[:, None] - 1, axis=1)
    tap_B1D = base.at_index(now.tap_BQD, now.index_B)
    drafts = []
    for head in range(now.count):
        state_B1D = tap_B1D
        for layer in params["heads"]["residual"][head * arch.heads.layers : (head + 1) * arch.heads.layers]:
            state_B1D = medusa._layer(state_B1D, layer)
        bias_B1D = now.embed(token_B1) @ params["heads"]["down"][head] @ params["heads"]["up"][head]
        drafts.append(now.propose(state_B1D + bias_B1D, head + 1))
        token_B1 = drafts[-1].tokens_BP
    return tuple(drafts), cache


def trained(source: pathlib.Path, out: pathlib.Path, settings: dict[str, Any], steps: int) -> mtp_jax.LoadedModel:
    """The model with heads of one kind."""
    config = from_json((source / "heads" / "config.json").read_text(encoding="utf-8"))
    shared = {name: getattr(config.heads, name) for name in ("tap", "draft_vocab")}
    config = dataclasses.replace(config, heads=mtp_jax.HeadsConfig(**shared | settings))
    out.mkdir(parents=True, exist_ok=True)
    if not (out / STATES).exists():
        (out / STATES).symlink_to((source / "heads" / STATES).absolute())
    result = mtp_jax.train(override(config, {"train.steps": steps, "train.checkpoint_every": steps}), out)
    if not result.finished:
        raise SystemExit(130)
    return mtp_jax.load(out)


def kept_answers(lm: mtp_jax.LoadedModel, args: argparse.Namespace) -> dict:
    """`answers`, from a file if they are there already."""
    path = args.out / "answers.pkl"
    if not path.is_file():
        path.write_bytes(pickle.dumps(answers(lm, args)))
    return pickle.loads(path.read_bytes())


def rounds(new: list[int], drafts_TP: np.ndarray) -> int:
    """Rounds that an answer takes behind its first token."""
    at = count = 0
    depths = drafts_TP.shape[1]
    ended = [-1] * depths  # behind the last token no draft is right
    while at < len(drafts_TP):
        said = np.array([*new, *ended][at + 1 : at + 1 + depths])
        at += 1 + int(np.cumprod(drafts_TP[at] == said).sum())
        count += 1
    return count


def main() -> None:
    """Trains, counts and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("accelerated", type=pathlib.Path)
    parser.add_argument("data", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--kinds", nargs="*", default=list(VARIANTS))
    parser.add_argument("--skip", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    settings = ("tap", "tap_norm", "init", "layers")
    functions = types.SimpleNamespace(
        init=markov_init, train=markov_train, init_cache=lambda *_: (), draft=markov_draft
    )
    heads.register("markov", FamilyFacts(settings=settings, chains_tokens=True), functions)
    rows = []
    for name in args.kinds:
        lm = trained(args.accelerated, args.out / name.replace(", ", "-").replace(" ", ""), VARIANTS[name], args.steps)
        made = kept_answers(lm, args)
        rows.append((name, *measured(lm, made, args.new_tokens)))
        print(*rows[-1], sep=" | ", flush=True)
    note = f"{args.steps} steps each, {args.prompts} prompts of each kind of text, {args.new_tokens} greedy tokens."
    columns = ["heads", "parameters"]
    for kind in KINDS:
        columns += [f"{kind}, heads", f"{kind}, with lookup"]
    Report("Kinds of heads, trained alike", columns, rows, note).publish(args.results, jax.devices()[0].device_kind)


def measured(lm: mtp_jax.LoadedModel, made: dict, new_tokens: int) -> list[str]:
    """Parameters, and by kind of text tokens per round of heads alone and with lookup."""
    draft_count = min(COUNT, lm.config.num_draft)

    def both(params: Any, ids_S: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_BP, sure_BP, found_BP, matched_B = drafted(lm, params, ids_S, first, new_tokens - 1, draft_count)
        mixed = better(mtp_jax.Drafts(tokens_BP, sure_BP=sure_BP), found_BP, matched_B, 0.0)
        return tokens_BP, mixed.tokens_BP

    run = jax.jit(both)
    size = sum(leaf.size for leaf in jax.tree.leaves(lm.params["heads"]))
    cells = [f"{size / 1e6:.2f}M"]
    for answers_of_kind in made.values():
        taken = np.zeros(2)
        for ids, new in answers_of_kind:
            whole = [*ids, *new]
            padded = jnp.asarray(whole + [0] * (-len(whole) % TILE), jnp.int32)
            for side, drafts in enumerate(run(lm.decode_params, padded, len(ids))):
                taken[side] += rounds(list(new), np.asarray(drafts))
        cells += [f"{per_round:.2f}" for per_round in len(answers_of_kind) * (new_tokens - 1) / taken]
    return cells


if __name__ == "__main__":
    main()
