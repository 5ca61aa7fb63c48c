"""What `mtp quickstart` trains, to start your own from.

    mtp train configs/quickstart.py --workdir runs/mine --model.d_model 256 --model.num_heads 4 --model.num_kv_heads 4

Two cores of a CPU: about five minutes. The figures of the unchanged config are in the README.
"""

from mtp_jax.cli.quickstart import CONFIG as config  # noqa: F401
