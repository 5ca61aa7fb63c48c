"""The loss of a standalone model: online self-distillation at regions (Kirchenbauer et al. 2026, arXiv:2602.06019).

`model/heads/standalone.py` says what a region is. The student is the model that is trained. The teacher is a frozen
copy of it from the start of the run. In every step, for a region with k predictions:

    student, with masks        a b c <M> <M>   predicts   y1 y2 y3      y: the student's most likely tokens
    teacher, with the tokens   a b c y1  y2    predicts   z1 z2 z3      z: the teacher's most likely tokens

    hard teacher    sum over j of -log P_student(z_j)
    soft teacher    sum over j of KL(P_teacher, P_student) at j
    no teacher      sum over j of -log P_student(token j of the text), "offline"

The loss is the mean of this over regions: prediction j has weight w_j / R, and R is the number of regions. So the
predictions far ahead, which fewer regions have, count less in all. The teacher has read the tokens that the student
itself predicted. So the student learns to make predictions that fit together. Text would teach each prediction the
mean over all continuations.

No gradient passes through y or the teacher. The teacher's parameters are in `params["teacher"]`: an argument of the
step, which is saved and sharded like other parameters, and takes their memory once more in the dtype of the
computation. The optimizer has no state for it. If only heads or adapters are trained, the trunk stands still, so it is
the teacher itself and there is no copy.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.losses.mtp import XENT, HeadSums, head_scale, head_sums
from mtp_jax.losses.xent import Teacher, XentSpec, token_argmax
from mtp_jax.model import mtp, trunk
from mtp_jax.model.heads import standalone
from mtp_jax.training.objectives.targets import ANCHORS, Batch, Targets


def scales(config: Config, weight_sum_M: jax.Array, w_M: jax.Array) -> jax.Array:
    """The factor on the sum of every head: w_m divided by the weights of its targets, or by those of all regions.

    Args:
      config: the run's config.
      weight_sum_M: sum of the weights of every head's targets, over the whole batch.
      w_M: weights of the heads.
    """
    regions = config.heads.facts.stands_alone
    return head_scale(jnp.full_like(weight_sum_M, weight_sum_M[0]) if regions else weight_sum_M, w_M)


def region_loss(
    config: Config, spec: XentSpec, params: dict, batch: Batch, targets: Targets, scale_M: jax.Array
) -> tuple[jax.Array, HeadSums]:
    """The micro-batch's share of the loss, and its sums by prediction. With a teacher, the sums measure against its
    most likely tokens.

    Args:
      config, spec: static options.
      params: parameters, with those of the teacher.
      batch: the micro-batch, with the regions that `drawn` added.
      targets: `at_regions`.
      scale_M: `scales` of the whole batch.
    """
    # Regions are not split over devices as positions are.
    spec = dataclasses.replace(spec, length_axes=(), learn_table=config.train.learns(config.model.unembedding_path))
    rows = batch["tokens"], batch["positions"], batch["segment_ids"], batch[ANCHORS]
    with sharding.on_mesh(spec.mesh):
        full = mtp.with_constants(config.arch, params)
        hidden_MBXD = standalone.predictions(config.arch, full, *rows)
    table_VD = trunk.unembedding(config.arch, params)
    ids_MBX = targets.ids_MBT
    teacher = None
    if config.has_teacher:
        written_PBX = token_argmax(hidden_MBXD[:-1], table_VD, spec)
        frozen = params[mtp.TEACHER] if config.copies_teacher else _without_adapters(mtp.trunk_params(params))
        teacher = _taught(config, spec, frozen, rows, written_PBX)
        ids_MBX = token_argmax(*teacher, spec)
    soft = config.loss.teacher == "soft"
    options = dataclasses.replace(spec, mix=1.0 if soft else 0.0)
    weights_MBX = targets.weights_MBT
    scaled_MBX = weights_MBX * scale_M[:, None, None]
    wanted_MBX = weights_MBX != 0 if config.loss.skip else None
    xent = XENT[config.loss.impl]
    given = (ids_MBX, scaled_MBX, options, teacher if soft else None, wanted_MBX)
    found = xent(hidden_MBXD, table_VD, *given)
    return found.loss, head_sums(found.ce_MBT, found.rank_MBT, weights_MBX)


def _without_adapters(trunk_params: dict) -> dict:
    """The trunk as it was before training, if only adapters and heads are trained."""
    blocks = {name: tree for name, tree in trunk_params["blocks"].items() if name != "lora"}
    return trunk_params | {"blocks": blocks}


def _taught(config: Config, spec: XentSpec, params: dict, rows: tuple, written_PBX: jax.Array) -> Teacher:
    """The teacher's states for every prediction, after the tokens that the student predicted before it."""
    params = jax.lax.stop_gradient(params)
    with sharding.on_mesh(spec.mesh):
        full = trunk.with_constants(config.arch, params) | {"heads": {}}
        hidden_MBXD = standalone.predictions(config.arch, full, *rows, written_PBX)
    return Teacher(hidden_MBXD, trunk.unembedding(config.arch, params))
