"""Compares plain decoding of mtp_jax with transformers on torch, at the same shapes, in alternating runs.

    python benchmarks/decode_peers.py --torch-python PATH_TO_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS

Random weights, no extra heads, prompts of 64 tokens, 128 new tokens, float32, greedy. transformers decodes with its
default cache. The figures are milliseconds per step of the whole batch, prefill included on both sides. The best of
three runs counts.
"""

import dataclasses
import json
import subprocess
import time

import jax
import numpy as np
import tyro

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, generate, sharding
from mtp_jax.config import MeshConfig
from mtp_jax.loading import LoadedModel
from mtp_jax.model import mtp

SHAPES = {"34M": (8, 512, 1408, 8192, 8), "220M": (12, 1024, 2816, 32_000, 16)}
"""Layers, width, feed-forward width, vocabulary, heads."""
NEW = 128

PEER = """
import json, sys, time, torch
from transformers import LlamaConfig, LlamaForCausalLM
layers, width, ff, vocab, heads, batch, new = map(int, sys.argv[1:])
torch.set_num_threads({threads})
config = LlamaConfig(hidden_size=width, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads,
                     num_key_value_heads=heads, vocab_size=vocab, max_position_embeddings=4096)
model = LlamaForCausalLM(config).eval()
ids = torch.randint(0, vocab, (batch, 64))
options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
best = float("inf")
with torch.inference_mode():
    for run in range(4):
        began = time.perf_counter()
        model.generate(ids, **options)
        best = min(best, time.perf_counter() - began) if run else best
print(json.dumps(1e3 * best / new))
"""


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    torch_python: str
    """Path of a Python with torch and transformers. It may belong to another environment."""
    threads: int = 2
    """Number of threads that torch uses."""


def ours(shape: tuple[int, ...], batch: int) -> float:
    """Milliseconds per step of mtp_jax."""
    layers, width, ff, vocab, heads = shape
    model = ModelConfig(
        vocab_size=vocab,
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        d_ff=ff,
        max_seq_len=4096,
        tie_embeddings=False,
    )
    config = Config(model=model, heads=HeadsConfig(num_future=1), data=DataConfig(seq_len=512))
    params = jax.jit(mtp.init, static_argnums=0)(config.arch, jax.random.key(0))
    lm = LoadedModel(config, params, None, sharding.make_mesh(MeshConfig()))
    prompts, best = np.random.default_rng(0).integers(0, vocab, (batch, 64)).tolist(), float("inf")
    for run in range(4):
        began = time.perf_counter()
        generate(lm, prompts, max_new_tokens=NEW, draft="none")
        best = min(best, time.perf_counter() - began) if run else best
    return 1e3 * best / NEW


def main() -> None:
    """Prints one line per shape and batch size."""
    args = tyro.cli(Args)
    code = PEER.replace("{threads}", str(args.threads))
    for name, shape in SHAPES.items():
        for batch in (1, 4, 16):
            mine = ours(shape, batch)
            command = [args.torch_python, "-c", code, *map(str, (*shape, batch, NEW))]
            theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            print(
                f"{name} batch {batch}: mtp_jax {mine:.2f} ms, transformers {theirs:.2f} ms, {theirs / mine:.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
