"""Training programs that tests share, so that runs of one shape are traced and compiled once in a process."""

import dataclasses
import functools

from mtp_jax.config import Config
from mtp_jax.training.step import compile_steps

PROGRAMS = ("batch_size", "grad_accum", "trainable", "heads_first", "seed")
"""Fields of `train` that a program is made from; `steps` is another where anything is scheduled."""


@functools.lru_cache(maxsize=12)
def _compiled(config, mesh):
    return compile_steps(config, mesh)


def shared_steps(config, mesh, terms=None):
    """`compile_steps`, once for all runs that differ in their text, their length, or what they log and save."""
    if terms:
        return compile_steps(config, mesh, terms)
    train = {name: getattr(config.train, name) for name in PROGRAMS}
    if config.optim.schedule != "constant" or config.loss.schedule != "constant" or config.loss.heads_per_step:
        train["steps"] = config.train.steps
    data = {name: getattr(config.data, name) for name in ("seq_len", "prompt_tokens")}
    plain = Config()
    settled = dataclasses.replace(
        config,
        train=dataclasses.replace(plain.train, **train),
        data=dataclasses.replace(plain.data, **data),
        decode=dataclasses.replace(plain.decode, prompt_tokens=1, max_new_tokens=2, num_draft=config.decode.num_draft),
    )
    return _compiled(settled, mesh)
