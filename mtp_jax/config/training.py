"""The `train` section: length and batch size of a run, what it trains, and when it evaluates and saves."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require
from mtp_jax.config.trainable import TrainRule, read_rules


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training run."""

    steps: int = 1000
    """Number of optimizer steps."""
    batch_size: int = 16
    """B, number of rows per optimizer step, over all devices and micro-batches."""
    grad_accum: int = 1
    """Number of micro-batches per optimizer step. It changes the memory use but not the result, so it may change
    when a run continues. `loss.entropy` with entropy_scope='microbatch' is an exception, because it selects tokens
    within a micro-batch."""
    trainable: str | tuple[str, ...] = "all"
    """What is trained. Nothing else has a gradient or an optimizer state. Use `all`, or `heads` for the extra heads
    alone (give the trained model with `init_from`), `lora` for the adapters of the `lora` section, or one or several
    regular expressions over parameter paths such as `blocks/attn/q`. `PATTERN=0.1` trains at a tenth of the learning
    rate. If several patterns match a parameter, the first one counts. All layers of a stack have one path."""
    init_from: str = ""
    """Workdir of a finished run, or `smollm2`; for `mtp train` also a Hugging Face directory or a GGUF file. The new
    run starts with the parameters of its trunk, and with `init_heads='same'` also with those of its heads. Adapters of
    that run are in the trunk already. Both runs need the same `model` section and the same tokenizer. Once the new run
    has a checkpoint, it does not read this workdir again."""
    entropy_from: str = ""
    """Workdir of a finished run of a byte language model, a decoder LM with data.tokenizer='bytes'. It becomes the
    entropy model of a Byte Latent Transformer, and does not change. `model.entropy` must have the shape of that run's
    model."""
    init_heads: Literal["new", "same"] = "new"
    """new: the heads start as `heads.init` says. same: the heads start as those of `init_from`. Only `heads.tap` and
    `heads.tap_norm` may differ then."""
    heads_first: int = 0
    """Number of steps at the beginning in which only heads learn (Mehra et al. 2025, head warm-up). Then everything
    learns that `trainable` names. The other parameters have their own warm-up of the learning rate after these
    steps."""
    keep_states: bool = False
    """If only heads are trained: run the trunk over the training text once, keep its states on disk (2 states of
    d_model numbers for every token, in `states` of the workdir), and train the heads on them. The trained heads are the
    same. The loss of head 0 does not change in such a run, and only evaluations measure it."""
    seed: int = 0
    """Seed for the initial parameters and for random choices in the loss."""
    log_every: int = 20
    """Number of steps between lines of metrics."""
    eval_every: int = 0
    """Number of steps between evaluations on held-out rows; 0 evaluates only at the end."""
    eval_rows: int = 0
    """Number of held-out rows of an evaluation during training; 0 uses all rows."""
    patience: int = 0
    """End the run when this many evaluations in a row are not better than the best one so far. The checkpoint of the
    best one is kept, and is the one that is opened afterwards. 0 never ends early, and keeps only the newest
    checkpoints."""
    stop_on: Literal["objective", "next_token"] = "objective"
    """What `patience` watches. objective: the held-out losses of all heads, with their weights in the loss (without
    what changes during the run). next_token: the held-out loss of head 0."""
    checkpoint_every: int = 200
    """Number of steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep on disk: the newest ones."""

    def __post_init__(self) -> None:
        check_fields("train", self)
        names = ("steps", "batch_size", "grad_accum", "log_every", "checkpoint_every", "keep_checkpoints")
        positive("train", self, *names)
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}; use a seed from 0 to {2**32 - 1}")
        for name in ("eval_every", "eval_rows", "heads_first", "patience"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}={value} is negative")
        require(
            self.heads_first < self.steps,
            f"train.heads_first={self.heads_first} must be below train.steps={self.steps}: the other parameters learn "
            "in the steps after it",
        )
        only_with("train", self, "patience", self.eval_every > 0, "train.eval_every")
        only_with("train", self, "stop_on", self.patience > 0, "train.patience")
        only_with("train", self, "init_heads", bool(self.init_from), "train.init_from")
        require(
            not (self.entropy_from and self.init_from),
            f"train.entropy_from={self.entropy_from!r} with train.init_from={self.init_from!r}: the model of init_from "
            "has its entropy model already; give one of them",
        )
        read_rules(self.trainable)
        require(
            not (self.heads_first and self.heads_only),
            f"train.heads_first={self.heads_first} has no effect with train.trainable={self.trainable!r}, which trains "
            "only heads; use heads_first=0",
        )
        only_with("train", self, "keep_states", self.heads_only, "train.trainable='heads'")
        require(
            self.batch_size % self.grad_accum == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.grad_accum={self.grad_accum}",
        )

    def rule_of(self, path: str) -> TrainRule | None:
        """The rule by which the parameter at a path such as `blocks/attn/q` is trained; None if it is not."""
        return next((rule for rule in read_rules(self.trainable) if rule.pattern.search(path)), None)

    def learns(self, path: str) -> bool:
        """Whether the parameter at a path is trained."""
        return self.rule_of(path) is not None

    @property
    def heads_only(self) -> bool:
        """Whether nothing but extra heads is trained, so that the next-token path stands still."""
        return all(rule.of_heads for rule in read_rules(self.trainable))
