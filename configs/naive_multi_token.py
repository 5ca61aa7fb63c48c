"""Fine-tuning with several heads at once, without phases: new heads, all weights 1, all parameters.

    mtp train configs/naive_multi_token.py --data.source task.jsonl

This is the run that CAFT (arXiv:2506.07833) is made to do better than: the losses of new heads change the model before
the heads know anything. Gloeckle et al. 2024 found no reliable gain with it either. For one GPU with 24 GB, by
estimate; add `--model.dtype bfloat16` there. Expected, from the paper: a higher held-out next-token loss than with
`configs/next_token_full.py`.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, ModelConfig, OptimConfig, TrainConfig

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
    data=DataConfig(source="data/chat.jsonl", tokenizer="smollm2", seq_len=512),
    optim=OptimConfig(learning_rate=5e-6, warmup_steps=50, final_fraction=0.0, b2=0.999, weight_decay=0.0),
    train=TrainConfig(
        steps=1500,
        batch_size=32,
        grad_accum=4,
        trainable="all",
        init_from="smollm2",
        eval_every=100,
        patience=2,
        stop_on="next_token",
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
)
