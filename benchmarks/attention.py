"""Which attention path is fastest for packed rows? Times each path of this device, forward and with gradients.

    python benchmarks/attention.py [--tokens 2048 8192] [--heads 32] [--kv-heads 8] [--head-dim 128] [--window 1024]

Every row holds four documents. `xla` is the reference, computed in one piece. `blocks` computes the same in blocks of
queries. `cudnn` runs on an NVIDIA GPU, `splash` on a TPU. The errors are those of the result and of the gradient of the
keys: the largest difference from float32 `blocks` on the same inputs, divided by the largest entry. If a path runs out
of memory, the table says so.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from mtp_jax.kernels import cudnn, splash
from mtp_jax.kernels.attention import AttnSpec, attention
from mtp_jax.kernels.blocks import attention_by_blocks


@dataclasses.dataclass(frozen=True)
class Args:
    """Shapes, and the number of timed runs."""

    tokens: tuple[int, ...] = (512, 2048, 8192)
    """Tokens of a row, multiples of 128."""
    batch_tokens: int = 16_384
    """Tokens of all rows together; there is at least one row."""
    heads: int = 32
    """Number of query heads."""
    kv_heads: int = 8
    """Number of key-value heads."""
    head_dim: int = 128
    """Width of an attention head."""
    window: int = 0
    """Number of slots that a query sees; 0 is all slots up to its own."""
    dtype: str = "bfloat16"
    """Dtype of queries, keys and values."""
    repeats: int = 10
    """Number of timed runs; the median counts."""


def paths(args: Args, spec: AttnSpec, tokens: int) -> dict[str, Callable[..., jax.Array]]:
    """The attention paths that run on this device, by name."""
    found = {
        "xla": functools.partial(attention, spec=spec),
        "blocks": functools.partial(attention_by_blocks, spec=spec),
    }
    platform = jax.default_backend()
    if platform == "tpu":
        kernels = splash.make_kernels(spec, tokens, tokens, args.heads)
        found["splash"] = functools.partial(splash.splash_attention, spec=spec, kernels=kernels)
    q_BTNH = jax.ShapeDtypeStruct((1, tokens, args.heads, args.head_dim), args.dtype)
    if platform == "gpu" and cudnn.refusal(q_BTNH, spec, cudnn.capability()) is None:
        found["cudnn"] = functools.partial(cudnn.cudnn_attention, spec=spec)
    return found


def milliseconds(run: Callable[..., object], arrays: tuple[jax.Array, ...], repeats: int) -> float:
    """Median time of the timed runs. A first run is not timed."""
    jax.block_until_ready(run(*arrays))
    took = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        took.append(time.perf_counter() - start)
    return 1e3 * statistics.median(took)


def with_gradients(path: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """A function that also returns gradients. They are for half the sum of squares of the result, with respect to
    queries, keys and values."""

    def run(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *where: jax.Array) -> tuple[jax.Array, ...]:
        mixed_BTNH, pull = jax.vjp(lambda *given: path(*given, *where), q_BTNH, k_BKSH, v_BKSH)
        return mixed_BTNH, *pull(mixed_BTNH)

    return run


def error(actual: jax.Array, exact: jax.Array) -> float:
    """The largest difference, divided by the largest entry."""
    exact = np.asarray(exact, np.float32)
    return float(np.abs(np.asarray(actual, np.float32) - exact).max() / np.abs(exact).max())


def main() -> None:
    """Times the paths and prints the table."""
    args = tyro.cli(Args, description=__doc__)
    window = (jnp.int32(args.window), (args.window,)) if args.window else (None, ())
    spec = AttnSpec(args.head_dim**-0.5, 0.0, *window)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args}")
    print("| tokens | rows | path | forward, ms | with gradients, ms | error of the result | of dk |")
    print("|---|---|---|---|---|---|---|")
    for tokens in args.tokens:
        rows, rng = max(1, args.batch_tokens // tokens), np.random.default_rng(tokens)
        shapes = [(rows, tokens, args.heads, args.head_dim), *[(rows, args.kv_heads, tokens, args.head_dim)] * 2]
        qkv = [jnp.asarray(rng.standard_normal(shape, np.float32), args.dtype) for shape in shapes]
        slots_BT = jnp.broadcast_to(jnp.arange(tokens)[None, :], (rows, tokens))
        where = slots_BT, slots_BT // -(-tokens // 4)
        with jax.default_matmul_precision("highest"):
            exactly = jax.jit(with_gradients(functools.partial(attention_by_blocks, spec=spec)))
            exact = exactly(*(x.astype(jnp.float32) for x in qkv), *where)
        for name, path in paths(args, spec, tokens).items():
            forward, whole = jax.jit(path), jax.jit(with_gradients(path))
            try:
                times = [milliseconds(run, (*qkv, *where), args.repeats) for run in (forward, whole)]
                actual = whole(*qkv, *where)
                errors = [error(actual[i], exact[i]) for i in (0, 2)]
                figures = f"{times[0]:,.2f} | {times[1]:,.2f} | {errors[0]:.1e} | {errors[1]:.1e}"
            except jax.errors.JaxRuntimeError as failure:
                if "RESOURCE_EXHAUSTED" not in str(failure):
                    raise
                figures = "out of memory | | |"
            print(f"| {tokens:,} | {rows} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
