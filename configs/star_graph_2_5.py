"""Star graph G(2,5): two arms of five nodes. M = 4, so that parallel heads reach the end of the arm.

    mtp train configs/star_graph_2_5.py --workdir runs/star
    python benchmarks/tasks.py configs/star_graph_2_5.py

0.9M parameters with three extra heads; about ten minutes on two cores. `benchmarks/tasks.py` trains next-token,
parallel, sequential and teacherless models of this shape, and reports how often each generates the whole path.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=16,
        num_layers=5,
        d_model=96,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        d_ff=256,
        max_seq_len=64,
    ),
    heads=HeadsConfig(num_future=4),
    loss=LossConfig(),
    data=DataConfig(
        source="synthetic:star_graph:degree=2,length=5,nodes=12,documents=200000",
        tokenizer="none",
        seq_len=33,
        prompt_tokens=27,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.0),
    train=TrainConfig(steps=4000, batch_size=128, log_every=100, checkpoint_every=4000, eval_rows=512),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=27, max_new_tokens=5),
)
