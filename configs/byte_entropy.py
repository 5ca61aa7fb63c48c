"""A small byte model. Its entropies cut text into patches.

    mtp train configs/byte_entropy.py --workdir runs/byte_entropy
    mtp patches runs/byte_entropy --data stdlib --rows 128

1.02M parameters, a window of 128 bytes (512 in the Byte Latent Transformer, arXiv:2412.09871). It reads 0.4 MB, which
took ten minutes on two cores that a dozen other programs used. The held-out loss is then 1.65 nats a byte, 2.37 bits.
On 128 rows the threshold for patches of 4.5 bytes is 2.73 nats. Most patches begin with a word, or at a rare letter in
one. More steps make a better model.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=258,
        num_layers=9,
        d_model=96,
        num_heads=3,
        num_kv_heads=3,
        head_dim=32,
        d_ff=256,
        max_seq_len=1024,
        layer_pattern=("window",),
        window=128,
    ),
    heads=HeadsConfig(num_future=1),
    data=DataConfig(source="stdlib", tokenizer="bytes", seq_len=256, eval_fraction=0.01),
    optim=OptimConfig(name="muon", learning_rate=3e-3, warmup_steps=50),
    train=TrainConfig(steps=200, batch_size=8, eval_rows=256),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=128, max_new_tokens=256),
)
