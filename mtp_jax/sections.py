"""The sections of a config: every setting of a run with its default, and a check of what it may be by itself.

What settings must be together is checked in `config.Config`.
"""

import dataclasses
import typing
from typing import Any, Literal

from mtp_jax.checks import check_fields, only_with, positive, require
from mtp_jax.model_section import ModelConfig as ModelConfig

Family = Literal[
    "parallel", "causal", "anticausal", "linear", "medusa", "sequential", "recursive", "masks", "registers"
]
BLOCK_FAMILIES = ("parallel", "causal", "anticausal", "sequential", "recursive")
CHAINED_TOKENS = ("sequential", "recursive")
BESIDE = ("masks", "registers")
"""Families that run through the model itself, beside its tokens, and read no tap."""


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The extra prediction heads. See `model/heads` for what each family computes."""

    kind: Family = "parallel"
    """Head family."""
    num_future: int = 4
    """M, prediction heads including the next-token head; 1 is a plain language model, to which the other settings of
    heads, and those of their losses, mean nothing."""
    tap: int = -1
    """Blocks of the next-token path below the state that the heads read. Negative counts from the end: -1 is the input
    of the last block (L-1, Gloeckle et al. 2024). `num_layers` is the state after the last block."""
    tap_norm: bool = False
    """Apply the final norm to the tapped state before the heads read it."""
    tap_mix: bool = False
    """Read a learned mix of the normed states below and above every block (Mehra et al. 2025) in place of the state at
    `tap`."""
    layers: int = 1
    """Blocks of one head; residual layers of a medusa head."""
    norm: Literal["shared", "own", "none"] = "shared"
    """What stands before a head's unembedding: the model's final norm, one of its own, or nothing."""
    unembed: Literal["shared", "own"] = "shared"
    """The model's unembedding, or one per head, which starts as a copy of it."""
    draft_vocab: int = 0
    """Heads predict this many tokens only, those that the training text has most often (FR-Spec, arXiv:2502.14856;
    `d2t` of EAGLE-3). Their unembedding, which is most of what a head costs, has that many rows. A target that is not
    among them weighs nothing for a head. 0 is the whole vocabulary."""
    norm_plus_one: bool = False
    """Norms of the heads scale by 1 + w, as in the heads of Qwen3-Next; w starts at 0."""
    residual: bool = False
    """linear: x + W x in place of W x."""
    concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """sequential, recursive: order of the two inputs of the projection. DeepSeek-V3 and Qwen weights have the embedding
    first, MiMo-7B has the hidden state first."""
    input_norm: bool = True
    """sequential, recursive: whether attention in a head reads normed states; EAGLE's head has no norm there, the two
    inputs of its projection being normed."""
    attention: bool = True
    """sequential, recursive: whether a head's block has attention. Without it a head is a projection and a feed-forward
    layer, as in Hydra (arXiv:2402.05109) and the MLP speculator (arXiv:2404.19124). It drafts without a cache, at a
    fraction of the cost."""
    chain: Literal["pre_norm", "post_norm"] = "pre_norm"
    """sequential, recursive: whether the next depth reads a head's state before or after the norm at the head's end."""
    init: Literal["default", "random", "copy_block", "zero"] = "default"
    """random; copy_block: every block of a head starts as a copy of block `init_block` of the model; zero: a head
    starts by passing on what it reads. The projection of a sequential or recursive head passes the hidden state on in
    both. The default is random, and zero for medusa."""
    init_block: int = -1
    """The block that copy_block copies; negative counts from the end (CAFT takes -2)."""
    mask_stride: int = 1
    """masks: in training they stand beside every k-th position only."""
    lora_rank: int = 0
    """masks, registers: rank of the update that the model's matrices have where those stand; 0 is none."""
    lora_alpha: float = 32.0
    """The update counts alpha / rank."""

    def __post_init__(self) -> None:
        check_fields("heads", self)
        positive("heads", self, "num_future", "layers", "mask_stride")
        require(self.draft_vocab >= 0, f"heads.draft_vocab={self.draft_vocab} is negative; 0 drafts over all tokens")
        require(self.lora_rank >= 0, f"heads.lora_rank={self.lora_rank} is negative; 0 switches it off")
        require(self.lora_alpha > 0, f"heads.lora_alpha={self.lora_alpha}; it must be above 0")
        self._belongs("layers", 1, (*BLOCK_FAMILIES, "medusa"))
        self._belongs("residual", False, ("linear",))
        self._belongs("concat", "embedding_first", CHAINED_TOKENS)
        self._belongs("input_norm", True, CHAINED_TOKENS)
        self._belongs("attention", True, CHAINED_TOKENS)
        self._belongs("chain", "pre_norm", CHAINED_TOKENS)
        self._belongs("mask_stride", 1, ("masks",))
        self._belongs("lora_rank", 0, BESIDE)
        taps = [family for family in typing.get_args(Family) if family not in BESIDE]
        for field, default in (("tap", -1), ("tap_norm", False), ("tap_mix", False), ("init", "default")):
            self._belongs(field, default, tuple(taps))
        require(
            self.init != "copy_block" or self.kind in BLOCK_FAMILIES,
            f"heads.init='copy_block', but {self.kind} heads have no block; use one of {', '.join(BLOCK_FAMILIES)}",
        )
        require(
            self.init != "zero" or self.kind != "linear" or self.residual,
            "heads.init='zero' with heads.kind='linear' needs heads.residual=True; a map of zeros predicts nothing",
        )
        require(
            self.attention or self.init != "copy_block",
            "heads.init='copy_block' with heads.attention=False; a copied block has attention, so use init='random'",
        )
        only_with("heads", self, "input_norm", self.attention, "heads.attention: it is attention that would read it")
        own_norms = self.kind in BLOCK_FAMILIES or self.norm == "own"
        only_with("heads", self, "init_block", self.init == "copy_block", "heads.init='copy_block'")
        only_with("heads", self, "lora_alpha", self.lora_rank > 0, "heads.lora_rank")
        only_with("heads", self, "chain", self.norm != "none", "a norm to stand behind: heads.norm='shared' or 'own'")
        only_with("heads", self, "norm_plus_one", own_norms, "heads.norm='own': these heads have no other norm")
        require(
            not (self.tap_mix and self.tap_norm),
            "heads.tap_norm=True with heads.tap_mix=True; the mix is over normed states already",
        )

    @property
    def draft(self) -> bool:
        """Whether there is anything to draft with."""
        return self.num_future > 1 and self.kind != "registers"

    def _belongs(self, field: str, default: Any, kinds: tuple[str, ...]) -> None:
        """A setting that the family would ignore is refused."""
        value = getattr(self, field)
        require(
            value == default or self.kind in kinds,
            f"heads.{field}={value!r} means nothing to heads.kind={self.kind!r}; it belongs to {', '.join(kinds)}",
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Sum over heads of the masked mean loss of each head, times the head's weight, which may change with the step.

    The modules of `losses/` say what each setting computes, where it comes from, and which recipe uses it.
    """

    impl: Literal["fused", "remat"] = "fused"
    """fused: gradients formed in the forward scan over chunks. remat: a checkpoint around each chunk of logits."""
    head_weights: tuple[float, ...] = ()
    """One weight per head; empty means 1 for every head (Gloeckle et al. 2024)."""
    extra_weight: float = 1.0
    """Factor on all extra heads (lambda of DeepSeek-V3, beta of CAFT)."""
    decay: float = 1.0
    """Head m >= 1 counts decay^m (0.8 in Medusa and CAFT)."""
    average_extra: bool = False
    """Divide the extra heads' weights by their number (DeepSeek-V3)."""
    schedule: Literal["constant", "linear", "switch", "sine", "rsine", "forward", "reverse"] = "constant"
    """How the extra heads' weights change over the run; see `losses/schedules.py`."""
    schedule_final: float = 0.0
    """linear, switch: their factor at the end."""
    schedule_at: float = 0.5
    """switch: share of the steps after which it holds."""
    heads_per_step: int = 0
    """Extra heads that train in a step, another random subset in each; 0 is all."""
    distil: Literal["none", "kl", "tv", "lk_alpha", "lk_lambda"] = "none"
    """Teach the extra heads the next-token head's distribution, by this distance; see `losses/objectives.py`."""
    distil_mix: float = 1.0
    """Share of the distance in an extra head's loss; the rest is cross-entropy."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary."""
    token_order: float = 0.0
    """Weight of the token order loss (TOP); above 0 the model has one more unembedding, used in training only."""
    order_window: int = 32
    """Positions ahead that the token order loss ranks."""
    entropy: Literal["none", "keep_top", "drop_top", "soft"] = "none"
    """Weigh tokens by entropy; experimental, see `losses/entropy.py`."""
    entropy_fraction: float = 0.2
    """Of the counted tokens, how many are kept or dropped."""
    entropy_source: Literal["own", "next_token"] = "next_token"
    """Whose entropy."""
    entropy_normaliser: Literal["selected", "all"] = "selected"
    """What the sum over the selected tokens is divided by."""
    entropy_temperature: float = 1.0
    """soft: tokens weigh exp(H / temperature)."""
    teacherless: int = -1
    """The token that stands in for every input token behind the prompt, so that all of them are predicted at once from
    the prompt (Bachmann & Nagarajan 2024); needs data.prompt_tokens. Such a model's answer is read from its logits over
    prompt and dummies, not from `generate`, which feeds tokens. -1 feeds the tokens themselves."""
    z_loss: float = 0.0
    """Coefficient of logsumexp(logits)^2, weighted like the cross-entropy."""
    chunk_bytes: int = 0
    """Most bytes of float32 logits alive at once on one device; 0 suits it to the device."""
    skip: bool = True
    """Leave tokens without weight out of the logits, and end with the last one that has any."""
    gather: Literal["step", "chunk"] = "step"
    """Under FSDP: the unembedding is gathered once per step, or for every chunk, so that no device holds a float32
    gradient of all of it, nor all of it beyond a chunk."""

    def __post_init__(self) -> None:
        check_fields("loss", self)
        positive("loss", self, "order_window")
        switched = "z_loss extra_weight decay token_order schedule_final heads_per_step chunk_bytes"
        for name in switched.split():
            value = getattr(self, name)
            require(value >= 0, f"loss.{name}={value} is negative; 0 switches it off")
        for name in ("label_smoothing", "distil_mix", "schedule_at", "entropy_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"loss.{name}={value}; it must lie in [0, 1]")
        require(
            self.entropy_temperature >= 1e-6,
            f"loss.entropy_temperature={self.entropy_temperature}; it must be at least 1e-6",
        )
        require(
            (self.entropy, self.entropy_fraction) not in (("keep_top", 0.0), ("drop_top", 1.0)),
            f"loss.entropy_fraction={self.entropy_fraction} with loss.entropy={self.entropy!r} leaves nothing to learn",
        )
        select = self.entropy in ("keep_top", "drop_top")
        moves = self.schedule in ("linear", "switch")
        only_with("loss", self, "gather", self.impl == "fused", "loss.impl='fused'")
        only_with("loss", self, "distil_mix", self.distil != "none", "loss.distil")
        only_with("loss", self, "schedule_final", moves, "loss.schedule='linear' or 'switch'")
        only_with("loss", self, "schedule_at", self.schedule == "switch", "loss.schedule='switch'")
        only_with("loss", self, "order_window", self.token_order > 0, "loss.token_order")
        only_with("loss", self, "entropy_fraction", select, "loss.entropy='keep_top' or 'drop_top'")
        only_with("loss", self, "entropy_temperature", self.entropy == "soft", "loss.entropy='soft'")
        only_with("loss", self, "entropy_source entropy_normaliser", self.entropy != "none", "loss.entropy")
        require(self.teacherless >= -1, f"loss.teacherless={self.teacherless}; give a token id, or -1 to switch it off")
        require(
            not self.head_weights or any(self.head_weights),
            f"loss.head_weights={self.head_weights} silences every head; at least one must be above 0",
        )
        negative = [w for w in self.head_weights if w < 0]
        require(not negative, f"loss.head_weights={self.head_weights} holds a negative weight; use 0 to silence a head")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    source: str = "stdlib"
    """`stdlib` (the running Python's standard library), a directory, glob, text file, `.jsonl` or `.json` of records,
    `.npy` of token ids, or `synthetic:TASK:option=value,...` (see `data/synthetic.py`)."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-pair tokenizer of model.vocab_size on the corpus, `bytes` is one token per byte, `none` takes
    a `.npy` as it is, anything else is the path of a `tokenizer.json`."""
    special_tokens: Literal["auto", "read", "text"] = "auto"
    """What a special token that a text spells (`<|im_start|>`) becomes, in documents and prompts alike. read: that
    token, as chat text needs it. text: the tokens of its characters, so that no document can forge its own end. auto:
    as the tokenizer says, which is read for that of a Hugging Face model or of an import, and text for bpe, bytes and a
    `tokenizer.json` alone."""
    chat_template: str = ""
    """Writes `messages` as text: `plain`, a Jinja file, or a directory with a tokenizer; by default the tokenizer's."""
    seq_len: int = 256
    """Tokens of a row (T)."""
    prompt_tokens: int = 0
    """Tokens at the start of every document that are context only: no head learns to predict them."""
    eval_fraction: float = 0.05
    """Share of the documents held out, whole documents at a time."""
    seed: int = 0
    """Seed of the held-out choice and of the row order."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(self.prompt_tokens >= 0, f"data.prompt_tokens={self.prompt_tokens} is negative; 0 learns every token")
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len}; a row needs at least 2 tokens to hold one target")
        require(
            0 < self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction}; it must lie between 0 and 1, for example 0.05",
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon", "adafactor", "lion", "schedule_free"] = "adamw"
    """adamw; muon: orthogonalised momentum for the matrices inside blocks and AdamW for everything else; adafactor:
    second moments as a row and a column for each matrix whose sides are 128 or more, and no first moments (Shazeer &
    Stern 2018); lion: the sign of the momentum (Chen et al. 2023); schedule_free: AdamW whose momentum is an average of
    all steps, in place of a decay (Defazio et al. 2024)."""
    learning_rate: float = 3e-3
    """Peak learning rate. That of adafactor is relative to the root mean square of a parameter, the layers of a stack
    taken together. lion needs a third to a tenth of AdamW's."""
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices under muon."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate of the last step as a share of the peak."""
    decay_start: float = 0.0
    """Share of the steps after warm-up that stay at the peak before the decay begins."""
    b1: float = 0.9
    """How much of the momentum stays; in schedule_free the share of the average in the point where gradients are
    taken. adafactor has none."""
    b2: float = 0.95
    """How much of the squared gradients' average stays, in lion of the momentum. adafactor has a schedule for it."""
    eps: float = 1e-8
    """adamw, muon, schedule_free: added to what an update is divided by."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the parameters that `no_decay` does not match."""
    no_decay: tuple[str, ...] = ("norm|bias", "embed")
    """Regular expressions over parameter paths such as `blocks/mlp_norm/scale`; a match means no weight decay."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        check_fields("optim", self)
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name}={value}; it must be above 0")
        for name in ("warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name}={value} is negative; 0 switches it off")
        for name in ("b1", "b2", "final_fraction", "decay_start"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}={value}; it must lie in [0, 1]")
        adam = ("adamw", "muon", "schedule_free")
        for fields, names in (("muon_learning_rate", ("muon",)), ("b1 b2", (*adam, "lion")), ("eps", adam)):
            only_with("optim", self, fields, self.name in names, f"optim.name={' or '.join(map(repr, names))}")
        if self.name == "schedule_free":
            require(
                self.schedule == "constant",
                f"optim.schedule={self.schedule!r} with optim.name='schedule_free', which averages in place of a "
                "decay; use optim.schedule='constant'",
            )
            require(self.b1 > 0, f"optim.b1={self.b1} with optim.name='schedule_free'; it must be above 0")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one axis may be -1 for all devices that are left."""

    data: int = 1
    """Rows are split, parameters are copied."""
    fsdp: int = 1
    """Rows and parameters are split (ZeRO 3)."""
    tensor: int = 1
    """Attention heads, feed-forward width and vocabulary are split."""
    context: int = 1
    """Positions of a row are split, and parameters: for rows too long for one device. Attention gathers the keys and
    values of a row, a layer at a time."""

    def __post_init__(self) -> None:
        check_fields("mesh", self)
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size}; use a size of at least 1, or -1 for the rest")
        require(
            list(sizes.values()).count(-1) <= 1, f"mesh has more than one -1 ({sizes}); only one axis can take the rest"
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows per optimizer step, over all devices and micro-batches (B)."""
    grad_accum: int = 1
    """Micro-batches per optimizer step; changes memory, not the result, except that `loss.entropy` chooses within a
    micro-batch. Without that it may change when a run is continued."""
    trainable: Literal["all", "heads"] = "all"
    """heads: the extra heads alone; nothing else has a gradient or an optimizer state. Give them a trained model to
    stand on with `init_from`."""
    init_from: str = ""
    """Workdir of a finished run whose model this one starts from: everything but the heads, and with
    `init_heads='same'` those too. Needs the same `model` section and the same tokenizer. Not read again once the run
    has a checkpoint."""
    init_heads: Literal["new", "same"] = "new"
    """Whether the heads start as `heads.init` says, or as those of `init_from`."""
    keep_states: bool = False
    """With trainable='heads': run the model over the training text once, keep its states on disk (2 states of d_model
    numbers for every token, in `states` of the workdir), and train the heads on those. The heads become the same. The
    next-token loss, which cannot change, is then measured by evaluations only."""
    seed: int = 0
    """Seed of the initial parameters, and of random choices in the loss."""
    log_every: int = 20
    """Steps between lines of metrics."""
    eval_every: int = 0
    """Steps between evaluations on held-out rows; 0 evaluates at the end only."""
    eval_rows: int = 0
    """Held-out rows of an evaluation during training; 0 is all of them."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept on disk."""

    def __post_init__(self) -> None:
        check_fields("train", self)
        names = ("steps", "batch_size", "grad_accum", "log_every", "checkpoint_every", "keep_checkpoints")
        positive("train", self, *names)
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}; use a seed from 0 to {2**32 - 1}")
        for name in ("eval_every", "eval_rows"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} is negative")
        only_with("train", self, "init_heads", bool(self.init_from), "train.init_from")
        only_with("train", self, "keep_states", self.trainable == "heads", "train.trainable='heads'")
        require(
            self.batch_size % self.grad_accum == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.grad_accum={self.grad_accum}",
        )


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Defaults of generation, and the prompts that an evaluation decodes."""

    num_draft: int = -1
    """P, tokens drafted per round, at most M-1; -1 drafts with every head."""
    max_new_tokens: int = 128
    """Tokens generated per prompt."""
    num_prompts: int = 16
    """Held-out prompts that an evaluation decodes."""
    prompt_tokens: int = 64
    """Tokens of each of those prompts."""

    def __post_init__(self) -> None:
        check_fields("decode", self)
        positive("decode", self, "num_prompts", "prompt_tokens")
        require(
            self.max_new_tokens >= 2,
            f"decode.max_new_tokens={self.max_new_tokens}; an evaluation needs 2 or more: one comes with the prompt",
        )
        require(self.num_draft >= -1, f"decode.num_draft={self.num_draft}; use -1 for all heads, or 0 and above")
