"""The `data` section: the text and how it becomes rows."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, require


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    source: str = "stdlib"
    """`stdlib` (the running Python's standard library), a directory, glob, text file, `.jsonl` or `.json` of records,
    `.npy` of token ids, or `synthetic:TASK:option=value,...` (see `data/synthetic.py`)."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    tokenizer: str = "bpe"
    """`bpe` trains a byte-pair tokenizer of model.vocab_size on the corpus, `bytes` is one token per byte, `none` takes
    a `.npy` as it is, anything else is the path of a `tokenizer.json`."""
    special_tokens: Literal["auto", "read", "text"] = "auto"
    """What a special token that a text spells (`<|im_start|>`) becomes, in documents and prompts alike. read: that
    token, as chat text needs it. text: the tokens of its characters, so that no document can forge its own end. auto:
    as the tokenizer says, which is read for that of a Hugging Face model or of an import, and text for bpe, bytes and a
    `tokenizer.json` alone."""
    chat_template: str = ""
    """Writes `messages` as text: `plain`, a Jinja file, or a directory with a tokenizer; by default the tokenizer's."""
    seq_len: int = 256
    """Tokens of a row (T)."""
    prompt_tokens: int = 0
    """Tokens at the start of every document that are context only: no head learns to predict them."""
    eval_fraction: float = 0.05
    """Share of the documents held out, whole documents at a time."""
    seed: int = 0
    """Seed of the held-out choice and of the row order."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(self.prompt_tokens >= 0, f"data.prompt_tokens={self.prompt_tokens} is negative; 0 learns every token")
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len}; a row needs at least 2 tokens to hold one target")
        require(
            0 < self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction}; it must lie between 0 and 1, for example 0.05",
        )
