"""How long does it take to import a checkpoint, compared with reading its file? How much memory does it need?

    python benchmarks/import_checkpoint.py

The script writes a random Llama checkpoint (by default 1.2 GB of float32). Separate processes read the whole file, or
import it. Memory is the largest resident size of such a process, with Python's imports and the parameters.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import tyro

from mtp_jax.convert.files import Entry, write

CHILD = """
import json, pathlib, resource, sys, time
import jax
from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.convert.reader import open_checkpoint, read_params

directory = pathlib.Path(sys.argv[1])
started = time.perf_counter()
whole = (directory / "model.safetensors").read_bytes()
read_seconds = time.perf_counter() - started
del whole
resource_of = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[2] == "import":
    checkpoint = open_checkpoint(directory, notify=str)
    started = time.perf_counter()
    jax.block_until_ready(read_params(checkpoint, sharding.make_mesh(MeshConfig()), str))
    print(json.dumps({"seconds": time.perf_counter() - started}))
else:
    print(json.dumps({"seconds": read_seconds}))
"""
CHILD_MEMORY = CHILD.replace('whole = (directory / "model.safetensors").read_bytes()', "whole = None").replace(
    '{"seconds": time.perf_counter() - started}', '{"bytes": resource_of()}'
)


@dataclasses.dataclass(frozen=True)
class Args:
    """Shape of the checkpoint."""

    layers: int = 8
    d_model: int = 1536
    d_ff: int = 4096
    vocab: int = 32_000
    repeats: int = 5
    """Number of processes of each kind; the fastest counts."""


def main() -> None:
    """Prints one row of a table."""
    args = tyro.cli(Args, description=__doc__)
    with tempfile.TemporaryDirectory() as directory:
        size = write_checkpoint(args, pathlib.Path(directory))
        read = min(child(CHILD, directory, "read")["seconds"] for _ in range(args.repeats))
        took = min(child(CHILD, directory, "import")["seconds"] for _ in range(args.repeats))
        peak = max(child(CHILD_MEMORY, directory, "import")["bytes"] for _ in range(args.repeats))
    print("| file, GB | plain read, s | import, s | over read | peak memory over file |")
    print("|---|---|---|---|---|")
    print(f"| {size / 1e9:.2f} | {read:.2f} | {took:.2f} | {took / read:.2f} | {peak / size:.2f} |")


def write_checkpoint(args: Args, directory: pathlib.Path) -> int:
    """Writes a random Llama checkpoint, and returns the size of its file in bytes."""
    D, F, rng = args.d_model, args.d_ff, np.random.default_rng(0)
    block = {
        "self_attn.q_proj": (D, D),
        "self_attn.k_proj": (D // 2, D),
        "self_attn.v_proj": (D // 2, D),
        "self_attn.o_proj": (D, D),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(args.layers) for name, shape in block.items()}
    shapes |= {"model.embed_tokens.weight": (args.vocab, D), "lm_head.weight": (args.vocab, D)}
    shapes |= {"model.norm.weight": (D,)}
    f32 = np.dtype(np.float32)
    make = lambda shape: lambda: rng.standard_normal(shape, dtype=f32)  # noqa: E731
    write(directory, [Entry(name, shape, f32, make(shape)) for name, shape in shapes.items()])
    config = {
        "model_type": "llama",
        "vocab_size": args.vocab,
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": args.layers,
        "num_attention_heads": D // 96,
        "num_key_value_heads": D // 192,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return (directory / "model.safetensors").stat().st_size


def child(program: str, *arguments: str) -> dict[str, float]:
    """Runs a separate process, and returns what it prints."""
    command = [sys.executable, "-c", program, *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
