"""The `train` section: how long, how much at a time, and what is kept."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require
from mtp_jax.config.trainable import TrainRule, read_rules


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
    trainable: str | tuple[str, ...] = "all"
    """What is trained; nothing else has a gradient or an optimizer state. all; heads: the extra heads alone, in which
    case `init_from` names the trained model that they belong to; or regular expressions over parameter paths such as
    `blocks/attn/q`, one or several. `PATTERN=0.1` trains at a tenth of the learning rate. Of several that match a
    parameter the first decides. All layers of a stack have one path."""
    init_from: str = ""
    """Workdir of a finished run whose model this one starts from: everything but the heads, and with
    `init_heads='same'` those too. Needs the same `model` section and the same tokenizer. Not read again once the run
    has a checkpoint."""
    init_heads: Literal["new", "same"] = "new"
    """Whether the heads start as `heads.init` says, or as those of `init_from`."""
    keep_states: bool = False
    """Where only heads are trained: run the model over the training text once, keep its states on disk (2 states of
    d_model numbers for every token, in `states` of the workdir), and train the heads on those. The heads become the
    same. The next-token loss, which cannot change, is then measured by evaluations only."""
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
        read_rules(self.trainable)
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
