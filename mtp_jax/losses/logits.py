"""One chunk of logits of a linear unembedding, on one device or with the vocabulary split over several devices.

Both forms of the cross-entropy, and the entropy, share this code: options, kinds of targets, and cutting tokens into
chunks.
"""

import dataclasses
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from mtp_jax.errors import UserError
from mtp_jax.losses.objectives import Distance, Objective, Softmax


class SoftTargets(NamedTuple):
    """Targets that are distributions over W tokens each. `rank` is the rank of the first of these tokens."""

    ids_MBTW: jax.Array
    """Token ids. Those with a probability above 0 are all different."""
    probs_MBTW: jax.Array


class Teacher(NamedTuple):
    """A teacher for distillation, used if `Objective.mix` is above 0. It gets no gradient."""

    hidden_MBTD: jax.Array
    """The teacher's states for the same targets."""
    table_VD: jax.Array


Targets = jax.Array | SoftTargets


@dataclasses.dataclass(frozen=True)
class XentSpec:
    """Static options. W is the unembedding.

    Attributes:
      chunk_bytes: most bytes of float32 logits in memory at one time on one device; see `default_chunk_bytes`.
      softcap: c in `c * tanh(logits / c)`; 0 is off.
      z_loss: coefficient of logsumexp^2.
      temperature: divides the logits, after the soft cap.
      mesh: devices that the arrays are spread over; None for one device.
      batch_axes: mesh axes that split the rows.
      length_axes: mesh axes that split the positions.
      vocab_axes: mesh axes that split the vocabulary.
      embed_axes: mesh axes that split the width of W while it is not in use; W's gradient is split in the same way.
      gather_chunks: if True, W is gathered over `embed_axes` for every chunk; if False, once for all chunks.
      smoothing, distance, mix: see `objectives.Objective`.
      learn_table: whether W gets a gradient.
    """

    chunk_bytes: int = 32 * 2**20
    softcap: float = 0.0
    z_loss: float = 0.0
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ()
    length_axes: tuple[str, ...] = ()
    vocab_axes: tuple[str, ...] = ()
    embed_axes: tuple[str, ...] = ()
    gather_chunks: bool = False
    smoothing: float = 0.0
    distance: str = "kl"
    mix: float = 0.0
    learn_table: bool = True
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1:
            raise UserError(f"XentSpec.chunk_bytes={self.chunk_bytes}; it must be at least 1")
        self._check_axes()
        if self.distance not in get_args(Distance):
            raise UserError(f"XentSpec.distance={self.distance!r}; choose one of {', '.join(get_args(Distance))}")
        for name in ("smoothing", "mix"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"XentSpec.{name}={getattr(self, name)}; it must be in [0, 1]")
        for name in ("softcap", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"XentSpec.{name}={getattr(self, name)} is negative; 0 switches it off")
        if not self.temperature > 0:
            raise UserError(f"XentSpec.temperature={self.temperature}; it must be above 0")

    def _check_axes(self) -> None:
        mesh = self.mesh
        known = set(self.mesh.shape if self.mesh else ())
        for name in ("batch_axes", "length_axes", "vocab_axes", "embed_axes"):
            axes = getattr(self, name)
            if not isinstance(axes, tuple) or not set(axes) <= known:
                have = "there is no mesh" if mesh is None else f"the mesh has {tuple(mesh.shape)}"
                raise UserError(f"XentSpec.{name}={axes!r}; give a tuple of mesh axes, and {have}")
        if mesh is not None and any(kind != AxisType.Auto for kind in mesh.axis_types):
            raise UserError(
                f"XentSpec.mesh has axes of the kinds {', '.join(map(str, mesh.axis_types))}; make it with "
                "axis_types=(jax.sharding.AxisType.Auto,) * len(axes)"
            )

    @property
    def sharded(self) -> bool:
        """Whether there is more than one device."""
        return self.mesh is not None and self.mesh.size > 1

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the tokens."""
        return self.batch_axes + self.length_axes

    @property
    def objective(self) -> Objective:
        """The options for the term of a token."""
        return Objective(self.z_loss, self.smoothing, self.distance, self.mix)


def default_chunk_bytes(platform: str, vocab: int) -> int:
    """The default of `XentSpec.chunk_bytes`.

    W's gradient is read and written once per chunk. The chunk is so large that this costs little.

    Args:
      platform: platform of the devices, "cpu", "gpu" or "tpu".
      vocab: V, on one device.
    """
    least, tokens = (4 * 2**20, 512) if platform == "cpu" else (256 * 2**20, 1024)
    return max(least, 4 * vocab * tokens)


def table_split(spec: XentSpec) -> PartitionSpec:
    """How W is split inside `shard_map`: over the vocabulary, and with `gather_chunks` also along its width."""
    return PartitionSpec(spec.vocab_axes or None, (spec.embed_axes or None) if spec.gather_chunks else None)


def gathered(table_VD: jax.Array, spec: XentSpec) -> jax.Array:
    """W for this shard's part of the vocabulary, with its whole width."""
    if not (spec.gather_chunks and spec.embed_axes):
        return table_VD
    return jax.lax.all_gather(table_VD, spec.embed_axes, axis=1, tiled=True)


def softmax(spec: XentSpec, vocab_axes: tuple[str, ...], h_CD: jax.Array, table_VD: jax.Array) -> Softmax:
    """Softmax of the logits of a chunk. Sums are over the whole vocabulary, also if it is split."""
    z_CV = cap(products(h_CD, table_VD), spec.softcap)
    if spec.temperature != 1:
        z_CV = z_CV / spec.temperature
    max_C = across(jax.lax.pmax, jax.lax.stop_gradient(jnp.max(z_CV, axis=-1)), vocab_axes)
    exp_CV = jnp.exp(z_CV - max_C[:, None])
    sum_C = across(jax.lax.psum, jnp.sum(exp_CV, axis=-1), vocab_axes)
    return Softmax(z_CV, exp_CV, sum_C, max_C + jnp.log(sum_C))


def teach(spec: XentSpec, vocab_axes: tuple[str, ...], teacher_CD: jax.Array, table_VD: jax.Array) -> Softmax:
    """`softmax` for the states of a teacher, without a gradient."""
    return jax.lax.stop_gradient(softmax(spec, vocab_axes, teacher_CD, table_VD.astype(teacher_CD.dtype)))


def as_soft(target: Targets) -> tuple[jax.Array, jax.Array]:
    """Targets as ids and probabilities, both [C, W]. A single target has W = 1."""
    if isinstance(target, SoftTargets):
        return target
    return target[:, None], jnp.ones(target.shape, jnp.float32)[:, None]


def spread(column_CW: jax.Array, probs_CW: jax.Array, V: int) -> jax.Array:
    """Targets as distributions over this shard's part of the vocabulary."""
    if column_CW.shape[1] == 1:
        return (jnp.arange(V, dtype=jnp.int32)[None, :] == column_CW) * probs_CW
    column_CW = jnp.where((column_CW >= 0) & (column_CW < V), column_CW, V)  # V is dropped; -1 would be the last column
    row_C1 = jnp.arange(len(column_CW))[:, None]
    return jnp.zeros((len(column_CW), V), jnp.float32).at[row_C1, column_CW].add(probs_CW, mode="drop")


def products(h_CD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """h W^T, in float32."""
    return jnp.einsum("CD,VD->CV", h_CD, table_VD, preferred_element_type=jnp.float32)


def cap(z_CV: jax.Array, softcap: float) -> jax.Array:
    """c tanh(z / c), or z for a cap of 0."""
    return softcap * jnp.tanh(z_CV / softcap) if softcap else z_CV


def across(reduce: Any, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The reduction of x over mesh axes; x itself if there are no axes."""
    return reduce(x, axes) if axes else x


def pick(z_CV: jax.Array, column_CW: jax.Array) -> jax.Array:
    """The logits of each token at its columns; 0 for a column in another shard of the vocabulary."""
    V = z_CV.shape[1]
    picked_CW = jnp.take_along_axis(z_CV, jnp.clip(column_CW, 0, V - 1), axis=1)
    return jnp.where((column_CW >= 0) & (column_CW < V), picked_CW, 0)


def at_least(z_CV: jax.Array, label_C: jax.Array) -> jax.Array:
    """For each row, the number of logits that are at least as large as the logit of its label.

    They are counted in float32, which is exact below 2^24 entries. With integers, a CPU needs twice the time and memory
    for one more chunk of logits.
    """
    return jnp.sum((z_CV >= label_C[:, None]).astype(jnp.float32), axis=-1).astype(jnp.int32)


def chunk_size(tokens: int, vocab: int, spec: XentSpec) -> int:
    """Tokens per chunk: the largest divisor of `tokens` within the byte budget, unless it is less than half of the
    budget. Then the whole budget is used."""
    most = min(max(spec.chunk_bytes // (4 * vocab), 1), tokens)
    divisors = (size for size in range(most, most // 2, -1) if tokens % size == 0)
    return next(divisors, most)


def to_chunks(tree: Any, size: int) -> Any:
    """Reshapes a tree of [M, B, T, ...] to [chunks, C, ...], head after head.

    No chunk has tokens of two heads, so the sums of a head do not depend on the number of heads. The last chunk of
    every head is filled up with zeros. They have weight 0.
    """

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        padding = -x.shape[1] % size
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(-1, size, *x.shape[2:])

    return jax.tree.map(split, tree)


def from_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `to_chunks`: an array of [M, B, T, ...]."""
    M, B, T = shape[:3]
    return x.reshape(M, -1, *x.shape[2:])[:, : B * T].reshape(shape)
