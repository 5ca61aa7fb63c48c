"""Star graph G(5,3): five arms of three nodes. M = 2, so that parallel heads reach the end of the arm.

    mtp train configs/star_graph_5_3.py --workdir runs/star
    python benchmarks/tasks.py configs/star_graph_5_3.py

0.2M parameters with one extra head; about three minutes on two cores. `benchmarks/tasks.py` trains next-token,
parallel, sequential and teacherless models of this shape, and reports how often each generates the whole path.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=20,
        num_layers=3,
        d_model=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        d_ff=192,
        max_seq_len=64,
    ),
    heads=HeadsConfig(num_future=2),
    loss=LossConfig(),
    data=DataConfig(
        source="synthetic:star_graph:degree=5,length=3,nodes=16,documents=200000",
        tokenizer="none",
        seq_len=37,
        prompt_tokens=33,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.0),
    train=TrainConfig(steps=1500, batch_size=128, log_every=100, checkpoint_every=1500, eval_rows=512),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=33, max_new_tokens=3),
)
