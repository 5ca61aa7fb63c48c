"""A run's config: its sections together. Settings of several sections that must fit together are checked here."""

import dataclasses

from mtp_jax.config.arch import Arch, check_divisible
from mtp_jax.config.checks import require
from mtp_jax.config.data import DataConfig
from mtp_jax.config.decode import DecodeConfig
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.mesh import MeshConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.config.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    """A `ModelConfig`, or the section of another trunk; see `config.trunk`."""
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()

    @classmethod
    def around(cls, arch: Arch, tokenizer: str) -> "Config":
        """The defaults of a run, shortened where they do not fit the longest row of a model that we did not train.

        Args:
          arch: the model and its heads.
          tokenizer: `data.tokenizer`.
        """
        longest = arch.model.max_seq_len
        decode = DecodeConfig()
        if decode.prompt_tokens + decode.max_new_tokens > longest:
            decode = DecodeConfig(prompt_tokens=max(longest // 3, 1), max_new_tokens=max(longest // 3, 2))
        data = DataConfig(tokenizer=tokenizer, seq_len=min(DataConfig.seq_len, longest))
        return cls(model=arch.model, heads=arch.heads, data=data, decode=decode)

    def __post_init__(self) -> None:
        arch = self.arch
        self._check_rows()
        self._check_drafts()
        self._check_training()
        self._check_mesh(arch)

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

    def _check_drafts(self) -> None:
        """How many drafts the heads can make."""
        heads = self.heads
        decode = self.decode
        require(
            heads.draft or heads.num_future == 1 or decode.num_draft < 1,
            f"decode.num_draft={decode.num_draft}, but heads.kind={heads.kind!r} drafts nothing; use 0 or -1",
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
            train.trainable == "all" or heads.num_future > 1,
            "train.trainable='heads', but heads.num_future=1 has no extra head; use num_future=2 or more",
        )
        require(
            train.trainable == "all" or heads.facts.drafts,
            f"train.trainable='heads' with heads.kind={heads.kind!r} trains nothing that is used afterwards; train all",
        )
        extra = any(self.head_weights[1:]) and loss.extra_weight > 0 and loss.decay > 0
        require(
            train.trainable == "all" or extra,
            f"train.trainable='heads', but loss.head_weights={loss.head_weights}, loss.extra_weight="
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
            train.trainable == "all" or not loss.token_order,
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

    def _check_mesh(self, arch: Arch) -> None:
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
        check_divisible(arch, max(mesh.fsdp, 1) * context, max(mesh.tensor, 1))

    @property
    def arch(self) -> Arch:
        """What computes: the model and its heads."""
        return Arch(self.model, self.heads)

    @property
    def has_token_order(self) -> bool:
        """Whether there is an unembedding for the token order objective, a parameter of training alone."""
        return self.loss.token_order > 0

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
