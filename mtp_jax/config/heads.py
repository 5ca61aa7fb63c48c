"""The `heads` section: the extra prediction heads."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require


@dataclasses.dataclass(frozen=True)
class FamilyFacts:
    """What the rest of the package must know about a head family. `model/heads` says what the family computes."""

    settings: tuple[str, ...]
    """The fields of `HeadsConfig` that this family reads, among those that not every family reads."""
    has_blocks: bool = False
    """Whether its heads are transformer blocks."""
    chains_tokens: bool = False
    """Whether each depth reads the draft of the depth before. Such heads draft one after the other."""
    in_trunk: bool = False
    """Whether it puts extra tokens into the trunk's input. Such a family reads no tap."""
    one_set: bool = False
    """Whether one set of parameters serves all heads."""
    needs_all: bool = False
    """Whether the first drafts need the parameters of all heads."""
    is_map: bool = False
    """Whether a head is one linear map."""
    drafts: bool = True
    """Whether it can draft. If not, it is for training only."""
    stands_alone: bool = False
    """Whether training makes the model itself emit several tokens at once, so that decoding may do without
    verification. Such a family learns at regions that every step draws, from a frozen copy of the model at its start;
    see `training/objectives/regions.py`."""


TAP = ("tap", "tap_norm", "tap_mix", "init")
CHAIN = ("layers", "concat", "input_norm", "attention", "chain")

FACTS: dict[str, FamilyFacts] = {
    "parallel": FamilyFacts((*TAP, "layers"), has_blocks=True),
    "causal": FamilyFacts((*TAP, "layers"), has_blocks=True),
    "anticausal": FamilyFacts((*TAP, "layers"), has_blocks=True, needs_all=True),
    "linear": FamilyFacts((*TAP, "residual"), is_map=True),
    "medusa": FamilyFacts((*TAP, "layers")),
    "sequential": FamilyFacts((*TAP, *CHAIN), has_blocks=True, chains_tokens=True),
    "recursive": FamilyFacts((*TAP, *CHAIN), has_blocks=True, chains_tokens=True, one_set=True),
    "masks": FamilyFacts(("mask_stride", "lora_rank"), in_trunk=True, needs_all=True),
    "registers": FamilyFacts(("lora_rank",), in_trunk=True, one_set=True, drafts=False),
    "standalone": FamilyFacts(("lora_rank",), in_trunk=True, one_set=True, needs_all=True, stands_alone=True),
}
"""The facts of every family; `model.heads.register` adds a family."""
Family = Literal[tuple(FACTS)]
"""The families of this package, as choices of a command."""


def families(fact: str) -> list[str]:
    """Names of the families for which this field of `FamilyFacts` is true."""
    return [name for name, facts in FACTS.items() if getattr(facts, fact)]


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The extra prediction heads. `model/heads` says what each family computes."""

    kind: str = "parallel"
    """Head family: parallel, causal, anticausal, linear, medusa, sequential, recursive, masks, registers or
    standalone."""
    num_future: int = 4
    """M, number of heads, head 0 included. 1 is a plain language model: then the other settings of heads and of their
    losses have no effect."""
    tap: int = -1
    """Number of trunk blocks below the state that the heads read. Negative numbers count from the end: -1 is the input
    of the last block (L-1, Gloeckle et al. 2024). `num_layers` is the state after the last block."""
    tap_norm: bool = False
    """Apply the final norm to the tapped state before the heads read it."""
    tap_mix: bool = False
    """Read a learned mix of the normed states before and after every block (Mehra et al. 2025) instead of the state at
    `tap`."""
    layers: int = 1
    """Number of blocks of one head; for medusa, number of residual layers."""
    norm: Literal["shared", "own", "none"] = "shared"
    """The norm before a head's unembedding. shared: the trunk's final norm; own: one per head; none: no norm."""
    unembed: Literal["shared", "own"] = "shared"
    """The unembedding of the heads. shared: the trunk's; own: one per head, which starts as a copy of the trunk's."""
    draft_vocab: int = 0
    """Size of the draft vocabulary: the extra heads predict only this many tokens, the most frequent ones in the
    training text (FR-Spec, arXiv:2502.14856; `d2t` of EAGLE-3). Their unembedding, which is most of what a head costs,
    has this many rows. A target outside the draft vocabulary has weight 0 for an extra head. 0 is the whole
    vocabulary."""
    norm_plus_one: bool = False
    """The norms of the heads scale by 1 + w, as in the heads of Qwen3-Next; w starts at 0."""
    residual: bool = False
    """linear: a head computes x + W x instead of W x."""
    concat: Literal["embedding_first", "hidden_first"] = "embedding_first"
    """sequential, recursive: order of the two inputs of the projection. The weights of DeepSeek-V3 and Qwen have the
    embedding first, those of MiMo-7B have the hidden state first."""
    input_norm: bool = True
    """sequential, recursive: whether there is a norm before the attention of a head. EAGLE's head has none, because the
    two inputs of its projection are normed already."""
    attention: bool = True
    """sequential, recursive: whether a head's block has attention. A head without attention is a projection and a
    feed-forward layer, as in Hydra (arXiv:2402.05109) and the MLP speculator (arXiv:2404.19124). It drafts without a
    cache and costs much less."""
    chain: Literal["pre_norm", "post_norm"] = "pre_norm"
    """sequential, recursive: whether the next depth reads a head's state before or after the norm at the head's end."""
    init: Literal["default", "random", "copy_block", "zero"] = "default"
    """How the heads start. random: with random parameters. copy_block: every block of a head is a copy of the trunk's
    block `init_block`. zero: a head gives back its input unchanged. With copy_block and zero, the projection of a
    sequential or recursive head passes the hidden state on. default: zero for medusa, random for the other families."""
    init_block: int = -1
    """The block that copy_block copies; negative numbers count from the end (CAFT uses -2)."""
    mask_stride: int = 1
    """masks: in training, only every k-th position has mask tokens."""
    lora_rank: int = 0
    """masks, registers, standalone: rank of the LoRA update of the trunk's matrices at the extra tokens; 0 is no
    update."""
    lora_alpha: float = 32.0
    """The LoRA update is multiplied by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        check_fields("heads", self)
        names = ", ".join(map(repr, FACTS))
        require(self.kind in FACTS, f"heads.kind is {self.kind!r}; choose one of {names}")
        positive("heads", self, "num_future", "layers", "mask_stride")
        require(
            self.draft_vocab >= 0, f"heads.draft_vocab={self.draft_vocab} is negative; use 0 for the whole vocabulary"
        )
        require(self.lora_rank >= 0, f"heads.lora_rank={self.lora_rank} is negative; 0 switches it off")
        require(self.lora_alpha > 0, f"heads.lora_alpha={self.lora_alpha}; it must be above 0")
        self._check_settings()
        facts = self.facts
        require(
            self.init != "copy_block" or facts.has_blocks,
            f"heads.init='copy_block', but {self.kind} heads have no block; use one of "
            f"{', '.join(families('has_blocks'))}",
        )
        require(
            self.init != "zero" or not facts.is_map or self.residual,
            f"heads.init='zero' with heads.kind={self.kind!r} needs heads.residual=True; a map of zeros predicts "
            "nothing",
        )
        require(
            self.attention or self.init != "copy_block",
            "heads.init='copy_block' with heads.attention=False; a copied block has attention, so use init='random'",
        )
        require(
            not facts.stands_alone or (self.norm == "shared" and self.unembed == "shared" and not self.draft_vocab),
            f"heads.kind={self.kind!r} predicts with the model's own norm and unembedding; use norm='shared', "
            "unembed='shared' and draft_vocab=0",
        )
        only_with("heads", self, "input_norm", self.attention, "heads.attention: it is the norm before attention")
        own_norms = facts.has_blocks or self.norm == "own"
        only_with("heads", self, "init_block", self.init == "copy_block", "heads.init='copy_block'")
        only_with("heads", self, "lora_alpha", self.lora_rank > 0, "heads.lora_rank")
        only_with("heads", self, "chain", self.norm != "none", "a norm: heads.norm='shared' or 'own'")
        only_with("heads", self, "norm_plus_one", own_norms, "heads.norm='own': these heads have no other norm")
        require(
            not (self.tap_mix and self.tap_norm),
            "heads.tap_norm=True with heads.tap_mix=True: the mixed states are normed already; use tap_norm=False",
        )

    @property
    def region_tokens(self) -> int:
        """Tokens of a row per region of a standalone model: the distance between the places where it learns."""
        return 2 * self.num_future

    @property
    def facts(self) -> FamilyFacts:
        """The facts of the family."""
        return FACTS[self.kind]

    @property
    def draft(self) -> bool:
        """Whether the heads can draft: there are extra heads, and their family drafts."""
        return self.num_future > 1 and self.facts.drafts

    def _check_settings(self) -> None:
        """Refuses a setting that the family would ignore."""
        for field in dataclasses.fields(self):
            readers = [name for name, facts in FACTS.items() if field.name in facts.settings]
            value = getattr(self, field.name)
            require(
                not readers or value == field.default or self.kind in readers,
                f"heads.{field.name}={value!r} has no effect with heads.kind={self.kind!r}; it is a setting of "
                f"{', '.join(readers)}",
            )
