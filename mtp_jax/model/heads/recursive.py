"""Recursive heads: one sequential module, used again for every depth (FastMTP 2025, section 3).

The parameters of one depth, the reach of M-1; each depth still has its own cache, because its inputs are its own.
"""

from mtp_jax.model.heads.sequential import draft as draft
from mtp_jax.model.heads.sequential import init as init
from mtp_jax.model.heads.sequential import init_cache as init_cache
from mtp_jax.model.heads.sequential import train as train
