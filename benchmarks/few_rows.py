"""What does a matrix product with a few rows cost on a CPU? Compares several ways to write it, in SwiGLU layers.

    python benchmarks/few_rows.py [--layers 30] [--width 576] [--inner 1536] [--runs 15]

A round of decoding multiplies 2 to 6 rows; a plain step multiplies one. The weights (30 x 3 x 576 x 1536 float32, 318
MB) do not fit into a cache, so the product with one row is as fast as memory allows. Its time is the floor for every
number of rows.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from reporting import RESULTS, Report

ROWS = (1, 2, 3, 4, 5, 6, 8, 16)


def at_once(x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's product of all rows."""
    return x @ w


def transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    """The same with the weights as [outputs, inputs]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def row_by_row(x: jax.Array, w: jax.Array) -> jax.Array:
    """One product per row."""
    return jnp.concatenate([row[None] @ w for row in x])


def summed(x: jax.Array, w: jax.Array) -> jax.Array:
    """A fused loop that multiplies and sums, with the weights as [outputs, inputs]."""
    return jnp.sum(x[:, None, :] * w[None], axis=2)


def tiles(count: int) -> Callable:
    """Row by row, with the columns in `count` parts, so that a part stays in the cache of one core."""
    return lambda x, parts: jnp.concatenate([row_by_row(x, part) for part in parts], axis=1)


def cut(weights: list[jax.Array], count: int) -> list[tuple[jax.Array, ...]]:
    """Cuts the columns of every matrix into parts. Each part is a separate array."""
    return [tuple(jnp.array(part) for part in np.split(np.asarray(w), count, axis=1)) for w in weights]


def chain(product: Callable, x: jax.Array, inner: list, outer: list) -> jax.Array:
    """A chain of SwiGLU layers."""
    for i, down in enumerate(outer):
        x = x + product(jnp.tanh(product(x, inner[2 * i])) * product(x, inner[2 * i + 1]), down)
        x = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True))
    return x


def milliseconds(run: Callable, runs: int) -> float:
    """The median time of a call."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def main() -> None:
    """Measures all ways and publishes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def matrices(count: int, rows: int, columns: int) -> list[jax.Array]:
        return [jnp.asarray(rng.standard_normal((rows, columns), np.float32)) * rows**-0.5 for _ in range(count)]

    inner = matrices(2 * args.layers, args.width, args.inner)
    outer = matrices(args.layers, args.inner, args.width)
    turned = [w.T.copy() for w in inner], [w.T.copy() for w in outer]
    ways = {
        "at once": (at_once, inner, outer),
        "at once, [out, in]": (transposed, *turned),
        "row by row": (row_by_row, inner, outer),
        "row by row, 4 tiles": (tiles(4), cut(inner, 4), cut(outer, 4)),
        "summed, [out, in]": (summed, *turned),
    }
    rows = []
    for count in ROWS:
        x = jnp.asarray(rng.standard_normal((count, args.width), np.float32))
        cells = []
        for product, *weights in ways.values():
            run = jax.jit(lambda x, *weights, product=product: chain(product, x, *weights))
            cells.append(f"{milliseconds(lambda run=run, x=x, weights=weights: run(x, *weights), args.runs):.1f}")
        rows.append((f"{count}", *cells))
        print(*rows[-1], flush=True)
    size = 4 * args.layers * 3 * args.width * args.inner / 1e6
    note = f"Milliseconds for {args.layers} layers, {size:.0f} MB of float32 weights; medians of {args.runs}."
    report = Report("Products with a few rows on a CPU", ("rows", *ways), rows, note)
    report.publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
