"""`python -m mtp_jax` is the command `mtp`."""

from mtp_jax.cli import main

main()
