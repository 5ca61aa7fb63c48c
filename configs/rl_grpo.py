"""GRPO (arXiv:2402.03300) on sums and differences: the mean over responses of their means, equal limits for the ratio,
and a divergence from the start of the run.

    mtp train configs/rl_arithmetic_pretrain.py --workdir runs/arithmetic
    mtp rl configs/rl_grpo.py

The weight of the divergence is that of the paper. The paper updates once per batch of responses; here a batch has two
updates, so that the limits of the ratio have an effect. Sizes and learning rate are for a small model on two cores.
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
    train=TrainConfig(steps=100, batch_size=32, init_from="runs/arithmetic", init_heads="same", eval_every=10),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=8, max_new_tokens=24),
    rl=RLConfig(
        task="arithmetic",
        reward="number",
        formats="arithmetic",
        prompts=8,
        samples=8,
        max_new_tokens=64,
        updates=2,
        advantage="group_std",
        normaliser="sequences",
        clip_low=0.2,
        clip_high=0.2,
        kl=0.04,
        head_loss=0.1,
    ),
)
