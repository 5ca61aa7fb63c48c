"""The `rl` section: reinforcement with rewards that are computed, and the checks that the other sections fit to it."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require
from mtp_jax.config.data import DataConfig
from mtp_jax.config.heads import HeadsConfig
from mtp_jax.config.loss import LossConfig
from mtp_jax.config.optim import OptimConfig
from mtp_jax.config.training import TrainConfig


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Reinforcement with `mtp rl`. Without `task` it is off.

    A step draws prompts, samples several responses of each (a group), gives each response a reward, and then makes
    `updates` steps of the optimizer. `train.steps` counts these batches of responses. `train.batch_size` is the number
    of responses in one step of the optimizer. GRPO is arXiv:2402.03300, Dr. GRPO 2503.20783, DAPO 2503.14476.
    """

    task: str = ""
    """A `.jsonl` of questions, with fields as `mtp eval --task` reads them, or `arithmetic`. Empty: reinforcement is
    off."""
    eval_task: str = ""
    """The questions of evaluations, given like `task`. Empty: the share `data.eval_fraction` of the questions of `task`
    is held out for this."""
    reward: str = ""
    """What a response is rewarded for: the name of a verifier, or FILE.py:NAME."""
    chat: bool = False
    """Put each prompt into the chat template, as the message of a user."""
    prompts: int = 2
    """Number of prompts of a step."""
    samples: int = 8
    """Number of responses to each prompt."""
    max_new_tokens: int = 128
    """Largest number of tokens of a response. Prompt and response together must fit into data.seq_len."""
    temperature: float = 1.0
    """Temperature at which responses are sampled. The probabilities of the loss are at this temperature, too."""
    top_p: float = 1.0
    """Sample only from the most likely tokens that together have this probability. The probabilities of the loss do not
    have this limit, so below 1 they are not exactly those of the samples."""
    draft: Literal["auto", "heads", "lookup", "heads+lookup", "none"] = "auto"
    """Where drafts come from. Responses are the same with any of them. auto: heads, or lookup without extra heads."""
    advantage: Literal["group_std", "group_mean"] = "group_std"
    """The advantage of a response is its reward minus the mean of its group, divided by the standard deviation of the
    group (group_std, GRPO) or not (group_mean, Dr. GRPO)."""
    clip_low: float = 0.2
    """The ratio of new to old probability of a token is limited to at least 1 - clip_low."""
    clip_high: float = 0.28
    """It is limited to at most 1 + clip_high. DAPO has 0.28, GRPO the same as clip_low."""
    dual_clip: float = 0.0
    """With a negative advantage A, the objective of a token is at least dual_clip * A (1912.09729; 10 in 2506.01939). 0
    switches it off."""
    normaliser: Literal["tokens", "sequences"] = "tokens"
    """The loss is the mean over all tokens (tokens, DAPO), or the mean over responses of their means (sequences,
    GRPO)."""
    refills: int = 0
    """Dynamic sampling: replace the groups without any signal, in which all responses are right or all are wrong, by
    groups of further prompts, in at most so many rounds. Groups that are still without signal after the last round are
    left as they are and do not count in the loss. 0: no round, and all groups stay."""
    overlong_buffer: int = 0
    """A response of more than max_new_tokens - overlong_buffer tokens loses a part of its reward, which grows linearly
    to 1 at max_new_tokens. 0 switches it off."""
    kl: float = 0.0
    """Weight of the divergence from the parameters at the start of the run. 0: the run keeps no copy of them."""
    updates: int = 1
    """Optimizer steps per step. Each takes train.batch_size responses. Together they take every response equally often,
    in an order that is drawn anew for each pass."""
    entropy: Literal["none", "keep_top", "drop_top", "random"] = "none"
    """Learn only from the tokens with the highest entropy (keep_top, 2506.01939), from all others (drop_top), or from
    as many tokens that are drawn at random."""
    entropy_fraction: float = 0.2
    """Share of the tokens that have the highest entropy, or are drawn."""
    entropy_selection: Literal["exact", "threshold"] = "exact"
    """exact: exactly this share. threshold: all tokens with at least the entropy of this quantile, ties included."""
    entropy_scope: Literal["microbatch", "batch"] = "batch"
    """Among which tokens the share is taken: those of a micro-batch, or of all responses of the optimizer step."""
    entropy_normaliser: Literal["selected", "all"] = "selected"
    """The sum over the selected tokens is divided by their number (selected) or by the number of all tokens (all)."""
    head_loss: float = 0.0
    """Weight of the loss by which the extra heads learn the responses. It changes the heads alone. 0: they stand still,
    and their drafts get worse while the model changes."""
    eval_prompts: int = 64
    """Number of prompts of an evaluation."""
    eval_samples: int = 4
    """Number of sampled responses to each of them, in addition to the most likely one."""
    formats: str = ""
    """What says in which format a response is: the name of a classifier, or FILE.py:NAME. Empty: formats are not
    counted."""

    def __post_init__(self) -> None:
        check_fields("rl", self)
        names = [field.name for field in dataclasses.fields(self) if field.name != "task"]
        only_with("rl", self, " ".join(names), bool(self.task), "rl.task")
        positive("rl", self, "prompts", "max_new_tokens", "updates", "eval_prompts", "eval_samples")
        require(
            self.samples >= 2,
            f"rl.samples={self.samples}; a group needs 2 or more, because responses are compared with each other",
        )
        require(self.temperature > 0, f"rl.temperature={self.temperature}; it must be above 0")
        require(0 < self.top_p <= 1, f"rl.top_p={self.top_p}; it must be above 0 and at most 1")
        for name in ("clip_high", "kl", "head_loss", "refills", "overlong_buffer"):
            value = getattr(self, name)
            require(value >= 0, f"rl.{name}={value} is negative")
        require(0 <= self.clip_low <= 1, f"rl.clip_low={self.clip_low}; it must be in [0, 1]")
        require(
            self.dual_clip == 0 or self.dual_clip > 1,
            f"rl.dual_clip={self.dual_clip}; it must be above 1, or 0 to switch it off",
        )
        require(
            self.overlong_buffer < self.max_new_tokens,
            f"rl.overlong_buffer={self.overlong_buffer} must be below rl.max_new_tokens={self.max_new_tokens}",
        )
        self._check_entropy()
        require(
            not self.task or bool(self.reward),
            f"rl.task={self.task!r} needs rl.reward, for example rl.reward='number'",
        )

    def _check_entropy(self) -> None:
        masked = self.entropy != "none"
        only_with("rl", self, "entropy_fraction entropy_scope entropy_normaliser", masked, "rl.entropy")
        ranked = self.entropy in ("keep_top", "drop_top")
        only_with("rl", self, "entropy_selection", ranked, "rl.entropy='keep_top' or 'drop_top'")
        require(
            0 <= self.entropy_fraction <= 1,
            f"rl.entropy_fraction={self.entropy_fraction}; it must be in [0, 1]",
        )
        empty = {"keep_top": 0.0, "random": 0.0, "drop_top": 1.0}
        require(
            empty.get(self.entropy) != self.entropy_fraction,
            f"rl.entropy_fraction={self.entropy_fraction} with rl.entropy={self.entropy!r} leaves nothing to learn",
        )

    @property
    def rows(self) -> int:
        """Number of responses of a step."""
        return self.prompts * self.samples


def check_rl(
    rl: RLConfig, heads: HeadsConfig, loss: LossConfig, data: DataConfig, optim: OptimConfig, train: TrainConfig
) -> None:
    """Refuses settings that do not fit to reinforcement, and settings that it would ignore."""
    if not rl.task:
        return
    require(
        rl.max_new_tokens < data.seq_len,
        f"rl.max_new_tokens={rl.max_new_tokens} leaves no room for a prompt in rows of data.seq_len={data.seq_len}",
    )
    size = train.batch_size
    taken = rl.updates * size
    require(
        rl.rows % size == 0 and taken % rl.rows == 0,
        f"rl.updates={rl.updates} optimizer steps of train.batch_size={size} responses do not take all rl.prompts * "
        f"rl.samples = {rl.rows} responses equally often; use a train.batch_size that divides {rl.rows}, and "
        f"rl.updates a multiple of {rl.rows} / train.batch_size",
    )
    asked = f"rl.task={rl.task!r}"
    require(
        not train.heads_only,
        f"{asked} with train.trainable={train.trainable!r} changes no response; train more than heads, for example "
        "'all' or 'lora'",
    )
    unused = (
        *(("loss", loss, name) for name in ("teacherless", "token_order", "entropy")),
        *(("data", data, name) for name in ("prompt_tokens", "noise")),
        *(("train", train, name) for name in ("heads_first", "patience", "eval_rows", "entropy_from")),
    )
    for section, values, name in unused:
        value = getattr(values, name)
        off = type(values).__dataclass_fields__[name].default
        require(value == off, f"{section}.{name}={value!r} has no effect in reinforcement ({asked}); leave it out")
    require(
        optim.name != "schedule_free",
        f"optim.name='schedule_free' with {asked}: its gradients are not those of the parameters that make the "
        "responses; use another optimizer",
    )
    _check_heads(rl, heads)


def _check_heads(rl: RLConfig, heads: HeadsConfig) -> None:
    """Checks that the heads can do what they are asked for."""
    require(
        not heads.facts.stands_alone,
        f"rl.task={rl.task!r} with heads.kind={heads.kind!r}: reinforcement of standalone models is not implemented",
    )
    require(
        heads.draft or "heads" not in rl.draft,
        f"rl.draft={rl.draft!r}, but this model has no heads that can draft; use 'auto', 'lookup' or 'none'",
    )
    require(
        rl.head_loss == 0 or heads.num_future > 1,
        f"rl.head_loss={rl.head_loss}, but heads.num_future=1 has no extra head; use head_loss=0",
    )
