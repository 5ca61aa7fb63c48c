"""The `data` section: the text and how it becomes rows."""

import dataclasses
from typing import Literal

from mtp_jax.config.checks import check_fields, require
from mtp_jax.config.noise import read_noise


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The source of the text, and how it becomes rows."""

    source: str = "stdlib"
    """`stdlib` (the standard library of the running Python), a directory, a glob, a text file, a `.jsonl` or `.json` of
    records, a `.npy` of token ids, or `synthetic:TASK:option=value,...` (see `data/synthetic.py`, and
    `data/arithmetic.py` for the text `synthetic:arithmetic`)."""
    text_field: str = "text"
    """The field of a record that holds its text."""
    tokenizer: str = "bpe"
    """`bpe`: a byte-pair tokenizer with model.vocab_size tokens, trained on the text. `bytes`: one token per byte, with
    the byte as its id. `blt_bytes`: the same with the ids of the Byte Latent Transformer, the byte plus 4, 260 in all.
    `none`: the source is a `.npy` of token ids and needs no tokenizer. `smollm2`: that of the model with this name.
    Otherwise the path of a `tokenizer.json`."""
    special_tokens: Literal["auto", "read", "text"] = "auto"
    """How the name of a special token (`<|im_start|>`) in a document or prompt is read. read: as the special token,
    which chat text needs. text: as ordinary characters, so that a document cannot contain an end-of-text token. auto:
    read for the tokenizer of a Hugging Face model or of an import; text for bpe, bytes, blt_bytes and a single
    `tokenizer.json`."""
    noise: str = ""
    """Noise in the characters of the training text, as KIND:RATE, or several with commas, which act one after the
    other. case: a letter changes between upper and lower case. drop: a character is left out. repeat: it stands 2 to 4
    times. swap: two neighbours change places. RATE is the share of characters that change. The held-out text and the
    text that `bpe` trains on stay as they are. Empty: no noise."""
    chat_template: str = ""
    """The template that writes `messages` as text: `plain`, a Jinja file, or a directory with a tokenizer. Empty: the
    template of the tokenizer."""
    seq_len: int = 256
    """T, number of tokens of a row."""
    prompt_tokens: int = 0
    """Number of tokens at the start of every document that are only context: no head learns to predict them."""
    eval_fraction: float = 0.05
    """Share of the text that is held out for evaluation. Whole documents are held out."""
    seed: int = 0
    """Seed for the choice of held-out documents and for the order of the rows."""

    def __post_init__(self) -> None:
        check_fields("data", self)
        require(self.prompt_tokens >= 0, f"data.prompt_tokens={self.prompt_tokens} is negative; 0 learns every token")
        read_noise(self.noise, "data.noise")
        require(
            not self.noise or self.tokenizer != "none",
            f"data.noise={self.noise!r} changes characters, but data.tokenizer='none' reads token ids; leave it empty",
        )
        require(self.seq_len >= 2, f"data.seq_len={self.seq_len}; a row needs at least 2 tokens to hold one target")
        require(
            0 < self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction}; it must be between 0 and 1, for example 0.05",
        )
