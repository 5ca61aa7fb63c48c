"""CAFT, phase 2 (arXiv:2506.07833), all parameters: fine-tune a model whose frozen heads look further ahead.

    mtp train configs/caft_heads.py --data.source answers.jsonl
    mtp train configs/caft_full.py --data.source task.jsonl

The loss is L_0 + 0.01 r(s) sum of 0.8^m L_m. The factor r(s) falls from 1 to 0 over the run (`rsine`). The gradient of
the later heads reaches the model through the heads, which stay as they are.

For one GPU with 24 GB, by estimate; add `--model.dtype bfloat16` there. Expected: a held-out next-token loss near that
of `configs/next_token_full.py`; compare both on your task.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

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
    heads=HeadsConfig(num_future=5, init="copy_block", init_block=-2),
    loss=LossConfig(extra_weight=0.01, decay=0.8, schedule="rsine"),
    data=DataConfig(source="data/chat.jsonl", tokenizer="smollm2", seq_len=512),
    optim=OptimConfig(learning_rate=5e-6, warmup_steps=50, final_fraction=0.0, b2=0.999, weight_decay=0.0),
    train=TrainConfig(
        steps=1500,
        batch_size=32,
        grad_accum=4,
        trainable="^(?!heads/)",
        init_from="runs/caft_heads",
        init_heads="same",
        eval_every=100,
        patience=2,
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
)
