"""A run to start reinforcement from, and rewards that need no skill, for tests of reinforcement."""

import dataclasses
import functools
import json
import pathlib

import jax
from reference.tiny import run_config

from mtp_jax.config import Config, to_json
from mtp_jax.data.tokenize import bytes_tokenizer
from mtp_jax.model import mtp
from mtp_jax.rl.update import compile_policy_steps
from mtp_jax.runs.checkpoint import Checkpoints
from mtp_jax.training.state import TrainState

VERIFIERS = """
def even(answer, record):
    return float(sum(map(ord, answer)) % 2 == 0)

def same(answer, record):
    return 0.5

def fails(answer, record):
    raise ValueError("no")
"""
"""Rewards: by the characters of the response, the same for all, and one that fails."""


class Nowhere:
    """The position in data that a run without data has."""

    def get_state(self):
        return {}


def write_start(directory: pathlib.Path, seed: int = 0, **sections) -> pathlib.Path:
    """A run with random parameters, as `mtp train` leaves it."""
    config = run_config(**sections)
    params = jax.jit(functools.partial(mtp.init, config.arch))(jax.random.key(seed))
    # With a larger unembedding, tokens differ in their probabilities as those of a trained model do.
    params["embed"]["table"] = 3 * params["embed"]["table"]
    (directory / "data").mkdir(parents=True)
    (directory / "config.json").write_text(to_json(config))
    bytes_tokenizer().save(directory / "data" / "tokenizer.json")
    with Checkpoints(directory, 1, print) as checkpoints:
        checkpoints.save(0, TrainState(jax.numpy.zeros((), jax.numpy.int32), params, {}), Nowhere())
    return directory


def write_task(path: pathlib.Path, count: int = 12) -> pathlib.Path:
    """A task of short questions."""
    lines = [json.dumps({"prompt": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_verifiers(path: pathlib.Path) -> pathlib.Path:
    """A file with the functions in `VERIFIERS`."""
    path.write_text(VERIFIERS)
    return path


@functools.lru_cache(maxsize=8)
def _compiled(config, mesh):
    return compile_policy_steps(config, mesh)


def shared_policy_steps(config, mesh):
    """`compile_policy_steps`, once for all runs that differ in their task, their length, or what they log and save."""
    plain = Config()
    kept = ("batch_size", "grad_accum", "trainable", "seed")
    train = dataclasses.replace(plain.train, **{name: getattr(config.train, name) for name in kept})
    rl = dataclasses.replace(config.rl, task="x", reward="number", refills=0, draft="auto", formats="", eval_task="")
    decode = dataclasses.replace(plain.decode, prompt_tokens=1, max_new_tokens=2)
    return _compiled(dataclasses.replace(config, train=train, rl=rl, decode=decode), mesh)
