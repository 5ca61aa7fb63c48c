"""Recursive heads: one sequential module, which is used for every depth (FastMTP 2025, section 3).

They have the parameters of one depth and predict as far ahead as M-1 depths. Each depth still has its own cache,
because it has other inputs.
"""

from mtp_jax.model.heads.sequential import draft as draft
from mtp_jax.model.heads.sequential import init as init
from mtp_jax.model.heads.sequential import init_cache as init_cache
from mtp_jax.model.heads.sequential import train as train
