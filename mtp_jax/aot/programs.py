"""Traces and compiles the real programs of a run, the train step and a round of decoding, without any array.

A run of reinforcement has an update step in place of the train step, and rounds that decode its responses. While these
run, the training state stays in memory.
"""

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mtp_jax import axes, sharding
from mtp_jax.config import Config
from mtp_jax.decode.drafters import make_drafter
from mtp_jax.decode.engine import decode_rounds
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan, empty_state, slots_needed
from mtp_jax.model import lora, mtp
from mtp_jax.model.cache import LayerCache
from mtp_jax.rl.update import compile_policy_steps
from mtp_jax.training.objectives import batch_targets, drawn, total_loss, xent_spec
from mtp_jax.training.state import joined, split_params
from mtp_jax.training.step import compile_steps


class Program(NamedTuple):
    """A program before it is compiled."""

    name: str
    traced: jax.stages.Traced
    lowered: jax.stages.Lowered
    arguments: dict[str, Any]
    """The arguments of the program by kind, as shapes with shardings."""
    kept: int
    """Bytes, over all devices, that the forward pass keeps for the backward pass; 0 if it is not known."""
    beside: Any = ()
    """Arrays that stay in memory while the program runs, as shapes with shardings."""


ROLLOUT = "rollout round"
ROUNDS = ("decode round", ROLLOUT)
"""Names of the programs that are a loop over rounds."""


class Compiled(NamedTuple):
    """The result of compiling a program."""

    executable: jax.stages.Compiled | None
    """None if the program does not fit into the memory of the devices."""
    error: str
    """The compiler's message in that case."""
    seconds: float


def train_step(config: Config, mesh: Mesh) -> Program:
    """The step of `mtp train` with `loss.skip` off: with it on, the loop of the loss has no fixed length, and its
    operations could not be counted."""
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, skip=False))
    steps = compile_steps(config, mesh)
    batch = abstract_batch(config, steps.batch_sharding)
    with jax.set_mesh(mesh):
        traced = steps.train.trace(steps.abstract_state, batch)
        lowered = traced.lower()
        kept = _kept(config, mesh, steps.abstract_state.params, batch)
    state = steps.abstract_state
    arguments = {"parameters": state.params, "optimizer": (state.opt_state, state.step), "batch": batch}
    return Program("train step", traced, lowered, arguments, kept)


def abstract_batch(config: Config, where: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the run, as shapes."""
    shape = (config.train.batch_size, config.data.seq_len)
    array_BT = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)
    learn = ("learn",) if config.data.prompt_tokens else ()
    return dict.fromkeys(("tokens", "segment_ids", "positions", *learn), array_BT)


def _kept(config: Config, mesh: Mesh, params: Any, batch: dict) -> int:
    """Bytes that differentiation keeps from the forward pass for the backward pass, without parameters."""
    rows = config.train.batch_size // config.train.grad_accum
    learned, rest = split_params(config, params)
    spec = xent_spec(config, mesh)

    def residuals(learned: Any, rest: Any, batch: dict) -> Any:
        batch = drawn(config, jnp.int32(0), batch)
        targets = batch_targets(config, joined(learned, rest), batch)
        scale_M = jnp.ones((config.heads.num_future,), jnp.float32)

        def loss(learned: Any) -> Any:
            params = lora.attached(joined(learned, rest), config.lora)
            return total_loss(config, spec, params, batch, targets, targets.weights_MBT[0], scale_M)

        return jax.vjp(loss, learned, has_aux=True)[1]

    micro = {name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype) for name, leaf in batch.items()}
    leaves = jax.tree.leaves(jax.eval_shape(residuals, learned, rest, micro))

    def has_rows(leaf: jax.Array) -> bool:
        return rows in leaf.shape and config.data.seq_len in leaf.shape

    return sum(_size(leaf) for leaf in leaves if has_rows(leaf))


def update_step(config: Config, mesh: Mesh) -> Program:
    """The optimizer step of `mtp rl`, with `loss.skip` off as in `train_step`."""
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, skip=False))
    steps = compile_policy_steps(config, mesh)
    batch = abstract_rollouts(config, steps.batch_sharding)
    with jax.set_mesh(mesh):
        traced = steps.update.trace(steps.abstract_state, batch)
        lowered = traced.lower()
    state = steps.abstract_state
    arguments = {"parameters": state.params, "optimizer": (state.opt_state, state.step), "batch": batch}
    return Program("update step", traced, lowered, arguments, 0)


def abstract_rollouts(config: Config, where: dict[str, jax.sharding.Sharding]) -> dict[str, jax.ShapeDtypeStruct]:
    """The rollouts of an optimizer step, as shapes. `where` has the sharding of every array."""
    shape = (config.train.batch_size, config.data.seq_len)
    whole = ("tokens", "segment_ids", "positions")

    def array(name: str) -> jax.ShapeDtypeStruct:
        dtype = jnp.int32 if name in whole else jnp.float32
        return jax.ShapeDtypeStruct(shape[:1] if name == "advantages" else shape, dtype, sharding=where[name])

    return {name: array(name) for name in where}


def rollout_round(config: Config, mesh: Mesh) -> Program:
    """A round in which `mtp rl` decodes all responses of a step, next to the training state."""
    rl = config.rl
    options = Options(temperature=rl.temperature, logprobs=0, logprobs_tempered=rl.temperature != 1)
    drafts = config.num_draft if rl.draft in ("auto", "heads") else 0
    program = _round(ROLLOUT, config, mesh, (rl.rows, config.data.seq_len, drafts), options)
    return program._replace(beside=compile_policy_steps(config, mesh).abstract_state)


def decode_round(config: Config, mesh: Mesh, rows: int, tokens: int) -> Program:
    """A round of `generate` in which all heads draft.

    Args:
      config: the run's config.
      mesh: the devices that hold the parameters.
      rows: number of prompts that are decoded together.
      tokens: number of tokens of prompt and output together; the caches have room for this many.
    """
    return _round("decode round", config, mesh, (rows, tokens, config.num_draft), Options())


def _round(name: str, config: Config, mesh: Mesh, sizes: tuple[int, int, int], options: Options) -> Program:
    """A round of decoding. `sizes` are the rows, the tokens of a row, and the drafts of the heads."""
    rows, tokens, drafts = sizes
    drafter = make_drafter("heads" if drafts else "none", config.arch, drafts)
    records = (options.logprobs, options.logprobs_tempered)
    plan = Plan(config.arch, drafter, options.sampler(), options.rule(), (), *records)
    vocab = config.model.vocab_size
    params = decode_params(config, mesh)
    everywhere = sharding.replicated(mesh)
    controls = jax.eval_shape(lambda: options.controls(rows, vocab))
    one_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    ends = jax.ShapeDtypeStruct((1,), jnp.int32)
    slots = slots_needed(tokens, drafter.num_draft)
    prompt_BT = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    state = jax.eval_shape(functools.partial(empty_state, plan, slots, slots), prompt_BT, one_B, one_B, ends)
    state = place_state(mesh, state)

    def put(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: _placed(leaf, everywhere), tree)

    one = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    traced = decode_rounds.trace(plan, drafter.num_draft, params, put(controls), state, one)
    caches = (state.caches, state.drafter_cache)
    rest = (state._replace(caches=(), drafter_cache=()), put(controls), one)
    arguments = {"parameters": params, "caches": caches, "rows": rest}
    return Program(name, traced, traced.lower(), arguments, 0)


def decode_params(config: Config, mesh: Mesh) -> Any:
    """`LoadedModel.decode_params` of a model on this mesh, as shapes with shardings."""
    boxed = mtp.abstract(config.arch)
    stored = sharding.abstract_params(mesh, boxed)
    view = functools.partial(mtp.decode_view, config.arch)
    made = jax.jit(view).lower(stored).compile()
    return sharding.place_abstract(jax.eval_shape(view, stored), made.output_shardings)


def place_state(mesh: Mesh, state: Any) -> Any:
    """A decoding state with shardings as the partitioner chooses them: caches are split by key-value heads, and all
    other arrays are on every device."""

    def is_cache(node: Any) -> bool:
        return isinstance(node, LayerCache)

    by_heads = jax.sharding.NamedSharding(mesh, sharding.logical_spec((None, axes.KV_HEADS, None, None)))
    everywhere = sharding.replicated(mesh)

    def place(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
        return _placed(leaf, where)

    def of_node(node: Any) -> Any:
        return jax.tree.map(lambda leaf: place(leaf, by_heads), node) if is_cache(node) else place(node, everywhere)

    return jax.tree.map(of_node, state, is_leaf=is_cache)


def _placed(leaf: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def compile_program(program: Program) -> Compiled:
    """Compiles a program. If it does not fit into memory, the result says so. All other errors are raised."""
    began = time.perf_counter()
    try:
        executable = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled(None, str(error), time.perf_counter() - began)
    return Compiled(executable, "", time.perf_counter() - began)


def shard_bytes(tree: Any) -> int:
    """Bytes of the shards of a tree on one device."""

    def shard(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)

    return sum(_size(shard(leaf)) for leaf in jax.tree.leaves(tree))


def _size(leaf: Any) -> int:
    return leaf.size * leaf.dtype.itemsize
