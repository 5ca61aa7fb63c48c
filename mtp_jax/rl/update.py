"""The optimizer step of reinforcement: the policy learns from rollouts, its heads from the same tokens.

The step is that of training (`training.step`) with another objective: head 0 has no next-token loss, and the policy
loss is a term. So micro-batches, meshes, adapters and frozen parts work as they do there. The extra heads learn their
own loss on the rollouts (`rl.head_loss`). It reads states without gradient, and its gradients are clipped apart, so
that the policy is the same bit for bit, whatever the heads learn.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.errors import UserError
from mtp_jax.losses.entropy import EntropyWeights
from mtp_jax.losses.logprobs import token_scores
from mtp_jax.losses.policy import REPORTS, Drawn, PolicyLoss, learned_shares, policy_loss, token_shares
from mtp_jax.losses.targets import ahead, make_targets
from mtp_jax.losses.xent import XentSpec
from mtp_jax.model import lora, trunk
from mtp_jax.training.objectives import Batch, Objective, Seen, Term, hidden_states, random_draws, xent_spec
from mtp_jax.training.state import TrainState
from mtp_jax.training.step import StepMetrics, compile_objective, over_micros

SHARES = "token_shares"
LEARNED = "learned_shares"
"""Names of the arrays that a step adds to its batch: `token_shares`, and `learned_shares` if they are known for the
whole batch. Both stand at the position that predicts the token."""
DRAWS = "token_draws"
"""Random numbers for tokens that are selected at random, likewise."""
ROWS = ("tokens", "segment_ids", "positions", "weights")
"""The arrays of a batch that log-probabilities are computed from."""


class PolicySteps(NamedTuple):
    """The compiled functions of a run, and the shardings of their arguments."""

    init: Callable[[jax.Array], TrainState]
    """`(key) -> state`."""
    update: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    """`(state, batch) -> (state, metrics)`: one optimizer step. The state is donated. `batch` has the arrays of
    `RolloutBatch`. `metrics.extras` has `policy_loss`, `entropy` (mean over all tokens), `entropy_kept` (mean over
    the tokens that the surrogate learns from) and the reports of `losses.policy.policy_loss`."""
    logprobs: Callable[[dict, Batch], tuple[jax.Array, jax.Array]]
    """`(params, batch) -> (logprobs [B, T], entropies [B, T])` of the tokens with weight, at `rl.temperature`, each at
    the position of its token; 0 elsewhere. The batch needs the arrays `ROWS`. The parameters may be others than those
    of the state, such as those of a reference, and need no heads."""
    abstract_state: TrainState
    """Shapes, dtypes and shardings of the state."""
    batch_sharding: dict[str, NamedSharding]
    """The sharding of every array of a batch."""


def policy_options(config: Config) -> PolicyLoss:
    """The options of the policy loss that the `rl` section asks for."""
    rl = config.rl
    entropy = EntropyWeights(
        mode=rl.entropy,
        fraction=rl.entropy_fraction,
        normaliser=rl.entropy_normaliser,
        selection=rl.entropy_selection,
        scope=rl.entropy_scope,
    )
    return PolicyLoss(
        clip_low=rl.clip_low,
        clip_high=rl.clip_high,
        dual_clip=rl.dual_clip,
        normaliser=rl.normaliser,
        kl=rl.kl,
        temperature=rl.temperature,
        entropy=entropy,
    )


def compile_policy_steps(config: Config, mesh: Mesh) -> PolicySteps:
    """Binds the static arguments of the steps and jits them.

    Args:
      config: a config with an `rl` section.
      mesh: the devices of the run.

    Raises:
      UserError: the config asks for no reinforcement, or its adapters have dropout.
    """
    if not config.rl.task:
        raise UserError("rl.task is empty, so there is no policy to update; name a task")
    if config.lora.dropout:
        raise UserError(
            f"lora.dropout={config.lora.dropout} with rl.task={config.rl.task!r}: a step would compare the policy with "
            "dropout to the policy without it that drew the tokens; use dropout=0"
        )
    options = policy_options(config)
    share = functools.partial(_policy_share, options)
    reports = (*REPORTS, "entropy", "entropy_kept")
    objective = Objective(
        terms={"policy_loss": Term(1.0, share, reports)},
        apart=config.rl.head_loss,
        prepare=functools.partial(_prepared, options),
        finish=_finished,
    )
    rows = _shardings(config, mesh)
    steps = compile_objective(config, mesh, objective, rows)
    spec = xent_spec(config, mesh)
    scored = jax.jit(
        functools.partial(_scored, config, spec),
        in_shardings=(None, {name: rows[name] for name in ROWS}),  # None: wherever the parameters are
    )

    def logprobs(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return scored(params, {name: batch[name] for name in ROWS})

    return PolicySteps(steps.init, steps.train, logprobs, steps.abstract_state, rows)


def _shardings(config: Config, mesh: Mesh) -> dict[str, NamedSharding]:
    rows = sharding.batch_sharding(mesh)
    names = (*ROWS, "logprobs", "entropies", *(("reference",) if config.rl.kl else ()))
    of_rows = NamedSharding(mesh, PartitionSpec(rows.spec[0]))
    return dict.fromkeys(names, rows) | {"advantages": of_rows}


def _prepared(
    options: PolicyLoss, config: Config, spec: XentSpec, params: dict, step: jax.Array, batch: Batch
) -> Batch:
    """The batch with the shares of its tokens in the loss, which depend on all micro-batches."""
    shares_BT = token_shares(options, _weights(batch))
    batch = batch | {SHARES: shares_BT}
    entropy = options.entropy
    if not entropy.active:
        return batch | {LEARNED: shares_BT}
    if entropy.mode == "random":
        batch = batch | {DRAWS: random_draws(config.train.seed, step, shares_BT.shape)}
    if entropy.scope == "microbatch" or config.train.grad_accum == 1:
        return batch
    entropies_BT = batch[DRAWS] if entropy.mode == "random" else _scores(config, spec, params, batch)[1]
    return batch | {LEARNED: learned_shares(options, entropies_BT, shares_BT)}


def _weights(batch: Batch) -> jax.Array:
    """The weight of the token after each position."""
    return make_targets(batch["tokens"], batch["segment_ids"], 1, batch["weights"])[1][0]


def _policy_share(options: PolicyLoss, seen: Seen) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The micro-batch's share of the policy loss and of its reports."""
    batch = seen.batch
    shares_BT = batch[SHARES]
    learn_table = seen.config.train.learns(seen.config.model.unembedding_path)
    spec = dataclasses.replace(seen.spec, learn_table=learn_table)
    logprobs_BT, entropies_BT = _of_states(seen.config, spec, seen.params, seen.hidden_MBTD, batch, shares_BT)
    if LEARNED in batch:
        learned_BT = batch[LEARNED]
    else:
        learned_BT = learned_shares(options, batch.get(DRAWS, entropies_BT), shares_BT)
    reference_BT = ahead(batch["reference"], 1) if options.kl else None
    drawn = Drawn(ahead(batch["logprobs"], 1), batch["advantages"], reference_BT)
    loss, reports = policy_loss(options, logprobs_BT, drawn, shares_BT, learned_BT)
    reports["entropy"] = jnp.sum(shares_BT * entropies_BT)
    reports["entropy_kept"] = jnp.sum(shares_BT * (learned_BT > 0) * entropies_BT)
    return loss, reports


def _finished(extras: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The reports with the mean entropy of the kept tokens; 0 if none are kept."""
    kept = extras["kept"]
    return extras | {"entropy_kept": extras["entropy_kept"] / jnp.where(kept > 0, kept, 1)}


def _of_states(
    config: Config, spec: XentSpec, params: dict, hidden_MBTD: jax.Array, batch: Batch, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies of the tokens after each position. With `loss.skip` they are 0 at tokens without
    weight."""
    spec = dataclasses.replace(spec, temperature=config.rl.temperature)
    targets_1BT = ahead(batch["tokens"], 1)[None]
    table_VD = trunk.unembedding(config.arch, params)
    wanted_1BT = weights_BT[None] != 0 if config.loss.skip else None
    scores = token_scores(hidden_MBTD[:1], table_VD, targets_1BT, spec, config.loss.impl, wanted_1BT)
    return scores.logprobs_MBT[0], scores.entropies_MBT[0]


def _scores(config: Config, spec: XentSpec, params: dict, batch: Batch) -> jax.Array:
    """Log-probabilities and entropies [2, B, T] of the tokens after each position, micro-batch by micro-batch."""
    attached = lora.attached(params, config.lora)
    params = {name: tree for name, tree in attached.items() if name != "heads"}

    def of_micro(batch: Batch) -> jax.Array:
        hidden_1BTD = hidden_states(config, spec, params, batch)
        return jnp.stack(_of_states(config, spec, params, hidden_1BTD, batch, _weights(batch)))

    rows = {name: batch[name] for name in ROWS}
    return jax.lax.stop_gradient(over_micros(config.train.grad_accum, rows, of_micro))


def _scored(config: Config, spec: XentSpec, params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities and entropies [B, T], each at the position of its token; 0 at tokens without weight."""
    scores_XBT = jnp.where(_weights(batch)[None] != 0, _scores(config, spec, params, batch), 0)
    return tuple(jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0))) for x_BT in scores_XBT)
