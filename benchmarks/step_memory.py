"""Do extra heads need memory for logits? Temporaries of the compiled training step by vocabulary and number of heads.

    python benchmarks/step_memory.py [--vocab 32000 152064] [--kind parallel]

Nothing is run: the step is compiled for one device, and its memory analysis is read. A model with M heads has M-1
blocks in its heads, and as many blocks in total as the plain model. With a vocabulary of 512, logits need hardly any
memory, so the difference between the models there is the memory that the heads keep for the backward pass. `over` is
the temporaries divided by the sum of this memory and the temporaries for M = 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import tyro

from mtp_jax import Config, DataConfig, HeadsConfig, ModelConfig, TrainConfig, equal_parameter_layers
from mtp_jax.config import MeshConfig
from mtp_jax.sharding import make_mesh
from mtp_jax.training.step import compile_steps


@dataclasses.dataclass(frozen=True)
class Args:
    """Arguments of the benchmark."""

    vocab: tuple[int, ...] = (32_000, 152_064)
    """Vocabularies."""
    heads: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of heads M, head 0 included."""
    kind: str = "parallel"
    """Head family."""
    layers: int = 8
    """Number of blocks, those of the heads included."""
    batch_size: int = 4
    """Rows."""
    seq_len: int = 512
    """Tokens of a row."""


def temporaries(args: Args, vocab: int, num_future: int) -> int:
    """Bytes of the temporaries of the compiled step."""
    layers = equal_parameter_layers(args.layers, num_future)
    model = ModelConfig(
        vocab_size=vocab, num_layers=layers, d_model=512, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=1408
    )
    config = Config(
        model=model,
        heads=HeadsConfig(kind=args.kind, num_future=num_future, tap=-1 if layers > 1 else 0),
        data=DataConfig(seq_len=args.seq_len),
        train=TrainConfig(batch_size=args.batch_size),
    )
    steps = compile_steps(config, make_mesh(MeshConfig()))
    rows = jax.ShapeDtypeStruct((args.batch_size, args.seq_len), jnp.int32)
    batch = dict.fromkeys(("tokens", "segment_ids", "positions"), rows)
    return steps.train.lower(steps.abstract_state, batch).compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    """Compiles the steps and prints the table."""
    args = tyro.cli(Args, description=__doc__)
    own = {m: temporaries(args, 512, m) - temporaries(args, 512, 1) for m in args.heads}
    print("| vocabulary | M | temporaries, MB | M = 1 and the heads' own, MB | over | naive logits alone, MB |")
    print("|---|---|---|---|---|---|")
    for vocab in args.vocab:
        one = temporaries(args, vocab, 1)
        for m in args.heads:
            took, expected = temporaries(args, vocab, m), one + own[m]
            logits = 4 * m * args.batch_size * args.seq_len * vocab
            figures = f"{took / 1e6:,.0f} | {expected / 1e6:,.0f} | {took / expected:.3f} | {logits / 1e6:,.0f}"
            print(f"| {vocab:,} | {m} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
