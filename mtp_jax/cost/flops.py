"""Floating-point operations of a training step's matrix products: what model FLOPs utilisation (MFU) is a share of.

Counted as in PaLM (Chowdhery et al. 2022, appendix B): a product of [t, i] and [i, o] is 2 t i o operations forward and
twice that backward, for the gradients of its two inputs; attention counts every pair of a row's T^2 positions, causal,
windowed and packed or not; nothing that is computed a second time counts (rematerialisation, the logits that a teacher
or an entropy weight needs once more), and of a mixture of experts those that a token takes. Norms, softmax, the gather
of embeddings and the optimizer are left out.

With `train.trainable="heads"` only the products that lead to a gradient of a head count more than once.
"""

from typing import NamedTuple

from mtp_jax.config import Config, ModelConfig


class _Passes(NamedTuple):
    """How often a product counts: once forward, and once per input that gets a gradient."""

    linear: int
    """Of activations and a matrix of the model."""
    mixed: int
    """Of activations with activations, as in attention."""


LEARNED = _Passes(3, 3)
READ = _Passes(1, 1)
THROUGH = _Passes(2, 2)
"""The gradient passes through, to something that learns further down; the other input stands still."""


def step_flops(config: Config, batch_size: int, seq_len: int, *, computed: bool = False) -> float:
    """Operations of one training step, forward and backward, over all devices.

    Args:
      config: the run's config; its own batch size and row length are not read.
      batch_size: B, rows of the step.
      seq_len: T, tokens of a row.
      computed: count what our step computes in place of what the model asks for: every expert for every token, and the
        logits of teachers and entropy weights. The recomputation that `model.remat` and `loss.impl="remat"` ask for is
        not in it.
    """
    tokens = batch_size * seq_len
    frozen = config.train.trainable == "heads"
    passes = READ if frozen else LEARNED
    if config.model.is_stack:
        total = config.model.num_layers * _block(config.model.block, tokens, seq_len, passes, computed)
    else:
        total = passes.linear * config.model.forward_flops(tokens, seq_len)
    total += _heads(config, batch_size, seq_len, computed) if config.heads.num_future > 1 else 0
    return float(total + _logits(config, tokens, computed))


def _block(c: ModelConfig, tokens: int, sees: int, passes: _Passes, computed: bool) -> int:
    """One block over `tokens` positions, each of which looks at `sees` positions."""
    return _projections(c, tokens, passes, computed) + passes.mixed * _attention(c, tokens, sees)


def _projections(c: ModelConfig, tokens: int, passes: _Passes, computed: bool) -> int:
    """The products with the block's matrices."""
    weights = c.d_model * c.head_dim * 2 * (c.num_heads + c.num_kv_heads) + _feed_forward(c, computed)
    return passes.linear * 2 * tokens * weights


def _feed_forward(c: ModelConfig, computed: bool) -> int:
    """Weights of a feed-forward layer that a token meets."""
    layers = (c.num_experts if computed else c.experts_per_token) if c.num_experts else 1
    router = c.d_model * c.num_experts if c.num_experts else 0
    return layers * (3 if c.gated else 2) * c.d_model * c.d_ff + router


def _attention(c: ModelConfig, queries: int, sees: int) -> int:
    """Scores and mixing, forward."""
    return 2 * 2 * queries * sees * c.num_heads * c.head_dim


def _heads(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """The extra heads, without their unembeddings."""
    facts = config.heads.facts
    extra = config.heads.num_future - 1
    c = config.model.block
    tokens = batch_size * seq_len
    D = c.d_model
    if facts.in_trunk:
        return _beside(config, batch_size, seq_len, computed)
    if not facts.has_blocks:
        # A map that reads a frozen state needs no gradient for it.
        passes = THROUGH if facts.is_map and config.train.trainable == "heads" else LEARNED
        return passes.linear * extra * config.heads.layers * 2 * tokens * D * D
    if config.heads.attention:
        blocks = config.heads.layers * _block(c, tokens, seq_len, LEARNED, computed)
    else:
        blocks = config.heads.layers * LEARNED.linear * 2 * tokens * _feed_forward(c, computed)
    joined = LEARNED.linear * 2 * tokens * 2 * D * D if facts.chains_tokens else 0
    return extra * (blocks + joined)


def _beside(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """Masks or registers: their own stream through the model's blocks, and what they see of the tokens'."""
    c = config.model
    heads = config.heads
    each = 1 if heads.facts.one_set else heads.num_future - 1
    extra = batch_size * -(-seq_len // heads.mask_stride) * each
    passes = THROUGH if config.train.trainable == "heads" else LEARNED
    layer = _projections(c, extra, passes, computed)
    layer += passes.mixed * _attention(c, extra, seq_len) + LEARNED.mixed * _attention(c, extra, each)
    if heads.lora_rank:
        D = c.d_model
        inner = c.num_heads * c.head_dim
        keys = c.num_kv_heads * c.head_dim
        sides = 2 * (D + inner) + 2 * (D + keys) + (3 if c.gated else 2) * (D + c.d_ff)
        layer += LEARNED.linear * 2 * extra * heads.lora_rank * sides
    return c.num_layers * layer


def _logits(config: Config, tokens: int, computed: bool) -> int:
    """The unembeddings of all heads, and that of the token order loss."""
    per_row = 2 * tokens * config.model.d_model
    M = config.heads.num_future
    whole = per_row * config.model.vocab_size
    draft = per_row * config.heads.draft_vocab or whole
    first = extra = LEARNED.linear
    if config.train.trainable == "heads":
        own = config.heads.unembed == "own"
        first = READ.linear
        extra = LEARNED.linear if own else THROUGH.linear
    if computed and config.loss.entropy != "none":
        first = first + 1
        extra = extra + 1
    if computed and config.loss.distil != "none":
        extra += 1
    order = LEARNED.linear * whole if config.loss.token_order else 0
    return first * whole + (M - 1) * extra * draft + order
