"""The model's distributions after many continuations of a row: a tree of tokens behind the row's last token.

    row          a b c                     depth 0 is c, the last token of the row
    depth 1            x1       x2         tokens that may follow
    depth 2          y1  y2   y1  y3       tokens that may follow those

A path is the tokens from depth 1 to a node. To visit a node is to run the model over its token, at the slot of its
depth. The visit overwrites what another path has left there, as a round does with rejected drafts. So no cache is
copied from path to path. The nodes of depth 2, in order:

    visit        x1       y1       y2       x2       y1       y3
    slots 2 3 4  c x1 .   c x1 y1  c x1 y2  c x2 .   c x2 y1  c x2 y3      x1 and x2 are visited again on the way

A lane is one row of the batch. A row of the caller has one lane, or several lanes that share its nodes. Each of these
has a copy of the cache of the row. The host plans the visits of a level from the distributions of the level before.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Arch
from mtp_jax.decode import buckets, engine, sampling
from mtp_jax.decode.drafters import NONE, make_drafter
from mtp_jax.decode.memory import check_cache_fits
from mtp_jax.decode.options import Options
from mtp_jax.decode.request import Model
from mtp_jax.decode.state import DecodeState, Plan, grow, slots_needed, slots_of
from mtp_jax.decode.verify import EXACT, Rule
from mtp_jax.errors import UserError
from mtp_jax.model import mtp, trunk
from mtp_jax.runs.programs import bounded

LANES = 64
"""Most lanes that run together."""
LANE_BYTES = 2**31
"""Most bytes of the caches of the lanes that run together, unless one lane needs more."""


@dataclasses.dataclass(frozen=True)
class Branching:
    """The shape of the tree."""

    offset: int
    """Number of levels: the last one predicts the token `offset` behind the last token of the row."""
    top_k: int
    """Number of tokens that follow each node: the most probable ones."""
    most: int | None = None
    """Most nodes of a level: the most probable paths. None keeps all."""

    def nodes(self, depth: int) -> int:
        """Number of nodes at a depth."""
        every = self.top_k**depth
        return every if self.most is None else min(every, self.most)


class Distributions(NamedTuple):
    """What follows every row. m = 0 is the next token, and m the token m + 1 behind the last token of the row."""

    probs_MBV: np.ndarray
    """Sum over the nodes at depth m of (probability of the path) * (distribution after the path); float32."""
    covered_MB: np.ndarray
    """Sum of the probabilities of these paths, at most 1. It is also the sum of `probs_MBV` over the vocabulary."""
    heads_MBV: np.ndarray | None
    """The distributions of the extra heads for m = 1, 2, ..., if they were asked for. They read the row alone: a head
    that reads tokens behind the row reads the greedy drafts of the heads before it."""


def distributions(
    model: Model, ids: Sequence[Sequence[int]], branching: Branching, *, heads: bool = False
) -> Distributions:
    """The distributions at all offsets 1..`branching.offset` behind every row.

    Args:
      model: a loaded model.
      ids: rows of token ids, of any lengths.
      branching: the shape of the tree.
      heads: whether to compute `heads_MBV`. The heads must be able to draft.
    """
    drafter = make_drafter("heads", model.arch) if heads else NONE
    # Under this rule, greedy drafts come with the whole distribution of each head.
    plan = Plan(model.arch, drafter, sampling.GREEDY, Rule("confidence") if heads else EXACT)
    padded = buckets.padded(max(map(len, ids)), engine.CHUNK)
    slots = slots_needed(padded + branching.offset, drafter.num_draft)
    most_lanes = min(max(LANE_BYTES // _lane_bytes(model.arch, slots), 1), LANES)
    groups = -(-len(ids) // most_lanes)
    rows = -(-len(ids) // groups)
    check_cache_fits(plan, rows, slots)
    lanes = min(most_lanes // rows, branching.nodes(branching.offset - 1))
    parts = []
    for start in range(0, len(ids), rows):
        given = [list(row) for row in ids[start : start + rows]]
        filled = given + given[-1:] * (rows - len(given))  # every group has the same shape, and so one program
        state = _prefill(model, plan, filled, padded, slots)
        heads_BPV = np.asarray(state.drafts.probs_BPV)[: len(given)] if heads else None
        part = _one_group(model, state, filled, len(given), lanes, branching)
        parts.append(part._replace(heads_MBV=heads_BPV if heads_BPV is None else heads_BPV.swapaxes(0, 1)))
    joined = [None if arrays[0] is None else np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
    return Distributions(*joined)


def _lane_bytes(arch: Arch, slots: int) -> int:
    caches = jax.eval_shape(lambda: trunk.init_caches(arch, 1, slots))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))


def _prefill(model: Model, plan: Plan, ids: list[list[int]], padded: int, slots: int) -> DecodeState:
    """The state of the engine after the rows: the caches, and the drafts of the heads."""
    length_B = np.array([len(row) for row in ids], np.int32)
    prompt_BT = buckets.padded_rows(ids, len(ids), padded)
    controls = Options().controls(len(ids), model.arch.model.vocab_size)
    arrays = jax.device_put((length_B, length_B + 1, np.zeros((0,), np.int32)))
    state = engine.prefill(plan, slots, model.decode_params, controls, prompt_BT, *arrays)
    failed_B = np.asarray(state.failed_B)
    if failed_B.any():
        raise UserError(f"row {int(failed_B.argmax())}: the logits hold NaN; check the checkpoint's parameters")
    return state if slots_of(state) >= slots else grow(state, slots)


class Paths(NamedTuple):
    """The nodes of one level of one row, in the order of their tokens."""

    tokens_JX: np.ndarray
    """The tokens of the path to each node, [nodes, depth]."""
    mass_J: np.ndarray
    """The probability of each path, float64."""


ROOT = Paths(np.zeros((1, 0), np.int32), np.ones((1,)))


class Visits(NamedTuple):
    """The visits of every lane in order, [X, B] each."""

    tokens_XB: np.ndarray
    depth_XB: np.ndarray
    weight_XB: np.ndarray
    """The probability of the node; 0 if the visit only leads to another node."""


def _one_group(
    model: Model, state: DecodeState, ids: list[list[int]], real: int, lanes: int, branching: Branching
) -> Distributions:
    """`distributions` of rows that run together. The rows from `real` on only fill up the batch."""
    caches = _copies(lanes, state.caches)
    last_B = jax.device_put(np.repeat(np.array([len(row) - 1 for row in ids], np.int32), lanes))
    steps = max(depth * -(-branching.nodes(depth) // lanes) for depth in range(branching.offset))
    visit = functools.partial(visit_nodes, model.arch, branching.top_k, model.decode_params)
    paths = [ROOT] * real
    probs = []
    covered = []
    for depth in range(branching.offset):
        visits, count, where = plan_visits(paths, [row[-1] for row in ids], lanes, max(steps, 1))
        given = jax.device_put((visits, np.int32(count)))
        caches, sums_BV, top = visit(caches, last_B, *given)
        probs.append(np.asarray(sums_BV).reshape(len(ids), lanes, -1).sum(axis=1)[:real])
        covered.append([one.mass_J.sum() for one in paths])
        if depth + 1 < branching.offset:
            ids_XBW, probs_XBW = jax.device_get(top)
            most = branching.nodes(depth + 1)
            paths = [_children(*pair, ids_XBW, probs_XBW, most) for pair in zip(paths, where, strict=True)]
    return Distributions(np.stack(probs), np.array(covered, np.float32), None)


def _children(
    paths: Paths, where: tuple[np.ndarray, np.ndarray], ids_XBW: np.ndarray, probs_XBW: np.ndarray, most: int
) -> Paths:
    """The paths of the next level: each path with each of its most probable tokens; the `most` most probable ones."""
    ids_JW = ids_XBW[where]
    width = ids_JW.shape[1]
    mass_J = (paths.mass_J[:, None] * probs_XBW[where]).ravel()
    tokens_JX = np.concatenate([np.repeat(paths.tokens_JX, width, axis=0), ids_JW.reshape(-1, 1)], axis=1)
    kept = np.argsort(-mass_J, kind="stable")[:most]
    in_order = kept[np.lexsort(tokens_JX[kept].T[::-1])]
    return Paths(tokens_JX[in_order], mass_J[in_order])


def plan_visits(
    paths: Sequence[Paths], last: Sequence[int], lanes: int, steps: int
) -> tuple[Visits, int, list[tuple[np.ndarray, np.ndarray]]]:
    """Plans the visits of one level.

    Args:
      paths: the nodes of every row. Further rows of the batch have none.
      last: the last token of every row of the batch.
      lanes: lanes per row.
      steps: number of visits for which there is room.

    Returns:
      The visits; the number of visits of the lane with most of them; and for every row, the visit and the lane of each
      node, as indices of [X, B].
    """
    shape = (steps, len(last) * lanes)
    # A lane with nothing to do runs the last token of its row again. That changes nothing.
    visits = Visits(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.float32))
    visits.tokens_XB[:] = np.repeat(np.array(last, np.int32), lanes)[None]
    longest = 1
    where = []
    for row, (tokens_JX, mass_J) in enumerate(paths):
        at_J = np.zeros(len(mass_J), np.int64)
        lane_J = np.zeros(len(mass_J), np.int64)
        for part, nodes in enumerate(np.array_split(np.arange(len(mass_J)), lanes)):
            lane = row * lanes + part
            at_J[nodes], used = _walk(visits, lane, tokens_JX[nodes], mass_J[nodes])
            lane_J[nodes] = lane
            longest = max(longest, used)
        where.append((at_J, lane_J))
    return visits, longest, where


def _walk(visits: Visits, lane: int, tokens_JX: np.ndarray, mass_J: np.ndarray) -> tuple[np.ndarray, int]:
    """Writes the visits of one lane: every node, and before it those nodes above it that are not in the cache. Returns
    the visit of each node, and the number of visits."""
    depth = tokens_JX.shape[1]
    at_J = np.zeros(len(mass_J), np.int64)
    used = 0
    before_X = np.full(depth, -1)
    for node, (tokens_X, mass) in enumerate(zip(tokens_JX, mass_J, strict=True)):
        differs = np.flatnonzero(tokens_X != before_X)
        first = differs[0] if len(differs) else max(depth - 1, 0)
        for place in range(first, depth):
            visits.tokens_XB[used, lane] = tokens_X[place]
            visits.depth_XB[used, lane] = place + 1
            used += 1
        used += depth == 0  # the root is the last token of the row, which is there already
        visits.weight_XB[used - 1, lane] = mass
        at_J[node] = used - 1
        before_X = tokens_X
    return at_J, used


@bounded(statics=(0,))
def _copies(lanes: int, caches: Any) -> Any:
    """The caches with `lanes` copies of every row."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, lanes, axis=0), caches)


@bounded(statics=(0, 1), donate=(3,), weights=2)
def visit_nodes(
    arch: Arch, width: int, params: Any, caches: Any, last_B: jax.Array, visits: Visits, count: jax.Array
) -> tuple[Any, jax.Array, tuple[jax.Array, jax.Array]]:
    """Runs the first `count` visits of every lane.

    Args:
      arch: the model.
      width: number of tokens to return after each visit.
      params: a `mtp.decode_view`.
      caches: the caches of all lanes. They are donated.
      last_B: position of the last token of the row of each lane, which is depth 0.
      visits: the visits.
      count: number of visits.

    Returns:
      The caches; the sum over the visits of weight * distribution, [B, V] in float32; and after each visit the most
      probable tokens and their probabilities, [X, B, W] each.
    """
    steps, B = visits.tokens_XB.shape

    def one(step: jax.Array, carry: tuple) -> tuple:
        caches, sums_BV, ids_XBW, probs_XBW = carry
        at_B = last_B + visits.depth_XB[step]
        state_B1D, _, caches, _ = mtp.decode_forward(arch, params, visits.tokens_XB[step][:, None], at_B, caches)
        logits_B1V = trunk.logits(arch, params, trunk.final_norm(arch, params, state_B1D))
        probs_BV = jax.nn.softmax(logits_B1V[:, 0], axis=-1)
        sums_BV += visits.weight_XB[step][:, None] * probs_BV
        top_BW, ids_BW = jax.lax.top_k(probs_BV, width)
        return caches, sums_BV, ids_XBW.at[step].set(ids_BW), probs_XBW.at[step].set(top_BW)

    empty_XBW = jnp.zeros((steps, B, width))
    sums_BV = jnp.zeros((B, arch.model.vocab_size))
    start = (caches, sums_BV, empty_XBW.astype(jnp.int32), empty_XBW)
    caches, sums_BV, ids_XBW, probs_XBW = jax.lax.fori_loop(0, count, one, start)
    return caches, sums_BV, (ids_XBW, probs_XBW)
