"""A stand-in for `generate` that writes what a function says, so that methods over a model run without compiling.

A response depends on its prompt and its seed alone, as those of `generate` do.
"""

import types

from mtp_jax.data.tokenize import bytes_tokenizer

TOKENIZER = bytes_tokenizer()
EOS = 257
MODEL = types.SimpleNamespace(
    tokenizer=TOKENIZER.with_chat("plain"),
    arch=types.SimpleNamespace(model=types.SimpleNamespace(vocab_size=258, max_seq_len=2000)),
)


class Sampler:
    """What takes the place of `generate`.

    Args:
      write: `(text of the prompt, seed) -> text of the response`.
    """

    def __init__(self, write):
        self.write = write
        self.calls = []
        """Number of prompts and of rows of every call."""

    def __call__(self, lm, prompts, *, max_new_tokens, n, seed, logprobs, **options):
        """A row takes a second. The log-probability of every token is minus its place, from 1."""
        assert n == 1 or options["temperature"] > 0, "generate refuses several samples at temperature 0"
        self.calls.append((len(prompts), len(seed)))
        texts = [TOKENIZER.decode(prompt) for prompt in prompts for _ in range(n)]
        rows = [[*self.write(text, one).encode(), EOS] for text, one in zip(texts, seed, strict=True)]
        tokens = [row[:max_new_tokens] for row in rows]
        pairs = list(zip(rows, tokens, strict=True))
        return types.SimpleNamespace(
            text=[TOKENIZER.decode(row) for row in tokens],
            tokens=tokens,
            logprobs=[[-float(1 + at) for at in range(len(row))] for row in tokens],
            finish_reason=["length" if len(row) > len(kept) else "eos" for row, kept in pairs],
            stats=types.SimpleNamespace(prefill_seconds=0.25 * len(rows), decode_seconds=0.75 * len(rows)),
        )
