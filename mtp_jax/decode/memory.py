"""Refuses a cache that does not fit into memory, before anything is compiled or allocated."""

import jax
import psutil

from mtp_jax.decode.state import LEAST_SLOTS, Plan, empty_state
from mtp_jax.errors import UserError


class CacheTooLarge(UserError):
    """The cache of a batch does not fit into memory."""


def cache_bytes(plan: Plan, rows: int, slots: int) -> int:
    """Largest number of bytes of decoding states at one time: caches, tokens and counters, and the smaller caches while
    they are copied."""
    grows = slots > LEAST_SLOTS
    return _state_bytes(plan, rows, slots) + (_state_bytes(plan, rows, slots // 2) if grows else 0)


def _state_bytes(plan: Plan, rows: int, slots: int) -> int:
    one = jax.ShapeDtypeStruct((rows,), "int32")
    prompt_BT = jax.ShapeDtypeStruct((rows, 1), "int32")
    ends = jax.ShapeDtypeStruct((1,), "int32")
    state = jax.eval_shape(lambda *arrays: empty_state(plan, slots, slots, *arrays), prompt_BT, one, one, ends)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def free_bytes() -> int:
    """Free memory of the default device, or of the host if the device is a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return psutil.virtual_memory().available


def check_cache_fits(plan: Plan, rows: int, slots: int) -> None:
    """Raises a CacheTooLarge if the cache does not fit. The error says what it needs and what would fit."""
    needed = cache_bytes(plan, rows, slots)
    free = free_bytes()
    if needed <= free:
        return
    per_row = needed // rows
    rows_fit = free // per_row
    slots_fit = free * slots // needed
    what_fits = f"{rows_fit} rows of {slots:,} slots" if rows_fit else f"no row of {slots:,} slots"
    raise CacheTooLarge(
        f"a cache of {rows} rows with {slots:,} slots each needs {needed:,} bytes, and {free:,} are free; "
        f"{what_fits} would fit, or {rows} rows of {slots_fit:,}: use fewer prompts at once or a smaller max_new_tokens"
    )
