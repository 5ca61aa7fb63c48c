"""Measures value and gradient of the multi-token loss in five forms, and compares them with bare matrix products.

The forms are:

    naive   keeps the logits of all heads in memory
    optax   the same, with the cross-entropy of optax
    remat   puts a checkpoint around each chunk of logits
    fused   our op, over every token
    skip    our op without the tokens of weight 0, as in training

The floor is the time of square matrix products with as many operations as three products of the states of all tokens
with the unembedding.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil

from mtp_jax import sharding
from mtp_jax.bench.timing import FLOOR, Products, Times, in_turns, ratio, temp_bytes
from mtp_jax.config import Config, MeshConfig, ModelConfig
from mtp_jax.losses.mtp import mtp_loss
from mtp_jax.losses.xent import XentSpec
from mtp_jax.runs.freed_memory import keep_freed_memory
from mtp_jax.training.objectives import xent_spec

Loss = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
FORMS = ("naive", "optax", "remat", "fused", "skip")
COLUMNS = ("seconds", "it / floor", "naive / it", "temp MB", "gradient error")
"""The columns of `cells`."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What to measure, and how long."""

    heads: int = 4
    """M, the number of heads that share the unembedding."""
    vocab: int = 32_000
    """V, size of the vocabulary."""
    tokens: int = 2048
    """Number of tokens of the batch."""
    rows: int = 4
    """Number of rows of the batch."""
    width: int = 512
    """D, width of the states."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of states and unembedding."""
    weightless: float = 0.125
    """Share of the tokens with weight 0, such as prompts in fine-tuning."""
    forms: tuple[Literal["naive", "optax", "remat", "fused", "skip"], ...] = FORMS
    """The forms to measure."""
    chunk_bytes: int = 0
    """`loss.chunk_bytes` of remat, fused and skip. 0 means the value that training uses on this device."""
    runs: int = 5
    """Number of timed turns. In each turn every form runs once. Medians over turns are used."""
    budget: float = 120.0
    """After this number of seconds, no further turn begins."""
    error_tokens: int = 32
    """Number of tokens per head for comparing gradients with float64. 0 means no comparison."""

    @property
    def flops(self) -> float:
        """Operations of value and gradient: three products per head and token, also for tokens of weight 0."""
        return 3 * 2.0 * self.heads * self.tokens * self.width * self.vocab


def measure(setting: Setting) -> dict[str, Any]:
    """Measures the forms. Returns the stable keys of `mtp bench loss --json`: one per form, and `floor_seconds`.

    If a form does not fit into the machine's free memory, it has `temp_bytes`, but `seconds` is None.
    """
    keep_freed_memory()  # as `mtp train` does
    arrays = make_arrays(setting, setting.rows, setting.tokens // setting.rows)
    result: dict[str, Any] = {}
    compiled = {}
    runnable = {}
    for name in setting.forms:
        compiled[name] = jax.jit(jax.value_and_grad(form(name, setting), (0, 1))).lower(*arrays).compile()
        result[name] = {"seconds": None, "temp_bytes": temp_bytes(compiled[name])}
        if setting.error_tokens:
            result[name]["gradient_error"] = gradient_error(setting, name)
        if _fits(compiled[name]):
            runnable[name] = functools.partial(compiled[name], *arrays)
    floor = Products(setting.flops, setting.dtype)
    times = in_turns({FLOOR: floor, **runnable}, setting.runs, setting.budget)
    times[FLOOR] = floor.seconds(times[FLOOR])
    for name in runnable:
        result[name] |= _against(times, name) | {"seconds": statistics.median(times[name])}
    return result | {
        "floor_seconds": statistics.median(times[FLOOR]),
        "flops": setting.flops,
        "turns": len(times[FLOOR]),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _against(times: Times, name: str) -> dict[str, float]:
    over = {"over_floor": ratio(times[name], times[FLOOR])}
    return over | ({"naive_over": ratio(times["naive"], times[name])} if "naive" in times else {})


def _fits(compiled: Any) -> bool:
    if jax.default_backend() != "cpu":
        return True
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes < 0.9 * psutil.virtual_memory().available


def make_arrays(setting: Setting, rows: int, length: int) -> tuple[jax.Array, ...]:
    """States, unembedding, targets and weights, with which logits have a variance of 1."""
    hidden_key, table_key, target_key, weight_key = jax.random.split(jax.random.key(0), 4)
    shape = (setting.heads, rows, length)
    hidden_MBTD = jax.random.normal(hidden_key, (*shape, setting.width), setting.dtype)
    table_VD = jax.random.normal(table_key, (setting.vocab, setting.width), setting.dtype) * setting.width**-0.5
    targets_MBT = jax.random.randint(target_key, shape, 0, setting.vocab)
    weights_MBT = (jax.random.uniform(weight_key, shape) >= setting.weightless) / (rows * length)
    return hidden_MBTD, table_VD, targets_MBT, weights_MBT.astype(jnp.float32)


def form(name: str, setting: Setting) -> Loss:
    """The loss in one of the forms, a function of states, unembedding, targets and weights."""
    if name in ("remat", "fused", "skip"):
        spec = XentSpec(chunk_bytes=_chunk_bytes(setting))
        scale_M = jnp.ones(setting.heads)
        impl = "remat" if name == "remat" else "fused"
        return lambda *arrays: mtp_loss(*arrays, scale_M, spec, impl, skip=name == "skip")[0]

    def whole(hidden_MBTD: jax.Array, table_VD: jax.Array, targets_MBT: jax.Array, weights_MBT: jax.Array) -> jax.Array:
        z_MBTV = jnp.einsum("MBTD,VD->MBTV", hidden_MBTD, table_VD, preferred_element_type=jnp.float32)
        if name == "optax":
            ce_MBT = optax.softmax_cross_entropy_with_integer_labels(z_MBTV, targets_MBT)
        else:
            log_probs_MBTV = jax.nn.log_softmax(z_MBTV)
            ce_MBT = -jnp.take_along_axis(log_probs_MBTV, targets_MBT[..., None], axis=-1)[..., 0]
        return jnp.sum(weights_MBT * ce_MBT)

    return whole


def _chunk_bytes(setting: Setting) -> int:
    config = Config(model=ModelConfig(vocab_size=setting.vocab))
    return setting.chunk_bytes or xent_spec(config, sharding.make_mesh(MeshConfig())).chunk_bytes


def gradient_error(setting: Setting, name: str) -> float:
    """The relative error of a form's gradients, compared with float64: the larger of the two gradients' errors.

    The relative error is the norm of the error divided by the norm of the gradient.
    """
    arrays = make_arrays(setting, 1, min(setting.error_tokens, setting.tokens))
    found = jax.jit(jax.grad(form(name, setting), (0, 1)))(*arrays)
    errors = []
    for ours, exact in zip(found, exact_gradients(*arrays), strict=True):
        size = np.linalg.norm(exact) or 1.0  # the norm is 0 if all tokens have weight 0
        errors.append(np.linalg.norm(np.asarray(ours, np.float64) - exact) / size)
    return float(max(errors))


def exact_gradients(*arrays: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of states and unembedding in float64, from the formula."""
    hidden_MBTD, table_VD, targets_MBT, weights_MBT = (np.asarray(array) for array in arrays)
    table_VD = table_VD.astype(np.float64)
    dhidden_MBTD = np.zeros(hidden_MBTD.shape)
    dtable_VD = np.zeros(table_VD.shape)
    for m, hidden_BTD in enumerate(hidden_MBTD.astype(np.float64)):
        hidden_UD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        target_U = targets_MBT[m].reshape(-1)
        z_UV = hidden_UD @ table_VD.T
        dz_UV = np.exp(z_UV - z_UV.max(axis=1, keepdims=True))
        dz_UV /= dz_UV.sum(axis=1, keepdims=True)
        dz_UV[np.arange(len(target_U)), target_U] -= 1
        dz_UV *= weights_MBT[m].reshape(-1, 1)
        dhidden_MBTD[m] = (dz_UV @ table_VD).reshape(hidden_BTD.shape)
        dtable_VD += dz_UV.T @ hidden_UD
    return dhidden_MBTD, dtable_VD


def cells(result: dict[str, Any], name: str) -> tuple[str, ...]:
    """The values of a form for `COLUMNS`, as text."""
    of = result[name]

    def shown(key: str, spec: str) -> str:
        return "-" if of.get(key) is None else format(of[key], spec)

    figures = (shown("seconds", ".3f"), shown("over_floor", ".2f"), shown("naive_over", ".2f"))
    return (*figures, f"{of['temp_bytes'] / 1e6:,.1f}", shown("gradient_error", ".1e"))
