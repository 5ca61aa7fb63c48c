"""What the `model` section of a config must have. `ModelConfig`, the section of a decoder LM, is one such section.

Another trunk has another section: a frozen dataclass with the names of `TrunkConfig` as fields or properties.
`mtp_jax.model.trunk.register` adds it here. In JSON the field `kind` says which section it is; a `ModelConfig` does not
have this field.
"""

from typing import Any, Protocol

from mtp_jax.config.blt import BltConfig
from mtp_jax.config.checks import require
from mtp_jax.config.model import ModelConfig


class TrunkConfig(Protocol):
    """The names that heads, losses, training and decoding use of a `model` section, for any trunk."""

    vocab_size: int
    """V, number of rows of the embedding and of the unembedding."""
    num_layers: int
    """L, number of layers of the trunk. Heads can read the state at each of L + 1 taps: 0 is the embedding, L the state
    after the last layer (`heads.tap`)."""
    d_model: int
    """D, width of the states."""
    max_seq_len: int
    """Largest number of positions of a row, with prompt and generated tokens."""
    dtype: str
    """Dtype of states and matrix products."""
    param_dtype: str
    """Dtype of the stored parameters."""
    logit_scale: float
    """Factor of the logits; 1 does not change them."""
    logit_softcap: float
    """c in `c * tanh(logits / c)`; 0 does not change the logits."""
    block: ModelConfig
    """The shape of a decoder block and of a norm, for the blocks and norms of heads. Its `d_model`, `dtype` and
    `param_dtype` must equal those of the section, also after `dataclasses.replace` of these."""
    is_stack: bool
    """Whether the trunk is a stack of such blocks, in `params["blocks"]`. Masks and registers run through them, and
    `heads.init="copy_block"` copies one."""
    stacks: dict[str, ModelConfig]
    """The stacks of decoder blocks whose matrices can have adapters, by their path, with the shape of a block."""
    split_fields: tuple[str, ...]
    """Fields that must be divisible by `mesh.tensor`, because a parameter is split along them."""
    unembedding_path: str
    """Path of the parameter from which the unembedding is made, such as `embed/table`. If `train.trainable` does not
    train it, the loss computes no gradient for the unembedding."""
    frozen_models: dict[str, ModelConfig]
    """Decoder LMs inside the model that no training step changes, by the top-level name of their parameters. A run gets
    them trained, from `train.entropy_from`."""
    kind: str
    """The name of the trunk, as the default of a dataclass field. `ModelConfig` has no such field."""

    def forward_flops(self, tokens: int, seq_len: int) -> int:
        """Number of operations of a forward pass in matrix products, without logits and without `frozen_models`. Not
        used for a stack of blocks.

        Args:
          tokens: number of positions of the batch.
          seq_len: T, number of positions of a row.
        """
        ...


SECTIONS: dict[str, type] = {"blt": BltConfig}
"""Sections of trunks other than the decoder LM, by `kind`. `model.trunk.register` adds one."""


def section_type(tree: Any, origin: str) -> type:
    """The dataclass of a `model` section that was read from JSON.

    Raises:
      UserError: the `kind` is not registered.
    """
    if not isinstance(tree, dict) or "kind" not in tree:
        return ModelConfig
    name = tree["kind"]
    known = ", ".join(SECTIONS) or "none"
    require(
        isinstance(name, str) and name in SECTIONS,
        f"{origin}.kind is {name!r}, which is no registered trunk (registered: {known}); import the module that "
        "registers it, or leave the field out for a decoder LM",
    )
    return SECTIONS[name]
