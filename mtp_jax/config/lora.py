"""The `lora` section: low-rank adapters of frozen matrices (LoRA, Hu et al. 2021).

An adapted matrix W computes x W + alpha / rank * (x A) B. W stands still; A and B are trained. Which matrices have
adapters is said by patterns over the paths of `adaptable`.
"""

import dataclasses
import re

from mtp_jax.config.checks import check_fields, only_with, require
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.trunk import TrunkConfig
from mtp_jax.errors import UserError

MATRICES = (("attn", ("q", "k", "v", "o")), ("mlp", ("gate", "up", "down")))
"""The matrices of a block that can have an adapter: all linear maps of one with a gated feed-forward layer."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of a run. They belong to the run and not to the model: a loaded model has them in its matrices."""

    rank: int = 0
    """R, number of columns of A and rows of B; 0 is no adapters. With adapters, set `train.trainable` to 'lora', or to
    several patterns with 'lora' among them. A and B are float32, also if `model.param_dtype` is 'bfloat16'."""
    alpha: float = 16.0
    """The product A B is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are set to zero in training. The others are divided by 1 - dropout."""
    targets: str | tuple[str, ...] = "^blocks/"
    """Regular expressions over paths such as `blocks/attn/q` and `heads/blocks/mlp/up`. A matrix that one of them
    matches has an adapter. The default is all matrices of the model's blocks. Biases and norms never have one."""

    def __post_init__(self) -> None:
        check_fields("lora", self)
        require(self.rank >= 0, f"lora.rank={self.rank} is negative; 0 switches adapters off")
        require(self.alpha > 0, f"lora.alpha={self.alpha}; it must be above 0")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout}; it must be at least 0 and below 1")
        only_with("lora", self, "alpha dropout targets", self.rank > 0, "lora.rank")
        require(bool(self.targets), f"lora.targets={self.targets!r} names no matrix; the default is '^blocks/'")
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.targets={pattern!r} is not a regular expression: {error}") from error

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of `targets`."""
        return (self.targets,) if isinstance(self.targets, str) else self.targets

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / self.rank

    def adapts(self, path: str) -> bool:
        """Whether the matrix at a path of `adaptable` has an adapter."""
        return self.rank > 0 and any(re.search(pattern, path) for pattern in self.patterns)


def adaptable(model: TrunkConfig, heads: HeadsConfig) -> tuple[str, ...]:
    """Paths of the matrices that can have an adapter: those of the model's blocks and of the blocks of heads."""
    paths: list[str] = []
    for stack, block in _stacks(model, heads).items():
        here = [f"{stack}/{layer}/{name}" for layer, names in MATRICES for name in names]
        if not block.gated:
            here = [path for path in here if not path.endswith("/gate")]
        if block.num_experts:
            here = [path for path in here if "/mlp/" not in path]
        paths += here
    if not heads.attention:
        paths = [path for path in paths if not path.startswith("heads/blocks/attn/")]
    return tuple(paths)


def _stacks(model: TrunkConfig, heads: HeadsConfig) -> dict[str, ModelConfig]:
    """The stacks of blocks of the model and of its heads, by path."""
    has_blocks = heads.num_future > 1 and heads.facts.has_blocks
    return model.stacks | ({"heads/blocks": model.block} if has_blocks else {})


def adapted(lora: LoraConfig, model: TrunkConfig, heads: HeadsConfig) -> tuple[str, ...]:
    """Paths of the matrices that have an adapter.

    Raises:
      UserError: a pattern of `lora.targets` matches no matrix, or experts.
    """
    paths = adaptable(model, heads)
    for pattern in lora.patterns:
        for stack, block in _stacks(model, heads).items():
            experts = [f"{stack}/mlp/{name}" for name in ("gate", "up", "down")]
            require(
                not block.num_experts or not any(re.search(pattern, path) for path in experts),
                f"lora.targets={pattern!r} with model.num_experts={block.num_experts}: adapters of experts are not "
                "implemented; use '^blocks/attn/'",
            )
        shown = f"paths are {', '.join(paths)}" if paths else "this model has no matrix that can have an adapter"
        require(any(re.search(pattern, path) for path in paths), f"lora.targets={pattern!r} matches no matrix; {shown}")
    return tuple(filter(lora.adapts, paths))
