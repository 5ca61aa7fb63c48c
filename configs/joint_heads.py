r"""Heads and model trained together, against heads on a frozen model (Mehra et al. 2025, arXiv:2502.09419).

    mtp train configs/joint_heads.py --data.source answers.jsonl
    mtp train configs/joint_heads.py --workdir runs/frozen_heads --data.source answers.jsonl \
        --train.trainable heads --train.heads_first 0

The first line uses what the paper names: the model learns at a tenth of the rate of the heads (`all=0.1`), the heads
learn alone for the first 300 steps, every head contributes alike to the loss (`loss.balance`), and the heads read a
learned mix of the states of all layers (`heads.tap_mix`). The second line freezes the model.

For one GPU with 24 GB, by estimate; add `--model.dtype bfloat16` there. Expected, from the paper: lower held-out losses
of heads 1 to 4 than with a frozen model, and another next-token output, which the frozen run does not have.
"""

from mtp_jax import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    # SmolLM2-135M-Instruct. For another model, take its values from the config.json of its run.
    model=ModelConfig(
        vocab_size=49_152,
        num_layers=30,
        d_model=576,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        d_ff=1536,
        max_seq_len=8192,
        rope_theta=100_000.0,
        norm_eps=1e-5,
    ),
    heads=HeadsConfig(num_future=5, tap_mix=True, init="copy_block", init_block=-2),
    loss=LossConfig(balance=True),
    data=DataConfig(source="data/chat.jsonl", tokenizer="smollm2", seq_len=512),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=300, final_fraction=0.0, b2=0.999, weight_decay=0.0),
    train=TrainConfig(
        steps=3000,
        batch_size=32,
        grad_accum=4,
        trainable=("heads", "all=0.1"),
        heads_first=300,
        init_from="smollm2",
        eval_every=100,
        patience=3,
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
)
