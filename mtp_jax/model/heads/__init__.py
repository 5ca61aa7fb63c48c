"""Head families. Each file is one family; `FAMILIES` is the only place that lists them.

A family is four pure functions over the model's parameters; M-1 is its number of extra heads, P <= M-1 the number that
drafts. What they are handed, and what families share, is in `base`.

    init(config, key, trunk) -> params["heads"]              boxed with logical axis names; trunk: the boxed LM
    train(config, params, rows) -> states [M-1, B, T, D]     every head at every position
    init_cache(config, batch, slots, P) -> cache
    draft(config, params, cache, round) -> (drafts, cache)   a tuple of what `round.propose` returned, nearest first

`draft` gets the tapped states of the Q positions that a round has just processed, enters all of them into the family's
cache, and proposes `round.count` <= P tokens from position index_B[b]. Keys and values are kept in `LayerCache`s, which
the engine enlarges. States are before the norm at the head's end.
"""

from types import ModuleType

from mtp_jax.model.heads import anticausal, causal, linear, medusa, parallel, recursive, sequential

FAMILIES: dict[str, ModuleType] = {
    "parallel": parallel,
    "causal": causal,
    "anticausal": anticausal,
    "linear": linear,
    "medusa": medusa,
    "sequential": sequential,
    "recursive": recursive,
}
