"""The `loss` section: what training minimises."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require


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
    """The weight of head m >= 1 is multiplied by decay^m (0.8 in Medusa and CAFT)."""
    average_extra: bool = False
    """Divide the extra heads' weights by their number (DeepSeek-V3)."""
    schedule: Literal["constant", "linear", "switch", "sine", "rsine", "forward", "reverse"] = "constant"
    """How the extra heads' weights change over the run; see `losses/schedules.py`."""
    schedule_final: float = 0.0
    """linear, switch: factor of the extra heads' weights at the end of the run."""
    schedule_at: float = 0.5
    """switch: share of the steps after which the factor is `schedule_final`."""
    heads_per_step: int = 0
    """Extra heads that are trained in a step, drawn at random for each step. 0 trains all."""
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
    """keep_top, drop_top: share of the counted tokens that are kept or dropped."""
    entropy_source: Literal["own", "next_token"] = "next_token"
    """Distribution whose entropy counts: that of the head itself, or that of the next-token head."""
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
