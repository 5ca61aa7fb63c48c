"""What the `model` section of a config must offer. `ModelConfig`, which describes a decoder LM, is one such section.

A trunk of another kind has a section of its own: a frozen dataclass with the names of `TrunkConfig` as fields or
properties. `mtp_jax.model.trunk.register` adds it here. JSON tells the sections apart by the field `kind`, which a
`ModelConfig` does not have.
"""

from typing import Any, Protocol

from mtp_jax.config.checks import require
from mtp_jax.config.model import ModelConfig


class TrunkConfig(Protocol):
    """The names that heads, losses, training and decoding read of a `model` section, whatever the trunk."""

    vocab_size: int
    """Rows of the embedding and of the unembedding (V)."""
    num_layers: int
    """Layers of the trunk (L). Heads may read the state at each of the L + 1 places between them: `heads.tap` is a
    place, 0 the embedding and L the state after the last layer."""
    d_model: int
    """Width of the states (D)."""
    max_seq_len: int
    """Most positions of a row, prompt and generated tokens together."""
    dtype: str
    """Dtype of states and matrix products."""
    param_dtype: str
    """Dtype of the parameters at rest."""
    logit_scale: float
    """Logits are multiplied by this; 1 leaves them as they are."""
    logit_softcap: float
    """c in `c * tanh(logits / c)`; 0 leaves the logits as they are."""
    block: ModelConfig
    """The shape of a decoder block and of a norm: heads have blocks and norms like these. Its `d_model`, `dtype` and
    `param_dtype` are those of the section."""
    is_stack: bool
    """Whether the trunk is a stack of such blocks, which lie in `params["blocks"]`. Masks and registers run through
    them, and `heads.init="copy_block"` copies one."""
    split_fields: tuple[str, ...]
    """Fields that must divide over `mesh.tensor` devices, because a parameter is split along them."""
    unembedding_path: str
    """Path of the parameter that the unembedding is made of, such as `embed/table`. `train.trainable` decides by it
    whether the loss forms a gradient for the unembedding."""
    kind: str
    """The name of the trunk, as the default of a dataclass field. `ModelConfig` has no such field."""

    def forward_flops(self, tokens: int, seq_len: int) -> int:
        """Operations of the matrix products of one forward pass, logits left out. Not asked of a stack of blocks.

        Args:
          tokens: positions of the batch.
          seq_len: T, positions of a row.
        """
        ...


SECTIONS: dict[str, type] = {}
"""Sections that describe other trunks than the decoder LM, by `kind`; `model.trunk.register` adds one."""


def section_type(tree: Any, origin: str) -> type:
    """The dataclass of a `model` section that was read from JSON.

    Raises:
      UserError: a `kind` that is not registered.
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
