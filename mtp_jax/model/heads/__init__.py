"""Head families. Each file is one family; `FAMILIES` is the only place that lists them.

A family is four pure functions over the model's parameters; M-1 is its number of extra heads, P <= M-1 the number that
drafts. What they are handed, and what families share, is in `base`.

    init(config, key, trunk) -> params["heads"]              boxed with logical axis names; trunk: the boxed LM
    train(config, params, rows) -> states [M-1, B, T, D]     every head at every position, from the tapped states
    init_cache(config, batch, slots, P) -> cache
    draft(config, params, cache, round) -> (drafts, cache)   a tuple of what `round.propose` returned, nearest first

`draft` gets the tapped states of the Q positions that a round has just processed, enters all of them into the family's
cache, and proposes `round.count` <= P tokens from position index_B[b]. Keys and values are kept in `LayerCache`s, which
the engine enlarges. States are before the norm at the head's end.

The families in `config.BESIDE` read no tap: their extra tokens go through the model itself. In the place of `train`
they have

    forward(config, params, tokens, embedded, positions, segment_ids) -> (tokens' states [B, T, D], [M-1, B, T, D])
    trained(config, tokens, segment_ids) -> [M, B, T]        which head has a state where; others weigh nothing

and in the place of tapped states their `draft` gets the extra tokens' states, which came with the verification.
"""

from types import ModuleType

from mtp_jax.model.heads import (
    anticausal,
    causal,
    linear,
    masks,
    medusa,
    parallel,
    recursive,
    registers,
    sequential,
)

FAMILIES: dict[str, ModuleType] = {
    "parallel": parallel,
    "causal": causal,
    "anticausal": anticausal,
    "linear": linear,
    "medusa": medusa,
    "sequential": sequential,
    "recursive": recursive,
    "masks": masks,
    "registers": registers,
}
