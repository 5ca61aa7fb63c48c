"""Small text, small configs: what the tests of training and of the commands share."""

import dataclasses
import pathlib
import random
from typing import Any

from mtp_jax.config import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

TEXT = "def return self value list of the and if else for in range print open close read write"
WORDS = TEXT.split()


def write_text(directory: pathlib.Path, files: int = 12, words: int = 400) -> pathlib.Path:
    """Text files of random words, the same in every run."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        rng = random.Random(i)
        text = " ".join(rng.choice(WORDS) for _ in range(words))
        (directory / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return directory


def tiny_config(source: str | pathlib.Path = "stdlib", **sections: dict[str, Any]) -> Config:
    """A config that trains a step in milliseconds; `sections` override fields, as `train={"steps": 3}`."""
    config = Config(
        model=ModelConfig(
            vocab_size=264,
            num_layers=2,
            d_model=16,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            d_ff=24,
            max_seq_len=128,
        ),
        heads=HeadsConfig(num_future=3),
        loss=LossConfig(chunk_bytes=2**16),
        data=DataConfig(source=str(source), tokenizer="bytes", seq_len=32, eval_fraction=0.2),
        # A constant rate, so that runs of different lengths have one program.
        optim=OptimConfig(learning_rate=5e-3, warmup_steps=2, schedule="constant"),
        mesh=MeshConfig(),
        train=TrainConfig(steps=12, batch_size=8, log_every=4, checkpoint_every=4, eval_rows=16),
        decode=DecodeConfig(num_prompts=2, prompt_tokens=8, max_new_tokens=8),
    )
    changed = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **changed)


def run_config(source: str | pathlib.Path = "stdlib", **sections: dict[str, Any]) -> Config:
    """The same with one layer and one extra head. Tests of whole runs share it, and so one program: it is traced and
    compiled in half the time of the other's."""
    small = {"model": {"num_layers": 1}, "heads": {"num_future": 2}}
    return tiny_config(source, **{name: small.get(name, {}) | sections.get(name, {}) for name in small | sections})


def rl_config(source: str | pathlib.Path, **sections: dict[str, Any]) -> Config:
    """The same for reinforcement that starts from the run in `source`: 2 prompts, 4 responses of 8 tokens to each."""
    settings = {"task": "arithmetic", "reward": "number", "samples": 4, "max_new_tokens": 8}
    small = {
        "rl": settings,
        "train": {"steps": 3, "init_from": str(source), "init_heads": "same", "eval_rows": 0, "checkpoint_every": 1},
    }
    return run_config(**{name: small.get(name, {}) | sections.get(name, {}) for name in small | sections})
