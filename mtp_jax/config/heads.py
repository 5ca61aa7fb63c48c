"""The `heads` section: the extra prediction heads."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require


@dataclasses.dataclass(frozen=True)
class FamilyFacts:
    """What the rest of the package must know of a head family. What it computes is in `model/heads`."""

    settings: tuple[str, ...]
    """Fields of `HeadsConfig` that mean something to it, of those that not every family reads."""
    has_blocks: bool = False
    """Whether its heads are transformer blocks."""
    chains_tokens: bool = False
    """Whether each depth reads the draft of the depth before, so that heads draft one after the other."""
    in_trunk: bool = False
    """Whether its extra tokens run through the trunk's own blocks. Such a family reads no tap."""
    one_set: bool = False
    """Whether one set of parameters serves all heads."""
    needs_all: bool = False
    """Whether the first drafts need the parameters of all heads."""
    is_map: bool = False
    """Whether a head is one linear map."""
    drafts: bool = True
    """Whether it can draft; else it is for training only."""


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
}
"""A row for every family; `model.heads.register` adds one."""
Family = Literal[tuple(FACTS)]
"""The families of this package, for commands to choose from."""


def families(fact: str) -> list[str]:
    """The families of which a fact is true."""
    return [name for name, facts in FACTS.items() if getattr(facts, fact)]


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """The extra prediction heads. See `model/heads` for what each family computes."""

    kind: str = "parallel"
    """Head family: parallel, causal, anticausal, linear, medusa, sequential, recursive, masks or registers."""
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
        names = ", ".join(map(repr, FACTS))
        require(self.kind in FACTS, f"heads.kind is {self.kind!r}; choose one of {names}")
        positive("heads", self, "num_future", "layers", "mask_stride")
        require(self.draft_vocab >= 0, f"heads.draft_vocab={self.draft_vocab} is negative; 0 drafts over all tokens")
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
        only_with("heads", self, "input_norm", self.attention, "heads.attention: it is attention that would read it")
        own_norms = facts.has_blocks or self.norm == "own"
        only_with("heads", self, "init_block", self.init == "copy_block", "heads.init='copy_block'")
        only_with("heads", self, "lora_alpha", self.lora_rank > 0, "heads.lora_rank")
        only_with("heads", self, "chain", self.norm != "none", "a norm to stand behind: heads.norm='shared' or 'own'")
        only_with("heads", self, "norm_plus_one", own_norms, "heads.norm='own': these heads have no other norm")
        require(
            not (self.tap_mix and self.tap_norm),
            "heads.tap_norm=True with heads.tap_mix=True; the mix is over normed states already",
        )

    @property
    def facts(self) -> FamilyFacts:
        """The row of the family."""
        return FACTS[self.kind]

    @property
    def draft(self) -> bool:
        """Whether there is anything to draft with."""
        return self.num_future > 1 and self.facts.drafts

    def _check_settings(self) -> None:
        """Refuses a setting that the family would ignore."""
        for field in dataclasses.fields(self):
            readers = [name for name, facts in FACTS.items() if field.name in facts.settings]
            value = getattr(self, field.name)
            require(
                not readers or value == field.default or self.kind in readers,
                f"heads.{field.name}={value!r} means nothing to heads.kind={self.kind!r}; it belongs to "
                f"{', '.join(readers)}",
            )
