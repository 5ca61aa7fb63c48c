"""The `loss` section: what training minimises."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The loss: a weighted sum of the mean losses of the heads. The weights can change during the run.

    The modules of `losses/` say what each setting computes, where it comes from, and which recipe uses it.
    """

    impl: Literal["fused", "remat"] = "fused"
    """Logits are computed in chunks. fused: the forward scan over the chunks also forms the gradients. remat: the
    backward pass computes the logits of each chunk again."""
    head_weights: tuple[float, ...] = ()
    """One weight per head; empty means 1 for every head (Gloeckle et al. 2024)."""
    extra_weight: float = 1.0
    """The weights of all extra heads are multiplied by this (lambda in DeepSeek-V3, beta in CAFT)."""
    decay: float = 1.0
    """The weight of head m >= 1 is multiplied by decay^m (0.8 in Medusa and CAFT)."""
    average_extra: bool = False
    """Divide the weights of the extra heads by the number of extra heads (DeepSeek-V3)."""
    schedule: Literal["constant", "linear", "switch", "sine", "rsine", "forward", "reverse"] = "constant"
    """How the weights of the extra heads change during the run; see `losses/schedules.py`."""
    schedule_final: float = 0.0
    """linear, switch: at the end of the run, the weights of the extra heads are multiplied by this."""
    schedule_at: float = 0.5
    """switch: share of the steps before the factor changes from 1 to `schedule_final`."""
    heads_per_step: int = 0
    """Number of extra heads that a step trains. They are drawn at random for each step. 0 trains all."""
    balance: bool = False
    """Divide the weight of every head by its loss, relative to the mean over heads, so that heads with large losses do
    not contribute more than their weights say; see `losses/schedules.py`."""
    distil: Literal["none", "kl", "tv", "lk_alpha", "lk_lambda"] = "none"
    """Teach the extra heads the distribution of head 0, with this distance; see `losses/objectives.py`."""
    distil_mix: float = 1.0
    """Share of the distance in the loss of an extra head; the rest is cross-entropy."""
    label_smoothing: float = 0.0
    """Share of the target probability that is spread over the vocabulary."""
    token_order: float = 0.0
    """Weight of the token order loss (TOP). Above 0, the model has one more unembedding, used in training only."""
    order_window: int = 32
    """Number of following positions that the token order loss ranks."""
    entropy: Literal["none", "keep_top", "drop_top", "random", "soft"] = "none"
    """Weight the tokens by entropy: learn from those with the highest entropy, from all others, from tokens drawn at
    random, or from all with weights that grow with entropy. Experimental, see `losses/entropy.py`."""
    entropy_fraction: float = 0.2
    """keep_top, drop_top, random: share of the tokens that are kept or dropped."""
    entropy_selection: Literal["exact", "threshold"] = "exact"
    """keep_top, drop_top: exact takes exactly that share of the tokens. threshold takes all tokens at or above the
    quantile of their entropies, ties included."""
    entropy_scope: Literal["microbatch", "batch"] = "microbatch"
    """The tokens among which the share is taken, over all devices: those of a micro-batch, or of the batch, which is
    all micro-batches of a step. With batch and `train.grad_accum` above 1, a step runs the model once more."""
    entropy_source: Literal["own", "next_token"] = "next_token"
    """The distribution that the entropy is computed from. own: that of each head; next_token: that of head 0."""
    entropy_normaliser: Literal["selected", "all"] = "selected"
    """The sum over the selected tokens is divided by the weight of these tokens (selected) or of all tokens (all)."""
    entropy_temperature: float = 1.0
    """soft: a token of entropy H has weight exp(H / entropy_temperature)."""
    teacherless: int = -1
    """The id of a dummy token that replaces every input token after the prompt, so that the model predicts all of them
    at once from the prompt (Bachmann & Nagarajan 2024). Needs data.prompt_tokens. Read the answer of such a model from
    its logits over the prompt and the dummy tokens: `generate` feeds real tokens and does not fit. -1 switches it
    off."""
    teacher: Literal["hard", "soft", "none"] = "hard"
    """standalone: the targets of the predictions. The teacher is a frozen copy of the model at the start of the run,
    which reads the tokens that the model itself predicted. hard: the teacher's most likely token; soft: its whole
    distribution; none: there is no teacher, the targets are the tokens of the text."""
    span: Literal["random", "full"] = "random"
    """standalone: how many predictions of a region count. random: a number from 2 to heads.num_future, drawn for every
    row in every step; full: all of them."""
    z_loss: float = 0.0
    """Coefficient of logsumexp(logits)^2. This term is weighted like the cross-entropy."""
    chunk_bytes: int = 0
    """Limit in bytes for the float32 logits that one device holds at a time; 0 chooses a limit for the device."""
    skip: bool = True
    """Compute no logits for tokens of weight 0. The scan over chunks stops after the last token that has a weight."""
    gather: Literal["step", "chunk"] = "step"
    """With FSDP: gather the unembedding once per step, or once per chunk. With chunk, no device holds a float32
    gradient of the whole unembedding, and none keeps the whole unembedding longer than a chunk."""

    def __post_init__(self) -> None:
        check_fields("loss", self)
        positive("loss", self, "order_window")
        switched = "z_loss extra_weight decay token_order schedule_final heads_per_step chunk_bytes"
        for name in switched.split():
            value = getattr(self, name)
            require(value >= 0, f"loss.{name}={value} is negative; 0 switches it off")
        for name in ("label_smoothing", "distil_mix", "schedule_at", "entropy_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"loss.{name}={value}; it must be in [0, 1]")
        require(
            self.entropy_temperature >= 1e-6,
            f"loss.entropy_temperature={self.entropy_temperature}; it must be at least 1e-6",
        )
        require(
            (self.entropy, self.entropy_fraction) not in (("keep_top", 0.0), ("random", 0.0), ("drop_top", 1.0)),
            f"loss.entropy_fraction={self.entropy_fraction} with loss.entropy={self.entropy!r} leaves nothing to learn",
        )
        ranked = self.entropy in ("keep_top", "drop_top")
        select = ranked or self.entropy == "random"
        moves = self.schedule in ("linear", "switch")
        only_with("loss", self, "gather", self.impl == "fused", "loss.impl='fused'")
        only_with("loss", self, "distil_mix", self.distil != "none", "loss.distil")
        only_with("loss", self, "schedule_final", moves, "loss.schedule='linear' or 'switch'")
        only_with("loss", self, "schedule_at", self.schedule == "switch", "loss.schedule='switch'")
        only_with("loss", self, "order_window", self.token_order > 0, "loss.token_order")
        by_entropy = self.entropy not in ("none", "random")
        only_with("loss", self, "entropy_fraction", select, "loss.entropy='keep_top', 'drop_top' or 'random'")
        only_with("loss", self, "entropy_selection", ranked, "loss.entropy='keep_top' or 'drop_top'")
        only_with("loss", self, "entropy_temperature", self.entropy == "soft", "loss.entropy='soft'")
        only_with("loss", self, "entropy_source", by_entropy, "loss.entropy='keep_top', 'drop_top' or 'soft'")
        only_with("loss", self, "entropy_normaliser entropy_scope", self.entropy != "none", "loss.entropy")
        require(self.teacherless >= -1, f"loss.teacherless={self.teacherless}; give a token id, or -1 to switch it off")
        require(
            not self.head_weights or any(self.head_weights),
            f"loss.head_weights={self.head_weights} switches every head off; at least one must be above 0",
        )
        negative = [w for w in self.head_weights if w < 0]
        require(
            not negative, f"loss.head_weights={self.head_weights} has a negative weight; use 0 to switch a head off"
        )
