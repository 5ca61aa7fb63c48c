"""Floating-point operations of a training step's matrix products: what model FLOPs utilisation (MFU) is a share of.

Counted as in PaLM (Chowdhery et al. 2022, appendix B): a product of [t, i] and [i, o] is 2 t i o operations forward and
twice that backward, for the gradients of its two inputs; attention counts every pair of a row's T^2 positions, causal,
windowed and packed or not; nothing that is computed a second time counts (rematerialisation, the logits that a teacher
or an entropy weight needs once more), and of a mixture of experts those that a token takes. Norms, softmax, the gather
of embeddings and the optimizer are left out.

Where only heads are trained, only the products that lead to a gradient of a head count more than once. Where other
parameters stand still, each of their matrices has no gradient; those of the activations are counted as if something
below were trained, and the heads as if all of them were.
"""

from collections.abc import Callable
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
    c = config.model
    if config.train.heads_only:
        block = _block(c, tokens, seq_len, READ, computed)
    else:
        block = _projections(c, tokens, _of_trunk(config), computed)
        block += LEARNED.mixed * _attention(c, tokens, seq_len)
    total = c.num_layers * block
    total += _heads(config, batch_size, seq_len, computed) if config.heads.num_future > 1 else 0
    return float(total + _logits(config, tokens, computed))


def _block(c: ModelConfig, tokens: int, sees: int, passes: _Passes, computed: bool) -> int:
    """One block over `tokens` positions, each of which looks at `sees` positions."""
    products = _projections(c, tokens, lambda _: passes.linear, computed)
    return products + passes.mixed * _attention(c, tokens, sees)


def _of_trunk(config: Config) -> Callable[[str], int]:
    """How often the product with a matrix of the model's blocks counts where a gradient passes through them."""

    def passes(name: str) -> int:
        return (LEARNED if config.train.learns(f"blocks/{name}") else THROUGH).linear

    return passes


def _projections(c: ModelConfig, tokens: int, passes: Callable[[str], int], computed: bool) -> int:
    """The products with the block's matrices, each as often as `passes` says of its name."""
    width = c.d_model * c.head_dim
    weights = {
        "attn/q": width * c.num_heads,
        "attn/k": width * c.num_kv_heads,
        "attn/v": width * c.num_kv_heads,
        "attn/o": width * c.num_heads,
        **_feed_forward(c, computed),
    }
    return 2 * tokens * sum(passes(name) * count for name, count in weights.items())


def _feed_forward(c: ModelConfig, computed: bool) -> dict[str, int]:
    """Weights of a feed-forward layer that a token meets, by name."""
    layers = (c.num_experts if computed else c.experts_per_token) if c.num_experts else 1
    names = ("mlp/gate", "mlp/up", "mlp/down") if c.gated else ("mlp/up", "mlp/down")
    router = {"mlp/router": c.d_model * c.num_experts} if c.num_experts else {}
    return dict.fromkeys(names, layers * c.d_model * c.d_ff) | router


def _attention(c: ModelConfig, queries: int, sees: int) -> int:
    """Scores and mixing, forward."""
    return 2 * 2 * queries * sees * c.num_heads * c.head_dim


def _heads(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """The extra heads, without their unembeddings."""
    facts = config.heads.facts
    extra = config.heads.num_future - 1
    c = config.model
    tokens = batch_size * seq_len
    D = c.d_model
    if facts.in_trunk:
        return _beside(config, batch_size, seq_len, computed)
    if not facts.has_blocks:
        # A map that reads a frozen state needs no gradient for it.
        passes = THROUGH if facts.is_map and config.train.heads_only else LEARNED
        return passes.linear * extra * config.heads.layers * 2 * tokens * D * D
    if config.heads.attention:
        blocks = config.heads.layers * _block(c, tokens, seq_len, LEARNED, computed)
    else:
        blocks = config.heads.layers * LEARNED.linear * 2 * tokens * sum(_feed_forward(c, computed).values())
    joined = LEARNED.linear * 2 * tokens * 2 * D * D if facts.chains_tokens else 0
    return extra * (blocks + joined)


def _beside(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """Masks or registers: their own stream through the model's blocks, and what they see of the tokens'."""
    c = config.model
    heads = config.heads
    each = 1 if heads.facts.one_set else heads.num_future - 1
    extra = batch_size * -(-seq_len // heads.mask_stride) * each
    passes = THROUGH if config.train.heads_only else LEARNED
    layer = _projections(c, extra, _of_trunk(config), computed)
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
    train = config.train
    learned = train.learns("embed/table" if config.model.tie_embeddings else "unembed/table")
    first = extra = LEARNED.linear if learned else THROUGH.linear
    if config.heads.unembed == "own":
        extra = LEARNED.linear if train.learns("heads/unembed/table") else THROUGH.linear
    if train.heads_only:
        first = READ.linear
    if computed and config.loss.entropy != "none":
        first = first + 1
        extra = extra + 1
    if computed and config.loss.distil != "none":
        extra += 1
    order = (LEARNED if train.learns("token_order/table") else THROUGH).linear * whole if config.loss.token_order else 0
    return first * whole + (M - 1) * extra * draft + order
