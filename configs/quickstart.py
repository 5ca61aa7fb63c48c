"""The small model that `mtp quickstart` trains. Change it to make your own.

    mtp train configs/quickstart.py --workdir runs/mine --model.d_model 256 --model.num_heads 4 --model.num_kv_heads 4

1,000 steps, unless you give `--train.steps`. `mtp quickstart` itself trains as many steps as fit into two minutes.
"""

from mtp_jax.cli.quickstart import CONFIG as config  # noqa: F401
