"""Head families. Each file is one family; `FAMILIES` is the only place that lists them.

A family is five pure functions; M-1 is its number of extra heads, P <= M-1 the number that drafts:

    init(config, key) -> head_params                                     boxed with logical axis names
    train(config, head_params, tap_BTD, positions_BT, segment_ids_BT)    -> states [M-1, B, T, D]
    unstack(head_params) -> head_params                                  the layout for decoding
    init_cache(config, batch, slots, P) -> cache
    draft(config, head_params, cache, tap_BQD, start_B, index_B, count)  -> (states [count, B, D], cache)

`train` covers every position and every head. `draft` gets the tapped states of the Q positions that a round has just
processed, enters all of them into the family's cache, and returns the states of heads 1..count at position index_B[b];
count <= P. Keys and values are kept in `LayerCache`s, which the engine enlarges. States are before the final norm.
"""

from types import ModuleType

from mtp_jax.model.heads import parallel

FAMILIES: dict[str, ModuleType] = {"parallel": parallel}
