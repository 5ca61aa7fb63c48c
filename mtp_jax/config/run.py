"""A run's config: all sections together, and the checks that settings of different sections fit together."""

import dataclasses

from mtp_jax.config.arch import Arch, check_divisible
from mtp_jax.config.blt import BltConfig
from mtp_jax.config.checks import require
from mtp_jax.config.data import DataConfig
from mtp_jax.config.decode import DecodeConfig
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.lora import LoraConfig, adapted
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.mesh import MeshConfig
from mtp_jax.config.model import ModelConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.config.rl import RLConfig, check_rl
from mtp_jax.config.standalone import check_standalone
from mtp_jax.config.trainable import read_rules
from mtp_jax.config.training import TrainConfig

BYTE_OFFSETS = {"bytes": 0, "blt_bytes": 4}
"""The token id of byte 0, by tokenizer."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The config of one run."""

    model: ModelConfig = ModelConfig()
    """A `ModelConfig`, or the section of another trunk; see `config.trunk`."""
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    lora: LoraConfig = LoraConfig()
    rl: RLConfig = RLConfig()

    @classmethod
    def around(cls, arch: Arch, tokenizer: str) -> "Config":
        """The config for a model that was not trained by a run, for example an import.

        The other sections have their defaults, with shorter lengths where the model's `max_seq_len` needs it.

        Args:
          arch: the model and its heads.
          tokenizer: value of `data.tokenizer`.
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
        self._check_patches()
        self._check_drafts()
        self._check_objective()
        self._check_frozen()
        self._check_heads_alone()
        self._check_adapters()
        check_standalone(self.heads, self.loss, self.data, self.mesh)
        check_rl(self.rl, self.heads, self.loss, self.data, self.optim, self.train)
        self._check_learning_heads()
        self._check_mesh(arch)

    def _check_rows(self) -> None:
        """Checks lengths of rows, prompts and outputs."""
        model = self.model
        heads = self.heads
        data = self.data
        decode = self.decode
        require(
            heads.num_future < data.seq_len,
            f"heads.num_future={heads.num_future} must be below data.seq_len={data.seq_len}, because head m predicts "
            "m+1 tokens ahead within a row; use longer rows or fewer heads",
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
            f"data.prompt_tokens={data.prompt_tokens} leaves nothing to learn in rows of data.seq_len={data.seq_len}",
        )
        longest = decode.prompt_tokens + decode.max_new_tokens
        require(
            longest <= model.max_seq_len,
            f"decode.prompt_tokens + decode.max_new_tokens = {longest} is above model.max_seq_len={model.max_seq_len}",
        )

    def _check_patches(self) -> None:
        """Checks that a rule that looks at bytes finds them where the tokenizer puts them."""
        if not isinstance(self.model, BltConfig) or self.data.tokenizer not in BYTE_OFFSETS:
            return
        rule = self.model.patches
        first = BYTE_OFFSETS[self.data.tokenizer]
        require(
            rule.byte_offset == first or not rule.reads_bytes,
            f"model.patches.byte_offset={rule.byte_offset}, but byte 0 is id {first} of data.tokenizer="
            f"{self.data.tokenizer!r}; set byte_offset={first}",
        )

    def _check_drafts(self) -> None:
        """Checks that the heads can make the drafts."""
        heads = self.heads
        decode = self.decode
        require(
            heads.draft or heads.num_future == 1 or decode.num_draft < 1,
            f"decode.num_draft={decode.num_draft}, but heads.kind={heads.kind!r} cannot draft; use 0 or -1",
        )
        require(
            decode.num_draft < heads.num_future,
            f"decode.num_draft={decode.num_draft}, but heads.num_future={heads.num_future} heads draft at most "
            f"{heads.num_future - 1} tokens",
        )

    def _check_objective(self) -> None:
        """Checks that the objective fits the model, the data and the optimizer."""
        model = self.model
        heads = self.heads
        loss = self.loss
        data = self.data
        require(
            len(loss.head_weights) in (0, heads.num_future),
            f"loss.head_weights has {len(loss.head_weights)} values for heads.num_future={heads.num_future} heads; "
            "give one per head, or none",
        )
        require(
            self._learns_extra or self.head_weights[0] > 0,
            f"loss.head_weights={loss.head_weights}, loss.extra_weight={loss.extra_weight} and loss.decay={loss.decay} "
            "switch every head off; at least one must have a weight above 0",
        )
        require(
            heads.num_future == 1 or loss.heads_per_step < heads.num_future,
            f"loss.heads_per_step={loss.heads_per_step}, but heads.num_future={heads.num_future} has "
            f"{heads.num_future - 1} extra heads; 0 trains all of them",
        )
        require(
            loss.teacherless < model.vocab_size,
            f"loss.teacherless={loss.teacherless} must be a token id below model.vocab_size={model.vocab_size}",
        )
        require(
            loss.teacherless < 0 or data.prompt_tokens > 0,
            f"loss.teacherless={loss.teacherless} replaces the tokens after the prompt; set data.prompt_tokens to the "
            "length of the prompt",
        )
        require(
            self.optim.name != "schedule_free" or model.param_dtype == "float32",
            f"optim.name='schedule_free' with model.param_dtype={model.param_dtype!r}: the average of many steps needs "
            "float32; use model.param_dtype='float32'",
        )

    def _check_frozen(self) -> None:
        """Checks that a frozen model that is given has a place."""
        given = self.train.entropy_from
        require(
            not given or bool(self.model.frozen_models),
            f"train.entropy_from={given!r} has no effect: this model has no entropy model; leave it out",
        )

    def _check_heads_alone(self) -> None:
        """Checks that heads can learn where nothing else does: in the whole run, or in its first steps."""
        heads = self.heads
        loss = self.loss
        train = self.train
        require(
            not train.heads_only or heads.num_future > 1,
            f"train.trainable={train.trainable!r}, but heads.num_future=1 has no extra head; use num_future=2 or more",
        )
        require(
            not train.heads_only or heads.facts.drafts,
            f"train.trainable={train.trainable!r} with heads.kind={heads.kind!r}: these heads help only while the "
            "trunk is trained; use train.trainable='all'",
        )
        require(
            not train.heads_only or self._learns_extra,
            f"train.trainable={train.trainable!r}, but loss.head_weights={loss.head_weights}, loss.extra_weight="
            f"{loss.extra_weight} and loss.decay={loss.decay} switch every extra head off",
        )
        require(
            not train.heads_only or not loss.token_order,
            f"loss.token_order={loss.token_order} trains the trunk, but train.trainable={train.trainable!r}; use "
            "train.trainable='all', or loss.token_order=0",
        )
        moves = "heads.tap_mix=True" if heads.tap_mix else f"heads.kind={heads.kind!r}"
        require(
            not train.keep_states or not (heads.tap_mix or heads.facts.in_trunk),
            f"train.keep_states=True, but with {moves} the states change while the heads learn; use keep_states=False",
        )
        require(
            not train.heads_first or (heads.num_future > 1 and heads.facts.drafts),
            f"train.heads_first={train.heads_first} with heads.kind={heads.kind!r} and heads.num_future="
            f"{heads.num_future}: there is no head that can learn alone; use heads_first=0",
        )
        require(
            not train.heads_first or self.optim.name != "schedule_free",
            f"train.heads_first={train.heads_first} with optim.name='schedule_free', which averages all steps; use "
            "another optimizer",
        )
        require(
            not train.heads_first or not loss.token_order,
            f"loss.token_order={loss.token_order} trains the trunk, but in the first train.heads_first="
            f"{train.heads_first} steps only heads learn; use heads_first=0, or loss.token_order=0",
        )

    def _check_adapters(self) -> None:
        """Checks that adapters have matrices, are trained, and that their matrices are not."""
        lora = self.lora
        train = self.train
        asked = f"train.trainable={train.trainable!r}"
        if not lora.rank:
            named = any(rule.of_adapters for rule in read_rules(train.trainable))
            require(not named, f"{asked}, but lora.rank=0 has no adapters; set lora.rank, for example to 8")
            return
        require(
            not self.heads.lora_rank,
            f"lora.rank={lora.rank} with heads.lora_rank={self.heads.lora_rank}: heads.lora_rank is for a model that "
            "stands still; use one of them",
        )
        for path in adapted(lora, self.model, self.heads):
            require(
                not train.learns(path),
                f"{asked} trains {path} itself, and lora.rank={lora.rank} gives it an adapter; use 'lora', which "
                "trains the adapters alone, or lora.rank=0",
            )
            require(
                train.learns(f"lora/{path}/b"),
                f"{asked} does not train lora/{path}/b, so this adapter of lora.rank={lora.rank} would have no effect; "
                "use 'lora', or ('lora', ...) with further patterns",
            )

    def _check_learning_heads(self) -> None:
        """Checks that heads which shall learn in reinforcement have a parameter that is trained, and a weight."""
        if not self.rl.head_loss:
            return
        asked = f"rl.head_loss={self.rl.head_loss}"
        rules = read_rules(self.train.trainable)
        adapters = self.lora.rank and any(
            path.startswith("heads/") for path in adapted(self.lora, self.model, self.heads)
        )
        require(
            any(rule.of_heads or rule.pattern.search("heads/") for rule in rules) or bool(adapters),
            f"{asked}, but train.trainable={self.train.trainable!r} trains no head; add 'heads' to it, or use "
            "head_loss=0",
        )
        require(
            self._learns_extra,
            f"{asked}, but loss.head_weights={self.loss.head_weights}, loss.extra_weight={self.loss.extra_weight} and "
            f"loss.decay={self.loss.decay} switch every extra head off",
        )

    def _check_mesh(self, arch: Arch) -> None:
        """Checks that sizes which are split over devices divide by the number of devices."""
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
        """The model and its heads."""
        return Arch(self.model, self.heads)

    @property
    def optimizer_steps(self) -> int:
        """Number of optimizer steps of the run. In reinforcement, one of `train.steps` may have several."""
        return self.train.steps * (self.rl.updates if self.rl.task else 1)

    @property
    def heads_stand_still(self) -> bool:
        """Whether the extra heads keep their parameters while the model learns by reinforcement."""
        return bool(self.rl.task) and self.rl.head_loss == 0

    @property
    def has_token_order(self) -> bool:
        """Whether there is an unembedding for the token order loss, a parameter that only training uses."""
        return self.loss.token_order > 0

    @property
    def has_teacher(self) -> bool:
        """Whether a standalone model learns from a teacher: the trunk at the start of the run."""
        return self.heads.facts.stands_alone and self.heads.num_future > 1 and self.loss.teacher != "none"

    @property
    def has_reference(self) -> bool:
        """Whether reinforcement keeps its distance from a reference: the trunk at the start of the run."""
        return bool(self.rl.task) and self.rl.kl > 0

    @property
    def copies_teacher(self) -> bool:
        """Whether the teacher or the reference is a copy, which only training uses. If no rule trains the trunk, the
        trunk itself is the teacher or the reference."""
        rules = read_rules(self.train.trainable)
        return (self.has_teacher or self.has_reference) and not all(rule.of_heads or rule.of_adapters for rule in rules)

    @property
    def head_weights(self) -> tuple[float, ...]:
        """Base weight of every head, before `extra_weight`, `decay` and the schedule; length M."""
        return self.loss.head_weights or (1.0,) * self.heads.num_future

    @property
    def num_draft(self) -> int:
        """P, number of drafts per round by default; 0 if the heads cannot draft."""
        if not self.heads.draft:
            return 0
        return self.heads.num_future - 1 if self.decode.num_draft < 0 else self.decode.num_draft

    @property
    def _learns_extra(self) -> bool:
        """Whether an extra head has a weight in the loss."""
        return any(self.head_weights[1:]) and self.loss.extra_weight > 0 and self.loss.decay > 0
