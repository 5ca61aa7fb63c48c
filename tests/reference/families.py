"""Every head family with every setting that changes what it computes: the contract suite runs over these names."""

from mtp_jax.model.heads import FAMILIES

SETTINGS = {
    "parallel": {},
    "parallel, two blocks, own ends, 1 + w": {"layers": 2, "norm": "own", "unembed": "own", "norm_plus_one": True},
    "parallel, normed tap at the top": {"tap": 2, "tap_norm": True},
    "parallel, mixed tap": {"tap_mix": True},
    "causal": {},
    "causal, two blocks": {"layers": 2},
    "anticausal": {},
    "linear": {},
    "linear, residual, no norm": {"residual": True, "norm": "none"},
    "medusa": {"init": "random"},
    "medusa, as published": {"init": "random", "tap": 2, "tap_norm": True, "norm": "none", "unembed": "own"},
    "medusa, three layers": {"init": "random", "layers": 3},
    "medusa, own ends, a part of the vocabulary": {"init": "random", "unembed": "own", "norm": "own", "draft_vocab": 8},
    "sequential": {},
    "sequential, as DeepSeek-V3": {"tap": 2, "tap_norm": True, "norm": "own"},
    "sequential, chained behind the norm": {"tap": 2, "norm": "own", "chain": "post_norm", "num_future": 4},
    "sequential, hidden first, two blocks": {"concat": "hidden_first", "layers": 2, "chain": "post_norm"},
    "sequential, a part of the vocabulary": {"draft_vocab": 10},
    "sequential, without attention, two blocks": {"attention": False, "layers": 2},
    "recursive": {},
    "recursive, without attention": {"attention": False, "tap": 2, "norm": "own", "draft_vocab": 10},
    "recursive, own ends": {"norm": "own", "unembed": "own", "chain": "post_norm", "tap": 2, "num_future": 5},
    "recursive, as EAGLE": {"tap": 2, "tap_norm": True, "norm": "none", "input_norm": False},
    "masks": {},
    "masks, with LoRA and own ends": {"lora_rank": 2, "norm": "own", "unembed": "own", "num_future": 4},
    "masks, every third position": {"mask_stride": 3},
    "standalone": {},
    "standalone, with LoRA": {"lora_rank": 2, "num_future": 4},
    "registers": {},
    "registers, with LoRA": {"lora_rank": 3, "num_future": 4},
}
"""Fields of `HeadsConfig` by name; the name begins with the family."""


def heads_of(name):
    """Fields of `HeadsConfig`."""
    return {"kind": name.split(",")[0]} | SETTINGS[name]


KINDS = [name for name in SETTINGS if "," not in name]
assert set(KINDS) == set(FAMILIES)

DRAFTING = [name for name in SETTINGS if not name.startswith("registers") and "third" not in name]
"""What the decoding tests run over: registers draft nothing, and where masks stood in training is no matter there."""

READS_TOKENS = ("sequential", "recursive")
"""Families whose head m sees the tokens up to t+m."""
