"""A small language model that answers sums and differences in three formats: the start of `configs/rl_arithmetic.py`.

    mtp train configs/rl_arithmetic_pretrain.py --workdir runs/arithmetic
    mtp formats runs/arithmetic --prompts arithmetic --checker number

0.69M parameters, three to five minutes on two cores. Of its samples at temperature 1, 46 % are right: 43 % of `plain`,
59 % of `code`, 44 % of `steps`. It stops early, so that reinforcement has something to do: after 350 steps, 63 % are
right.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258,
        num_layers=4,
        d_model=96,
        num_heads=3,
        num_kv_heads=3,
        head_dim=32,
        d_ff=256,
        max_seq_len=128,
    ),
    heads=HeadsConfig(num_future=3),
    data=DataConfig(source="synthetic:arithmetic", tokenizer="bytes", seq_len=128, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50, schedule="constant"),
    train=TrainConfig(steps=300, batch_size=16, eval_rows=64),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=8, max_new_tokens=24),
)
