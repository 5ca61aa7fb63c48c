"""Reinforcement on sums and differences, in ten to twenty minutes on two cores.

    mtp train configs/rl_arithmetic_pretrain.py --workdir runs/arithmetic
    mtp rl configs/rl_arithmetic.py --workdir runs/arithmetic_rl

The loss is that of DAPO (arXiv:2503.14476) without its resampling: a mean over tokens, and a higher limit for ratios
above 1. The heads keep learning, so they keep drafting well. See docs/reinforce.md.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, RLConfig, TrainConfig

config = Config(
    # The model of configs/rl_arithmetic_pretrain.py.
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
    data=DataConfig(seq_len=80),
    optim=OptimConfig(learning_rate=3e-4, warmup_steps=5, schedule="constant", weight_decay=0.0),
    train=TrainConfig(
        steps=100,
        batch_size=32,
        init_from="runs/arithmetic",
        init_heads="same",
        eval_every=10,
        checkpoint_every=10,
        keep_checkpoints=20,
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=8, max_new_tokens=24),
    rl=RLConfig(
        task="arithmetic",
        reward="number",
        formats="arithmetic",
        prompts=8,
        samples=8,
        max_new_tokens=64,
        updates=2,
        head_loss=0.1,
        eval_prompts=64,
    ),
)
