"""Star graph G(2,3): two arms of three nodes. M = 2, so that parallel heads reach the end of the arm.

    mtp train configs/star_graph_2_3.py --workdir runs/star
    python benchmarks/tasks.py configs/star_graph_2_3.py

0.4M parameters with one extra head; a minute on two cores. `benchmarks/tasks.py` trains next-token, parallel,
sequential and teacherless models of this shape, and reports how often each generates the whole path. The results are in
benchmarks/RESULTS.md.
"""

from mtp_jax import Config, DataConfig, DecodeConfig, HeadsConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig

config = Config(
    model=ModelConfig(
        vocab_size=12,
        num_layers=3,
        d_model=96,
        num_heads=4,
        num_kv_heads=4,
        head_dim=24,
        d_ff=256,
        max_seq_len=64,
    ),
    heads=HeadsConfig(num_future=2),
    loss=LossConfig(),
    data=DataConfig(
        source="synthetic:star_graph:degree=2,length=3,nodes=8,documents=200000",
        tokenizer="none",
        seq_len=19,
        prompt_tokens=15,
        eval_fraction=0.01,
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.0),
    train=TrainConfig(steps=600, batch_size=128, log_every=100, checkpoint_every=600, eval_rows=512),
    decode=DecodeConfig(num_prompts=16, prompt_tokens=15, max_new_tokens=3),
)
