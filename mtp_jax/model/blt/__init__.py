"""The Byte Latent Transformer (arXiv:2412.09871), a trunk that reads bytes and thinks in patches of bytes.

`patching` says where patches begin, `hashing` hashes the last bytes, `model` runs over whole rows, `decoding` over new
bytes, and `local` drafts. The names here are the functions of a trunk (`model.trunk`).
"""

from mtp_jax.model.blt.decoding import decode as decode
from mtp_jax.model.blt.decoding import decode_view as decode_view
from mtp_jax.model.blt.decoding import init_caches as init_caches
from mtp_jax.model.blt.local import draft as draft
from mtp_jax.model.blt.model import embed as embed
from mtp_jax.model.blt.model import final_norm as final_norm
from mtp_jax.model.blt.model import init as init
from mtp_jax.model.blt.model import run as run
from mtp_jax.model.blt.model import unembedding as unembedding
from mtp_jax.model.blt.model import with_constants as with_constants
