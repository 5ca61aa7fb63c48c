"""The `decode` section: how prompts are decoded."""

import dataclasses

from mtp_jax.config.checks import check_fields, positive, require


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Defaults of decoding, and the prompts that an evaluation decodes."""

    num_draft: int = -1
    """P, number of drafts per round, at most M-1; -1 drafts with every head."""
    max_new_tokens: int = 128
    """Number of tokens to generate for a prompt."""
    num_prompts: int = 16
    """Number of held-out prompts that an evaluation decodes."""
    prompt_tokens: int = 64
    """Number of tokens of each of these prompts."""

    def __post_init__(self) -> None:
        check_fields("decode", self)
        positive("decode", self, "num_prompts", "prompt_tokens")
        require(
            self.max_new_tokens >= 2,
            f"decode.max_new_tokens={self.max_new_tokens}; an evaluation needs 2 or more, because the prefill already "
            "gives the first one",
        )
        require(self.num_draft >= -1, f"decode.num_draft={self.num_draft}; use -1 for all heads, or 0 and above")
