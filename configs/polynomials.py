"""Polynomial arithmetic in F7[X]/(X^5), up to three operations (Gloeckle et al. 2024, section 4.2), with three heads.

    mtp train configs/polynomials.py --workdir runs/polynomials
    mtp eval runs/polynomials --data synthetic:polynomials:exactly=4,documents=2000

The second line counts right answers to expressions that are longer than those of training. `benchmarks/tasks.py`
compares objectives. 1.3M parameters; the models of the paper have 30M and 100M.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=13,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=384,
        max_seq_len=64,
    ),
    heads=HeadsConfig(num_future=3),
    loss=LossConfig(),
    data=DataConfig(
        source="synthetic:polynomials:operations=3,documents=100000",
        tokenizer="none",
        seq_len=30,
        prompt_tokens=24,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0),
    train=TrainConfig(steps=3000, batch_size=128, log_every=100, checkpoint_every=3000, eval_rows=512),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=24, max_new_tokens=5),
)
