"""The rule that cuts a row of bytes into patches."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, only_with, positive, require

PatchKind = Literal["global", "relative", "static", "space"]
ENTROPY_KINDS = ("global", "relative")
"""The rules that read entropies of a byte language model."""


@dataclasses.dataclass(frozen=True)
class PatchRule:
    """Where patches begin (Byte Latent Transformer, arXiv:2412.09871, section 2). `model.blt.patching` applies it.

    The first two bytes of a document always begin a patch. A later byte t begins one if

        global     the entropy of byte t, given the bytes before it, is above `threshold`
        relative   this entropy exceeds that of byte t-1 by more than `threshold`
        static     t - 1 is a multiple of `stride`
        space      byte t-1 is like a space, and byte t-2 is not: an ASCII character that is no letter and no digit, or
                   the first byte of a longer character. A token that is no byte also ends its patch
    """

    kind: PatchKind = "global"
    threshold: float = 0.0
    """In nats, for `global` and `relative`."""
    stride: int = 0
    """Bytes of a patch, for `static`."""
    max_length: int = 0
    """A patch that has this many bytes ends, for every rule but `static`. 0 sets no limit."""
    reset_at_newline: bool = False
    """Whether the entropy model starts anew at every newline, so that repeated lines stay in short patches. The
    newline is the first byte that it sees, and ends its patch. For `global` and `relative`."""
    byte_offset: int = 0
    """The token id of byte 0. The tokenizer `bytes` has 0, the released models have 4."""

    def __post_init__(self) -> None:
        name = "model.patches"
        check_fields(name, self)
        of_entropy = self.kind in ENTROPY_KINDS
        only_with(name, self, "threshold reset_at_newline", of_entropy, f"{name}.kind='global' or 'relative'")
        only_with(name, self, "stride", self.kind == "static", f"{name}.kind='static'")
        only_with(name, self, "max_length", self.kind != "static", f"another {name}.kind than 'static'")
        if self.kind == "static":
            positive(name, self, "stride")
        require(self.max_length >= 0, f"{name}.max_length is {self.max_length}; use 0 for no limit, or 1 and more")
        require(self.byte_offset >= 0, f"{name}.byte_offset is {self.byte_offset}; it must not be negative")

    @property
    def reads_bytes(self) -> bool:
        """Whether the rule looks at the bytes themselves, and not at entropies or places alone."""
        return self.kind == "space" or self.reset_at_newline
