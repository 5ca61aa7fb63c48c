"""A small task of conversations, and the fine-tuning configs made tiny: what the tests of fine-tuning share."""

import json
import pathlib
import random
from typing import Any

from reference.tiny import WORDS

from mtp_jax.cli.common import read_config
from mtp_jax.config import Config, override

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TINY = {
    "model.vocab_size": 264,
    "model.num_layers": 3,
    "model.d_model": 16,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 4,
    "model.d_ff": 24,
    "model.max_seq_len": 128,
    "loss.chunk_bytes": 2**16,
    "data.tokenizer": "bytes",
    "data.chat_template": "plain",
    "data.seq_len": 48,
    "data.eval_fraction": 0.2,
    "optim.warmup_steps": 1,
    "train.steps": 4,
    "train.batch_size": 8,
    "train.grad_accum": 1,
    "train.eval_every": 2,
    "train.eval_rows": 8,
    "decode.num_prompts": 2,
    "decode.prompt_tokens": 8,
    "decode.max_new_tokens": 8,
}


def write_chats(path: pathlib.Path, count: int = 60) -> pathlib.Path:
    """Conversations in which the assistant repeats the user's words."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        said = " ".join(rng.choice(WORDS) for _ in range(3))
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return path


def tiny(name: str, **changes: Any) -> Config:
    """A config of `configs/`, made tiny.

    Args:
      name: the file's name.
      changes: fields that differ, with `__` for the dot: `train__steps=3`.
    """
    given = {path.replace("__", "."): value for path, value in changes.items()}
    return override(read_config(str(CONFIGS / f"{name}.py")), TINY | given)
