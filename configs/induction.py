"""Induction: recall the second token of a two-token name (Gloeckle et al. 2024, section 4.1), with two heads.

    mtp train configs/induction.py --workdir runs/induction
    python benchmarks/tasks.py configs/induction.py --methods next-token parallel

The benchmark reports the accuracy of head 0 after the first token of a name. About every fourth token begins a name.
1.1M parameters, minutes on two cores. The paper finds that training with two heads helps below 30M parameters.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=128,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=384,
        max_seq_len=128,
    ),
    heads=HeadsConfig(num_future=2),
    loss=LossConfig(),
    data=DataConfig(
        source="synthetic:induction:names=4,firsts=64,words=64,length=64,documents=100000",
        tokenizer="none",
        seq_len=65,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0),
    train=TrainConfig(steps=3000, batch_size=64, log_every=100, checkpoint_every=3000, eval_rows=512),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=32, max_new_tokens=16),
)
