"""Floating-point operations of the matrix products in a training step, for the model FLOPs utilisation (MFU).

They are counted as in PaLM (Chowdhery et al. 2022, appendix B):

- A product of [t, i] and [i, o] has 2 t i o operations forward. The gradients of its two inputs have twice as many.
- Attention counts all T^2 pairs of positions of a row, also if it is causal, windowed or packed.
- A value that is computed a second time counts once. Examples are rematerialisation, and the additional logits for a
  teacher or for entropy weights.
- Of a mixture of experts, only the experts that a token takes count.
- Norms, softmax, the gather of embeddings and the optimizer do not count.

If only heads are trained, the backward pass counts only for products that lead to a gradient of a head. If others
are frozen, the gradients of their matrices do not count. The gradients of activations count as if a parameter
below were trained. Heads without blocks with attention count as trained.
"""

from collections.abc import Callable
from typing import NamedTuple

from mtp_jax.config import Config, ModelConfig
from mtp_jax.config.lora import adapted


class _Passes(NamedTuple):
    """How often a product counts: once for the forward pass, and once for each input that gets a gradient."""

    linear: int
    """For a product of activations and a matrix of the model."""
    mixed: int
    """For a product of activations and activations, as in attention."""


LEARNED = _Passes(3, 3)
READ = _Passes(1, 1)
THROUGH = _Passes(2, 2)
"""A frozen product that only passes a gradient on, to parameters that learn further down."""


def step_flops(config: Config, batch_size: int, seq_len: int, *, computed: bool = False) -> float:
    """Operations of one training step, forward and backward, over all devices.

    Args:
      config: the run's config. Its batch size and row length are not used.
      batch_size: B, rows of the step.
      seq_len: T, tokens of a row.
      computed: if True, count what our step computes instead of what the model needs: every expert for every token, and
        the logits for teachers and entropy weights. Recomputation by `model.remat` and `loss.impl="remat"` never
        counts.
    """
    tokens = batch_size * seq_len
    c = config.model
    if not c.is_stack:
        trunk = (READ if config.train.heads_only else LEARNED).linear * c.forward_flops(tokens, seq_len)
    elif config.train.heads_only:
        trunk = c.num_layers * _block(c.block, tokens, seq_len, READ, computed)
    else:
        products = _projections(c.block, tokens, _of_trunk(config), computed)
        products += _adapters(config, "blocks", tokens)
        trunk = c.num_layers * (products + LEARNED.mixed * _attention(c.block, tokens, seq_len))
    for frozen in c.frozen_models.values():
        trunk += frozen.num_layers * _block(frozen, tokens, seq_len, READ, computed)
        trunk += READ.linear * 2 * tokens * frozen.d_model * frozen.vocab_size
    heads = _heads(config, batch_size, seq_len, computed) if config.heads.num_future > 1 else 0
    if config.heads.facts.stands_alone and config.heads.num_future > 1:
        logits = _logits_at_regions(config, batch_size, seq_len, computed)
        return float(trunk + heads + logits + _teacher(config, batch_size, seq_len, computed))
    return float(trunk + heads + _logits(config, tokens, computed))


def _block(c: ModelConfig, tokens: int, sees: int, passes: _Passes, computed: bool) -> int:
    """One block over `tokens` positions. Each position attends to `sees` positions."""
    products = _projections(c, tokens, lambda _: passes.linear, computed)
    return products + passes.mixed * _attention(c, tokens, sees)


def _of_trunk(config: Config) -> Callable[[str], int]:
    """How often the product with a matrix of the model's blocks counts where a gradient passes through them."""

    def passes(name: str) -> int:
        return (LEARNED if config.train.learns(f"blocks/{name}") else THROUGH).linear

    return passes


def _of_heads(config: Config) -> Callable[[str], int]:
    """The same for the matrices of the blocks of heads."""

    def passes(name: str) -> int:
        return (LEARNED if config.train.learns(f"heads/blocks/{name}") else THROUGH).linear

    return passes


def _projections(c: ModelConfig, tokens: int, passes: Callable[[str], int], computed: bool) -> int:
    """The products with the block's matrices; `passes(name)` says how often each counts."""
    width = c.d_model * c.head_dim
    weights = {
        "attn/q": width * c.num_heads,
        "attn/k": width * c.num_kv_heads,
        "attn/v": width * c.num_kv_heads,
        "attn/o": width * c.num_heads,
        **_feed_forward(c, computed),
    }
    return 2 * tokens * sum(passes(name) * count for name, count in weights.items())


def _adapters(config: Config, stack: str, tokens: int) -> int:
    """The products with the adapters of one block."""
    if not config.lora.rank:
        return 0
    c = config.model.block
    inner = c.num_heads * c.head_dim
    keys = c.num_kv_heads * c.head_dim
    outer = {"attn/q": inner, "attn/k": keys, "attn/v": keys, "attn/o": inner}
    outer |= {"mlp/gate": c.d_ff, "mlp/up": c.d_ff, "mlp/down": c.d_ff}
    paths = adapted(config.lora, config.model, config.heads)
    sides = sum(c.d_model + size for name, size in outer.items() if f"{stack}/{name}" in paths)
    return LEARNED.linear * 2 * tokens * config.lora.rank * sides


def _feed_forward(c: ModelConfig, computed: bool) -> dict[str, int]:
    """Number of weights of a feed-forward layer that are used for one token, by name."""
    layers = (c.num_experts if computed else c.experts_per_token) if c.num_experts else 1
    names = ("mlp/gate", "mlp/up", "mlp/down") if c.gated else ("mlp/up", "mlp/down")
    router = {"mlp/router": c.d_model * c.num_experts} if c.num_experts else {}
    return dict.fromkeys(names, layers * c.d_model * c.d_ff) | router


def _attention(c: ModelConfig, queries: int, sees: int) -> int:
    """The attention scores, and the weighted sum of the values; forward pass only."""
    return 2 * 2 * queries * sees * c.num_heads * c.head_dim


def _heads(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """The extra heads, without their unembeddings."""
    facts = config.heads.facts
    extra = config.heads.num_future - 1
    c = config.model.block
    tokens = batch_size * seq_len
    D = c.d_model
    if facts.in_trunk:
        return _extra_tokens(config, batch_size, seq_len, computed)
    if not facts.has_blocks:
        # A map that reads a frozen state needs no gradient for it.
        passes = THROUGH if facts.is_map and config.train.heads_only else LEARNED
        return passes.linear * extra * config.heads.layers * 2 * tokens * D * D
    if config.heads.attention:
        products = _projections(c, tokens, _of_heads(config), computed)
        blocks = config.heads.layers * (products + LEARNED.mixed * _attention(c, tokens, seq_len))
    else:
        blocks = config.heads.layers * LEARNED.linear * 2 * tokens * sum(_feed_forward(c, computed).values())
    blocks += config.heads.layers * _adapters(config, "heads/blocks", tokens)
    joined = LEARNED.linear * 2 * tokens * 2 * D * D if facts.chains_tokens else 0
    return extra * (blocks + joined)


def _extra_tokens(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """Masks or registers: the extra tokens go through the blocks of the model and attend to the ordinary tokens."""
    c = config.model.block
    heads = config.heads
    if heads.facts.stands_alone:
        each = heads.num_future - 1
        extra = batch_size * _regions(config, seq_len) * each
    else:
        each = 1 if heads.facts.one_set else heads.num_future - 1
        extra = batch_size * -(-seq_len // heads.mask_stride) * each
    passes = THROUGH if config.train.heads_only else LEARNED
    layer = _projections(c, extra, _of_trunk(config), computed)
    layer += _adapters(config, "blocks", extra)
    layer += passes.mixed * _attention(c, extra, seq_len) + LEARNED.mixed * _attention(c, extra, each)
    if heads.lora_rank:
        D = c.d_model
        inner = c.num_heads * c.head_dim
        keys = c.num_kv_heads * c.head_dim
        sides = 2 * (D + inner) + 2 * (D + keys) + (3 if c.gated else 2) * (D + c.d_ff)
        layer += LEARNED.linear * 2 * extra * heads.lora_rank * sides
    return c.num_layers * layer


def _regions(config: Config, seq_len: int) -> int:
    """Number of regions of a row in which a standalone model learns."""
    return seq_len // config.heads.region_tokens


def _teacher(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """The forward pass of a standalone model's teacher, over the text and the tokens that the student predicted."""
    if not config.has_teacher:
        return 0
    c = config.model.block
    each = config.heads.num_future - 1
    extra = batch_size * _regions(config, seq_len) * each
    layer = _block(c, batch_size * seq_len, seq_len, READ, computed)
    layer += _block(c, extra, seq_len + each, READ, computed)
    return c.num_layers * layer


def _logits_at_regions(config: Config, batch_size: int, seq_len: int, computed: bool) -> int:
    """The unembeddings of the predictions of a standalone model, and of its teacher."""
    M = config.heads.num_future
    each = 2 * batch_size * _regions(config, seq_len) * config.model.d_model * config.model.vocab_size
    learned = config.train.learns(config.model.unembedding_path)
    student = M * (LEARNED.linear if learned else THROUGH.linear)
    if not config.has_teacher:
        return student * each
    teacher = M
    if computed:  # The student's tokens, and both the teacher's tokens and its distributions.
        student += M - 1
        teacher += M if config.loss.teacher == "soft" else 0
    return (student + teacher) * each


def _logits(config: Config, tokens: int, computed: bool) -> int:
    """The unembeddings of all heads, and that of the token order loss."""
    per_row = 2 * tokens * config.model.d_model
    M = config.heads.num_future
    whole = per_row * config.model.vocab_size
    draft = per_row * config.heads.draft_vocab or whole
    train = config.train
    learned = train.learns(config.model.unembedding_path)
    first = extra = LEARNED.linear if learned else THROUGH.linear
    if config.heads.unembed == "own":
        extra = LEARNED.linear if train.learns("heads/unembed/table") else THROUGH.linear
    if train.heads_only:
        first = READ.linear
    if computed and config.loss.entropy not in ("none", "random"):
        first += 1
        extra += config.loss.entropy_source == "own"
    if computed and config.loss.distil != "none":
        extra += 1
    order = (LEARNED if train.learns("token_order/table") else THROUGH).linear * whole if config.loss.token_order else 0
    return first * whole + (M - 1) * extra * draft + order
