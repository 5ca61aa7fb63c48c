"""Reinforcement of adapters of SmolLM2-135M-Instruct on word problems with a number as their answer.

    mtp rl configs/rl_gsm8k.py --rl.task gsm8k_train.jsonl

The file has a line of JSON per problem, with `question` and `answer`. The train split of GSM8K (Cobbe et al. 2021, MIT
licence) is such a file: `grade_school_math/data/train.jsonl` of https://github.com/openai/grade-school-math. Keep its
test split for `mtp eval --task`. The last number of a response must be that of the answer.

One process rolls out and updates. A model of this size is right on few of these problems, so most groups have no
signal, and `refills` looks for others.
"""

from mtp_jax import (
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    RLConfig,
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
        remat="block",  # otherwise the activations of an update need more memory than the rest of the process
    ),
    heads=HeadsConfig(num_future=1),
    data=DataConfig(tokenizer="smollm2", seq_len=512),
    optim=OptimConfig(learning_rate=5e-5, warmup_steps=5, schedule="constant", weight_decay=0.0),
    train=TrainConfig(
        steps=200,
        batch_size=16,
        grad_accum=8,
        trainable="lora",
        init_from="smollm2",
        eval_every=20,
        checkpoint_every=10,
    ),
    decode=DecodeConfig(num_prompts=8, prompt_tokens=64, max_new_tokens=64),
    lora=LoraConfig(rank=16, alpha=32.0),
    rl=RLConfig(
        task="gsm8k_train.jsonl",
        reward="number",
        chat=True,
        prompts=4,
        samples=4,
        max_new_tokens=256,
        draft="lookup",
        refills=2,
        overlong_buffer=32,
        eval_prompts=32,
        eval_samples=4,
    ),
)
