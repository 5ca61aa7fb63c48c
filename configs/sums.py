"""A small language model that adds numbers of four digits in worked steps: the start of `configs/standalone.py`.

    mtp train configs/sums.py --workdir runs/sums

1.05M parameters, three minutes on one slow core. `benchmarks/standalone.py` measures it.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=17,
        num_layers=4,
        d_model=128,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        d_ff=512,
        max_seq_len=128,
    ),
    heads=HeadsConfig(num_future=1),
    data=DataConfig(
        source="synthetic:sums:digits=4,documents=100000",
        tokenizer="none",
        seq_len=109,
        prompt_tokens=10,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=600, batch_size=16, checkpoint_every=200, eval_rows=32),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=10, max_new_tokens=26),
)
