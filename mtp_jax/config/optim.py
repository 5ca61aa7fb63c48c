"""The `optim` section: the optimizer and its schedule."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, require


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "muon", "adafactor", "lion", "schedule_free"] = "adamw"
    """adamw. muon: orthogonalised momentum for the matrices inside blocks, and AdamW for everything else. adafactor:
    no first moments; a matrix with both sides of 128 or more has one row and one column of second moments (Shazeer &
    Stern 2018). lion: the sign of the momentum (Chen et al. 2023). schedule_free: AdamW with an average of all steps
    instead of momentum and a decay of the learning rate (Defazio et al. 2024)."""
    learning_rate: float = 3e-3
    """Peak learning rate. For adafactor it is relative to the root mean square of a parameter, taken over all layers of
    a stack together. lion needs a third to a tenth of AdamW's learning rate."""
    muon_learning_rate: float = 0.02
    """muon: peak learning rate of the matrices."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after warm-up."""
    warmup_steps: int = 100
    """Number of steps of linear warm-up from 0."""
    final_fraction: float = 0.1
    """Learning rate of the last step as a share of the peak."""
    decay_start: float = 0.0
    """Share of the steps after warm-up that stay at the peak before the decay begins."""
    b1: float = 0.9
    """Decay rate of the momentum. schedule_free: weight of the average in the point where gradients are taken.
    adafactor: not used."""
    b2: float = 0.95
    """Decay rate of the average of squared gradients. lion: that of the momentum. adafactor: not used, it has a
    schedule."""
    eps: float = 1e-8
    """adamw, muon, schedule_free: added to the divisor of an update."""
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
            require(0 <= value <= 1, f"optim.{name}={value}; it must be in [0, 1]")
        adam = ("adamw", "muon", "schedule_free")
        for fields, names in (("muon_learning_rate", ("muon",)), ("b1 b2", (*adam, "lion")), ("eps", adam)):
            only_with("optim", self, fields, self.name in names, f"optim.name={' or '.join(map(repr, names))}")
        if self.name == "schedule_free":
            require(
                self.schedule == "constant",
                f"optim.schedule={self.schedule!r} with optim.name='schedule_free', which averages instead of a "
                "decay; use optim.schedule='constant'",
            )
            require(self.b1 > 0, f"optim.b1={self.b1} with optim.name='schedule_free'; it must be above 0")
