"""The ordinary fine-tune of all parameters, to compare others with: the next-token loss alone.

    mtp train configs/next_token_full.py --data.source task.jsonl

The settings are those of `configs/caft_full.py`, without heads. For one GPU with 24 GB, by estimate; add `--model.dtype
bfloat16` there. Expected: the held-out loss falls, and the run ends early when it rises again.
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
    heads=HeadsConfig(num_future=1),
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
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
)
