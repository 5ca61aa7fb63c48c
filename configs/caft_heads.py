"""CAFT, phase 1 (arXiv:2506.07833): four extra heads for a chat model, on its own answers. The model does not change.

    mtp train configs/caft_heads.py --data.source answers.jsonl

docs/fine_tune.md says how to make the answers. Each head starts as a copy of the second last block. The loss is the sum
of 0.8^m L_m over the heads m = 1 to 4. The run ends early when the held-out loss no longer improves.

For one GPU with 24 GB, by estimate; add `--model.dtype bfloat16` there. On two CPU cores a step takes minutes.
Expected: the held-out losses of heads 1 to 4 fall, and that of head 0 keeps its value.
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
    loss=LossConfig(decay=0.8),
    data=DataConfig(source="data/chat.jsonl", tokenizer="smollm2", seq_len=1024),
    optim=OptimConfig(learning_rate=1e-4, warmup_steps=300, final_fraction=0.0, b2=0.999, weight_decay=0.0),
    train=TrainConfig(
        steps=3000,
        batch_size=64,
        grad_accum=8,
        trainable="heads",
        init_from="smollm2",
        eval_every=100,
        patience=3,
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
)
