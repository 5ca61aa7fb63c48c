"""What `mtp quickstart` trains, to start your own from.

    mtp train configs/quickstart.py --workdir runs/mine --model.d_model 256 --model.num_heads 4 --model.num_kv_heads 4

1,000 steps, or as many as `--train.steps` says; `mtp quickstart` itself takes as many as two minutes hold.
"""

from mtp_jax.cli.quickstart import CONFIG as config  # noqa: F401
