"""Makes a trained model emit several tokens in a pass, without a verifier (Kirchenbauer et al. 2026, arXiv:2602.06019).

    mtp train configs/sums.py --workdir runs/sums
    mtp train configs/standalone.py --workdir runs/standalone

The model of the first line adds numbers in worked steps. The second line trains it to predict up to eight tokens at
once, from a frozen copy of itself. 1.05M parameters, and as many of the copy; two minutes on one slow core. See
`docs/standalone.md` for what to expect, and for a model of your own: `train.init_from` is its workdir.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

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
    heads=HeadsConfig(kind="standalone", num_future=8),
    loss=LossConfig(teacher="hard", span="random"),
    data=DataConfig(
        source="synthetic:sums:digits=4,documents=100000",
        tokenizer="none",
        seq_len=109,
        prompt_tokens=10,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(name="muon", learning_rate=1e-3, muon_learning_rate=0.01, warmup_steps=20, schedule="linear"),
    train=TrainConfig(steps=200, batch_size=16, init_from="runs/sums", checkpoint_every=100, eval_rows=32),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=10, max_new_tokens=26),
)
