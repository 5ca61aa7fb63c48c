"""The part of a config that defines the model and its heads. `model`, `decode` and `convert` use no other part."""

import dataclasses
import operator

from mtp_jax.config.checks import require
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.trunk import TrunkConfig
from mtp_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Arch:
    """A next-token model, the trunk, with its heads."""

    model: TrunkConfig = ModelConfig()
    """The trunk: a decoder LM, or what `model.trunk.register` has added."""
    heads: HeadsConfig = HeadsConfig()

    def __post_init__(self) -> None:
        model = self.model
        block = model.block
        heads = self.heads
        self._check_blocks()
        require(
            -model.num_layers <= heads.tap <= model.num_layers,
            f"heads.tap={heads.tap} is out of range for model.num_layers={model.num_layers}; "
            f"use -{model.num_layers}..{model.num_layers} (-1 is the input of the last block)",
        )
        require(
            -model.num_layers <= heads.init_block < model.num_layers,
            f"heads.init_block={heads.init_block} is out of range for model.num_layers={model.num_layers}; "
            f"use -{model.num_layers}..{model.num_layers - 1}",
        )
        require(
            heads.lora_rank == 0 or block.num_experts == 0,
            f"heads.lora_rank={heads.lora_rank} with model.num_experts={block.num_experts}: LoRA on experts is not "
            "implemented; use lora_rank=0",
        )
        require(
            heads.lora_rank == 0 or block.gated,
            f"heads.lora_rank={heads.lora_rank} with model.gated=False: LoRA on ungated layers is not implemented; use "
            "lora_rank=0",
        )
        require(
            heads.input_norm or block.norm_position == "pre",
            f"heads.input_norm=False needs blocks with model.norm_position='pre', not {block.norm_position!r}",
        )
        require(
            not heads.draft_vocab or heads.num_future > 1,
            f"heads.draft_vocab={heads.draft_vocab} is for extra heads, but heads.num_future=1 has none; use "
            "num_future=2 or more",
        )
        require(
            heads.draft_vocab < model.vocab_size,
            f"heads.draft_vocab={heads.draft_vocab} must be below model.vocab_size={model.vocab_size}; use 0 for the "
            "whole vocabulary",
        )

    def _check_blocks(self) -> None:
        """What heads ask of the trunk's blocks, or of the blocks that are described for them."""
        model = self.model
        heads = self.heads
        require(
            model.is_stack or not heads.facts.in_trunk,
            f"heads.kind={heads.kind!r} runs its tokens through the model's blocks, and {type(model).__name__} has no "
            "stack of decoder blocks; use another kind",
        )
        require(
            model.is_stack or heads.init != "copy_block",
            f"heads.init='copy_block' copies a block of the model, and {type(model).__name__} has no stack of decoder "
            "blocks; use init='random' or 'zero'",
        )
        for name in ("d_model", "dtype", "param_dtype"):
            ours = getattr(model, name)
            theirs = getattr(model.block, name)
            require(
                ours == theirs,
                f"model.block.{name}={theirs!r} differs from model.{name}={ours!r}; blocks of heads compute with the "
                "trunk's states, so make them equal",
            )

    @property
    def tap(self) -> int:
        """Number of blocks below the tapped state: 0..L."""
        return self.heads.tap if self.heads.tap >= 0 else self.model.num_layers + self.heads.tap


def equal_parameter_layers(total_layers: int, num_future: int) -> int:
    """Number of trunk layers for which the model with heads has as many parameters as a plain model.

    Each extra parallel head has one block, so `num_future - 1` blocks move from the trunk into the heads
    (Gloeckle et al. 2024, section 2): 32 layers with 4 heads give a trunk of 29 layers and 3 heads of one block.

    Args:
      total_layers: number of layers of the plain model.
      num_future: M, number of heads, head 0 included.

    Returns:
      `model.num_layers` for the model with heads.
    """
    layers = total_layers - (num_future - 1)
    if layers < 1:
        raise UserError(
            f"equal_parameter_layers: {total_layers} layers are too few to give one to each of {num_future - 1} extra "
            f"heads and keep one for the trunk; use num_future <= {total_layers}"
        )
    return layers


def check_divisible(arch: Arch, width: int, tensor: int) -> None:
    """Refuses a model that does not divide over the devices.

    Args:
      arch: the model and its heads.
      width: number of devices that d_model is split over.
      tensor: number of devices that the vocabulary, the attention heads and the feed-forward width are split over.
    """
    model = arch.model
    # The vocabulary is the model's alone; `block` may describe no more than blocks of heads.
    names = [*model.split_fields, *(f"block.{name}" for name in model.block.split_fields if name != "vocab_size")]
    for name in names:
        value = operator.attrgetter(name)(model)
        require(value % tensor == 0, f"model.{name}={value} does not divide over mesh.tensor={tensor} devices")
    rows = arch.heads.draft_vocab
    require(rows % tensor == 0, f"heads.draft_vocab={rows} does not divide over mesh.tensor={tensor} devices")
    require(
        model.d_model % width == 0,
        f"model.d_model={model.d_model} does not divide over mesh.fsdp * mesh.context = {width} devices",
    )
    for path, block in (model.stacks | model.frozen_models).items():
        require(
            block.d_model % width == 0,
            f"model.{path.removesuffix('/blocks')}.d_model={block.d_model} does not divide over mesh.fsdp * "
            f"mesh.context = {width} devices",
        )
