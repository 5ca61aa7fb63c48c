"""A run's config: its sections together. What settings must be together is checked here."""

import dataclasses

from mtp_jax.config.checks import require
from mtp_jax.config.data import DataConfig
from mtp_jax.config.decode import DecodeConfig
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.mesh import MeshConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.config.training import TrainConfig
from mtp_jax.errors import UserError


def equal_parameter_layers(total_layers: int, num_future: int) -> int:
    """Layers of the next-token path that leave the parameter count of a plain `total_layers` model unchanged.

    Each extra parallel head owns one block, so `num_future - 1` blocks move from the trunk into the heads
    (Gloeckle et al. 2024, section 2): 32 layers with 4 heads are a 29-layer LM and 3 one-block heads.

    Args:
      total_layers: layers of the plain model that sets the parameter budget.
      num_future: M, prediction heads including the next-token head.

    Returns:
      `model.num_layers` for the model with heads.
    """
    layers = total_layers - (num_future - 1)
    if layers < 1:
        raise UserError(
            f"equal_parameter_layers: {total_layers} layers cannot give one block to each of {num_future - 1} extra "
            f"heads and keep one; use num_future <= {total_layers}"
        )
    return layers


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()

    def __post_init__(self) -> None:
        self._check_rows()
        self._check_heads()
        self._check_training()
        self._check_mesh()

    def _check_rows(self) -> None:
        """Lengths of rows, prompts and outputs."""
        model = self.model
        heads = self.heads
        data = self.data
        decode = self.decode
        require(
            heads.num_future < data.seq_len,
            f"heads.num_future={heads.num_future} needs rows longer than that, but data.seq_len={data.seq_len}; "
            "head m predicts m+1 tokens ahead within a row",
        )
        require(
            data.seq_len <= model.max_seq_len,
            f"data.seq_len={data.seq_len} is above model.max_seq_len={model.max_seq_len}",
        )
        require(
            data.seq_len >= heads.mask_stride,
            f"heads.mask_stride={heads.mask_stride} is above data.seq_len={data.seq_len}",
        )
        require(
            data.prompt_tokens < data.seq_len,
            f"data.prompt_tokens={data.prompt_tokens} leaves nothing to learn of rows of data.seq_len={data.seq_len}",
        )
        longest = decode.prompt_tokens + decode.max_new_tokens
        require(
            longest <= model.max_seq_len,
            f"decode.prompt_tokens + decode.max_new_tokens = {longest} is above model.max_seq_len={model.max_seq_len}",
        )

    def _check_heads(self) -> None:
        """Heads that the model can carry, and drafts that they can make."""
        model = self.model
        heads = self.heads
        decode = self.decode
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
            heads.lora_rank == 0 or model.num_experts == 0,
            f"heads.lora_rank={heads.lora_rank} with model.num_experts={model.num_experts}: LoRA of experts is not "
            "implemented; use lora_rank=0",
        )
        require(
            heads.lora_rank == 0 or model.gated,
            f"heads.lora_rank={heads.lora_rank} with model.gated=False: LoRA of ungated layers is not implemented; use "
            "lora_rank=0",
        )
        require(
            heads.draft or heads.num_future == 1 or decode.num_draft < 1,
            f"decode.num_draft={decode.num_draft}, but heads.kind={heads.kind!r} drafts nothing; use 0 or -1",
        )
        require(
            heads.input_norm or model.norm_position == "pre",
            f"heads.input_norm=False needs blocks with model.norm_position='pre', not {model.norm_position!r}",
        )
        require(
            not heads.draft_vocab or heads.num_future > 1,
            f"heads.draft_vocab={heads.draft_vocab} is for extra heads, and heads.num_future=1 has none; use 2 or more",
        )
        require(
            heads.draft_vocab < model.vocab_size,
            f"heads.draft_vocab={heads.draft_vocab} must be below model.vocab_size={model.vocab_size}; 0 drafts over "
            "all tokens",
        )
        require(
            decode.num_draft < heads.num_future,
            f"decode.num_draft={decode.num_draft}, but heads.num_future={heads.num_future} heads draft at most "
            f"{heads.num_future - 1} tokens",
        )

    def _check_training(self) -> None:
        """Objectives and what they train."""
        model = self.model
        heads = self.heads
        loss = self.loss
        data = self.data
        train = self.train
        require(
            len(loss.head_weights) in (0, heads.num_future),
            f"loss.head_weights has {len(loss.head_weights)} values for heads.num_future={heads.num_future} heads; "
            "give one per head, or none",
        )
        require(
            not train.heads_only or heads.num_future > 1,
            f"train.trainable={train.trainable!r}, but heads.num_future=1 has no extra head; use num_future=2 or more",
        )
        require(
            not train.heads_only or heads.facts.drafts,
            f"train.trainable={train.trainable!r} with heads.kind={heads.kind!r} trains nothing that is used "
            "afterwards; train all",
        )
        extra = any(self.head_weights[1:]) and loss.extra_weight > 0 and loss.decay > 0
        require(
            not train.heads_only or extra,
            f"train.trainable={train.trainable!r}, but loss.head_weights={loss.head_weights}, loss.extra_weight="
            f"{loss.extra_weight} and loss.decay={loss.decay} silence every extra head",
        )
        require(
            extra or self.head_weights[0] > 0,
            f"loss.head_weights={loss.head_weights}, loss.extra_weight={loss.extra_weight} and loss.decay={loss.decay} "
            "silence every head; at least one must count",
        )
        require(
            heads.num_future == 1 or loss.heads_per_step < heads.num_future,
            f"loss.heads_per_step={loss.heads_per_step}, but heads.num_future={heads.num_future} has "
            f"{heads.num_future - 1} extra heads; 0 trains all of them",
        )
        require(
            not train.heads_only or not loss.token_order,
            f"loss.token_order={loss.token_order} trains the model's own states; use train.trainable='all', or 0",
        )
        moves = "heads.tap_mix=True" if heads.tap_mix else f"heads.kind={heads.kind!r}"
        require(
            not train.keep_states or not (heads.tap_mix or heads.facts.in_trunk),
            f"train.keep_states=True, but with {moves} the model does not stand still while heads learn; use False",
        )
        require(
            loss.teacherless < model.vocab_size,
            f"loss.teacherless={loss.teacherless} is no token of model.vocab_size={model.vocab_size}",
        )
        require(
            loss.teacherless < 0 or data.prompt_tokens > 0,
            "loss.teacherless replaces what follows the prompt; say with data.prompt_tokens how long prompts are",
        )
        require(
            self.optim.name != "schedule_free" or model.param_dtype == "float32",
            f"optim.name='schedule_free' with model.param_dtype={model.param_dtype!r}: an average of many steps needs "
            "float32; use model.param_dtype='float32'",
        )

    def _check_mesh(self) -> None:
        """What is split over devices divides over them."""
        data = self.data
        train = self.train
        mesh = self.mesh
        micro = train.batch_size // train.grad_accum
        rows = max(mesh.data, 1) * max(mesh.fsdp, 1)
        require(
            micro % rows == 0,
            f"a micro-batch of {micro} rows (train.batch_size / train.grad_accum) does not divide over "
            f"mesh.data * mesh.fsdp = {rows} devices",
        )
        context = max(mesh.context, 1)
        require(
            data.seq_len % context == 0,
            f"data.seq_len={data.seq_len} does not divide over mesh.context={context} devices",
        )
        check_divisible(self, max(mesh.fsdp, 1) * context, max(mesh.tensor, 1))

    @property
    def tap(self) -> int:
        """Blocks below the tapped state, counted from the bottom: 0..L."""
        return self.heads.tap if self.heads.tap >= 0 else self.model.num_layers + self.heads.tap

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Weight of every head before any schedule, length M."""
        return self.loss.head_weights or (1.0,) * self.heads.num_future

    @property
    def num_draft(self) -> int:
        """P, tokens drafted per round by default; 0 where nothing drafts."""
        if not self.heads.draft:
            return 0
        return self.heads.num_future - 1 if self.decode.num_draft < 0 else self.decode.num_draft


def check_divisible(config: Config, width: int, tensor: int) -> None:
    """Refuses a model whose width does not split over so many devices, or its heads and the like over so many."""
    model = config.model
    for name in ("vocab_size", "num_heads", "num_kv_heads", "d_ff"):
        value = getattr(model, name)
        require(value % tensor == 0, f"model.{name}={value} does not divide over mesh.tensor={tensor} devices")
    rows = config.heads.draft_vocab
    require(rows % tensor == 0, f"heads.draft_vocab={rows} does not divide over mesh.tensor={tensor} devices")
    require(
        model.d_model % width == 0,
        f"model.d_model={model.d_model} does not divide over mesh.fsdp * mesh.context = {width} devices",
    )
