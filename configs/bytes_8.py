"""A byte model that predicts eight bytes at once, each with an unembedding of its own (Gloeckle et al. 2024).

    mtp train configs/bytes_8.py --workdir runs/bytes_8
    mtp bench decode runs/bytes_8 --prompt-tokens 128 --max-new-tokens 192

1.31M parameters, as many as `bytes_1.py` and `bytes_4.py`. It reads 0.4 MB, which took six minutes on two cores that a
dozen other programs used. The held-out loss is then 1.90 nats a byte for the next byte (2.75 bits), and 2.90 for the
eighth. A round emits 3.0 bytes. At this size that is slower than one byte at a time: see `benchmarks/RESULTS.md`.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258, num_layers=5, d_model=96, num_heads=3, num_kv_heads=3, head_dim=32, d_ff=192, max_seq_len=1024
    ),
    heads=HeadsConfig(num_future=8, unembed="own"),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=200, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
