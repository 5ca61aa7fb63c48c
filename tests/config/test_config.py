"""Equations of the config: JSON there and back is the same config; whatever cannot work is refused with its numbers.

Each docstring names the line whose deletion breaks the test.
"""

import dataclasses
import functools
import json
import math
import re
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax.config import (
    Arch,
    Config,
    DataConfig,
    DecodeConfig,
    HeadsConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RLConfig,
    TrainConfig,
    differences,
    flatten,
    from_json,
    to_json,
)
from mtp_jax.errors import UserError

SECTIONS = [field.name for field in dataclasses.fields(Config)]


def floats(low, high):
    return st.floats(low, high, allow_nan=False)


@st.composite
def configs(draw):
    """Valid configs in which one field of every type varies: int, float, bool, str, Literal and both kinds of tuple."""
    num_future = draw(st.integers(1, 5))
    weights = st.lists(floats(0, 10), min_size=num_future, max_size=num_future).filter(any).map(tuple)
    return Config(
        model=ModelConfig(
            num_layers=draw(st.integers(2, 40)),
            qk_norm=draw(st.booleans()),
            logit_softcap=draw(floats(0, 100)),
            dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        ),
        heads=HeadsConfig(num_future=num_future, tap=draw(st.integers(-1, 2))),
        loss=LossConfig(head_weights=draw(st.just(()) | weights), z_loss=draw(floats(0, 1))),
        data=DataConfig(source=draw(st.text()), seed=draw(st.integers(0, 2**63))),
        optim=OptimConfig(no_decay=tuple(draw(st.lists(st.text(), max_size=3)))),
    )


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(configs())
def test_json_round_trip(config):
    """from_json(to_json(c)) = c, hash included, and differences(c, c') = [].

    Breaks without `tuple(value) if isinstance(value, list)` (lists are unhashable, and jit needs the hash).
    """
    again = from_json(to_json(config))
    assert again == config
    assert hash(again) == hash(config)
    assert differences(config, again) == []


def test_missing_sections_and_fields_take_defaults():
    """from_json of an object with one field = Config with that field. Breaks if a section must be complete."""
    expected = Config(model=ModelConfig(d_model=512))
    assert from_json('{"model": {"d_model": 512}}') == expected
    assert from_json("{}") == Config()


def test_flatten_and_differences():
    """differences names exactly the changed fields by dotted path, old -> new. Breaks if a section is skipped."""
    new = Config(model=ModelConfig(d_model=512), train=TrainConfig(steps=7), loss=LossConfig(head_weights=(1.0,) * 4))
    assert differences(Config(), new) == [
        "model.d_model: 256 -> 512",
        "loss.head_weights: () -> (1.0, 1.0, 1.0, 1.0)",
        "train.steps: 1000 -> 7",
    ]
    assert flatten(Config())["optim.no_decay"] == ("norm|bias", "embed")
    assert {path.split(".")[0] for path in flatten(Config())} == set(SECTIONS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "run.json is not JSON: Expecting property name"),
        pytest.param("[" * 100_000, "run.json is not JSON: maximum recursion depth exceeded", id="too-deep"),
        ("[1]", "run.json is [1]; a JSON object with fields is needed"),
        ('{"model": 3}', "run.json.model is 3; a JSON object with fields is needed"),
        ('{"modle": {}}', "run.json: unknown key 'modle'; did you mean 'model'?"),
        ('{"model": {"d_modle": 4}}', "run.json.model: unknown key 'd_modle'; did you mean 'd_model'?"),
        ('{"heads": {"zzz": 4}}', "run.json.heads: unknown key 'zzz'; known: kind, num_future, tap, tap_norm"),
        ('{"model": {"d_model": "64"}}', "run.json.model.d_model is '64'; a whole number is needed"),
        ('{"model": {"d_model": 64.0}}', "run.json.model.d_model is 64.0; a whole number is needed"),
        ('{"model": {"d_model": true}}', "run.json.model.d_model is True; a whole number is needed"),
        ('{"model": {"d_model": null}}', "run.json.model.d_model is None; a whole number is needed"),
        ('{"model": {"qk_norm": 1}}', "run.json.model.qk_norm is 1; True or False is needed"),
        ('{"model": {"rope_theta": "x"}}', "run.json.model.rope_theta is 'x'; a number is needed"),
        ('{"model": {"rope_theta": true}}', "run.json.model.rope_theta is True; a number is needed"),
        ('{"data": {"source": 3}}', "run.json.data.source is 3; a string is needed"),
        (
            '{"model": {"remat": "blocks"}}',
            "run.json.model.remat is 'blocks'; choose one of 'none', 'dots', 'block', 'offload'",
        ),
        ('{"loss": {"head_weights": 1}}', "run.json.loss.head_weights is 1; use a tuple (a list in JSON)"),
        ('{"loss": {"head_weights": [1, "x"]}}', "run.json.loss.head_weights is 'x'; a number is needed"),
        ('{"model": {"head_dim": 3}}', "model.head_dim=3 with model.rope_fraction=1.0 rotates 3 dimensions"),
    ],
)
def test_bad_json_is_refused(text, message):
    """What the schema does not know is an error that names place, value and remedy, one line long.

    Breaks without any one check of `_build` and `_check_type`.
    """
    with pytest.raises(UserError) as caught:
        from_json(text, origin="run.json")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_floats_in_json():
    """1 is a fine float in JSON. Breaks without `(int, float)` in `_check_type`."""
    assert from_json('{"loss": {"z_loss": 1, "head_weights": [1, 0, 0.5, 2]}}').loss.head_weights == (
        1.0,
        0.0,
        0.5,
        2.0,
    )


STANDALONE = HeadsConfig(kind="standalone")
RL = functools.partial(RLConfig, task="task.jsonl", reward="number")
"""A `rl` section that is on."""
OF_RL = {
    **{name: -1.0 for name in ("clip_high", "kl", "head_loss")},
    **{name: -1 for name in ("refills", "overlong_buffer")},
}
"""Settings of `rl` that may be 0 and not less."""
REFUSED = [
    (lambda: RLConfig(prompts=4), "rl.prompts=4 has no effect without rl.task"),
    (lambda: RLConfig(task="task.jsonl"), "rl.task='task.jsonl' needs rl.reward, for example rl.reward='number'"),
    (lambda: RL(samples=1), "rl.samples=1; a group needs 2 or more, because responses are compared with each other"),
    (lambda: RL(temperature=0.0), "rl.temperature=0.0; it must be above 0"),
    (lambda: RL(top_p=0.0), "rl.top_p=0.0; it must be above 0 and at most 1"),
    (lambda: RL(clip_low=1.5), "rl.clip_low=1.5; it must be in [0, 1]"),
    (lambda: RL(dual_clip=1.0), "rl.dual_clip=1.0; it must be above 1, or 0 to switch it off"),
    *[(functools.partial(RL, **{name: value}), f"rl.{name}={value!r} is negative") for name, value in OF_RL.items()],
    (
        lambda: RL(overlong_buffer=128),
        "rl.overlong_buffer=128 must be below rl.max_new_tokens=128",
    ),
    (lambda: RL(entropy="keep_top", entropy_fraction=1.5), "rl.entropy_fraction=1.5; it must be in [0, 1]"),
    (
        lambda: RL(entropy="drop_top", entropy_fraction=1.0),
        "rl.entropy_fraction=1.0 with rl.entropy='drop_top' leaves nothing to learn",
    ),
    *[
        (functools.partial(RL, **{name: value}), f"rl.{name}={value!r} has no effect without rl.entropy")
        for name, value in {
            "entropy_fraction": 0.5,
            "entropy_scope": "microbatch",
            "entropy_normaliser": "all",
        }.items()
    ],
    (
        lambda: RL(entropy="random", entropy_selection="threshold"),
        "rl.entropy_selection='threshold' has no effect without rl.entropy='keep_top' or 'drop_top'",
    ),
    (
        lambda: Config(rl=RL(), data=DataConfig(seq_len=128)),
        "rl.max_new_tokens=128 leaves no room for a prompt in rows of data.seq_len=128",
    ),
    *[
        (
            functools.partial(lambda given, size: Config(rl=RL(**given), train=TrainConfig(batch_size=size)), *case),
            f"rl.updates={case[0].get('updates', 1)} optimizer steps of train.batch_size={case[1]} responses do not "
            "take all",
        )
        for case in (({}, 4), ({"prompts": 3}, 16), ({"updates": 3}, 8))
    ],
    (
        lambda: Config(rl=RL(), train=TrainConfig(trainable="heads")),
        "rl.task='task.jsonl' with train.trainable='heads' changes no response; train more than heads",
    ),
    *[
        (
            functools.partial(lambda name, given: Config(rl=RL(), **{name: given}), section, given),
            f"{section}.{setting} has no effect in reinforcement (rl.task='task.jsonl'); leave it out",
        )
        for section, given, setting in (
            ("loss", LossConfig(token_order=0.5), "token_order=0.5"),
            ("loss", LossConfig(entropy="soft"), "entropy='soft'"),
            ("data", DataConfig(prompt_tokens=4), "prompt_tokens=4"),
            ("data", DataConfig(noise="case:0.1"), "noise='case:0.1'"),
            ("train", TrainConfig(heads_first=3), "heads_first=3"),
            ("train", TrainConfig(eval_rows=3), "eval_rows=3"),
        )
    ],
    (
        lambda: Config(rl=RL(), optim=OptimConfig(name="schedule_free", schedule="constant")),
        "optim.name='schedule_free' with rl.task='task.jsonl': its gradients are not those of the parameters that",
    ),
    (
        lambda: Config(rl=RL(), heads=STANDALONE),
        "rl.task='task.jsonl' with heads.kind='standalone': reinforcement of standalone models is not implemented",
    ),
    (
        lambda: Config(rl=RL(draft="heads"), heads=HeadsConfig(num_future=1)),
        "rl.draft='heads', but this model has no heads that can draft; use 'auto', 'lookup' or 'none'",
    ),
    (
        lambda: Config(rl=RL(head_loss=1.0), heads=HeadsConfig(num_future=1)),
        "rl.head_loss=1.0, but heads.num_future=1 has no extra head; use head_loss=0",
    ),
    (
        lambda: Config(rl=RL(head_loss=1.0), lora=LoraConfig(rank=2), train=TrainConfig(trainable="lora")),
        "rl.head_loss=1.0, but train.trainable='lora' trains no head; add 'heads' to it, or use head_loss=0",
    ),
    (
        lambda: Config(rl=RL(head_loss=1.0), loss=LossConfig(decay=0.0)),
        "rl.head_loss=1.0, but loss.head_weights=(), loss.extra_weight=1.0 and loss.decay=0.0 switch every extra head",
    ),
    (
        lambda: DataConfig(noise="typo:0.1"),
        "data.noise='typo:0.1' has the kind of noise 'typo'; use one of case, drop,",
    ),
    (
        lambda: DataConfig(noise="drop:0.1", tokenizer="none"),
        "data.noise='drop:0.1' changes characters, but data.tokenizer='none' reads token ids; leave it empty",
    ),
    (
        lambda: Config(loss=LossConfig(teacher="soft")),
        "loss.teacher='soft' has no effect without heads.kind='standalone'",
    ),
    (lambda: Config(loss=LossConfig(span="full")), "loss.span='full' has no effect without heads.kind='standalone'"),
    (
        lambda: Config(heads=HeadsConfig(kind="standalone", num_future=9), data=DataConfig(seq_len=17)),
        "heads.num_future=9 needs rows of at least 18 tokens with heads.kind='standalone', two for every prediction, "
        "but data.seq_len=17; use longer rows, or num_future=8 or less",
    ),
    *[
        (
            functools.partial(lambda given: Config(heads=STANDALONE, loss=LossConfig(**given)), {name: value}),
            f"loss.{name}={value!r} has no effect with heads.kind='standalone'",
        )
        for name, value in {"distil": "kl", "entropy": "soft", "token_order": 1.0}.items()
    ],
    (
        lambda: Config(heads=STANDALONE, mesh=MeshConfig(context=2)),
        "mesh.context=2 with heads.kind='standalone': its regions cannot be split",
    ),
    (lambda: HeadsConfig(kind="standalone", norm="own"), "predicts with the model's own norm and unembedding"),
    (lambda: ModelConfig(num_heads=6, num_kv_heads=4), "model.num_heads=6 is not a multiple of model.num_kv_heads=4"),
    (lambda: ModelConfig(head_dim=7), "model.head_dim=7 with model.rope_fraction=1.0 rotates 7 dimensions"),
    *[
        (functools.partial(ModelConfig, **{name: -1.0}), f"model.{name}=-1.0 is negative; 0 switches it off")
        for name in ("logit_softcap", "attn_softcap")
    ],
    *[
        (functools.partial(ModelConfig, **{name: -1}), f"model.{name}=-1 is negative")
        for name in ("attn_scale", "rope_theta_window", "rope_original_len", "rope_attention_factor")
    ],
    *[
        (functools.partial(ModelConfig, **{name: 0.0}), f"model.{name}=0.0; it must be above 0")
        for name in ("rope_factor", "rope_high", "rope_beta_fast", "embed_scale", "residual_scale", "logit_scale")
    ],
    (lambda: ModelConfig(rope_fraction=1.5), "model.rope_fraction=1.5; it must be above 0 and at most 1"),
    (
        lambda: ModelConfig(head_dim=6, rope_fraction=0.5),
        "model.head_dim=6 with model.rope_fraction=0.5 rotates 3",
    ),
    (lambda: ModelConfig(window=4), "model.window=4 with model.layer_pattern=('full',): 'window' layers need a window"),
    (lambda: ModelConfig(layer_pattern=("window",)), "model.window=0 with model.layer_pattern=('window',)"),
    (lambda: ModelConfig(layer_pattern=()), "model.layer_pattern is empty"),
    (lambda: ModelConfig(norm="layer", norm_plus_one=True), "model.norm_plus_one=True is for RMSNorm"),
    (lambda: ModelConfig(num_experts=-1), "model.num_experts=-1 is negative; 0 is one feed-forward layer"),
    (lambda: ModelConfig(num_experts=4), "model.experts_per_token=0 with model.num_experts=4; use 1..4"),
    (
        lambda: ModelConfig(num_experts=4, experts_per_token=5),
        "model.experts_per_token=5 with model.num_experts=4; use 1..4",
    ),
    (lambda: ModelConfig(experts_per_token=2), "model.experts_per_token=2 has no effect without model.num_experts"),
    (
        lambda: ModelConfig(renormalise_experts=False),
        "model.renormalise_experts=False has no effect without model.num_experts",
    ),
    (
        lambda: ModelConfig(num_experts=4, experts_per_token=2, mlp_bias=True),
        "model.mlp_bias=True with model.num_experts=4: experts have no biases",
    ),
    (
        lambda: ModelConfig(num_experts=4, experts_per_token=2, gated=False),
        "model.gated=False with model.num_experts=4: every expert is gated",
    ),
    (
        lambda: Config(
            model=ModelConfig(num_experts=4, experts_per_token=2), heads=HeadsConfig(kind="masks", lora_rank=2)
        ),
        "heads.lora_rank=2 with model.num_experts=4: LoRA on experts is not implemented; use lora_rank=0",
    ),
    (
        lambda: Config(heads=HeadsConfig(kind="masks", lora_rank=2), model=ModelConfig(gated=False)),
        "heads.lora_rank=2 with model.gated=False: LoRA on ungated layers is not implemented; use lora_rank=0",
    ),
    (lambda: ModelConfig(qk_norm_joint=True), "model.qk_norm_joint=True has no effect without model.qk_norm"),
    (lambda: ModelConfig(rope_scaling="linear"), "model.rope_scaling='linear' needs model.rope_factor"),
    (lambda: ModelConfig(rope_scaling="yarn", rope_factor=2.0), "model.rope_scaling='yarn' needs model.rope_original"),
    (lambda: ModelConfig(rope_low=5.0), "model.rope_low=5.0 must be above 0 and below model.rope_high=4.0"),
    (lambda: ModelConfig(rope_beta_slow=0.0), "model.rope_beta_slow=0.0 must be above 0 and below model.rope_beta"),
    (lambda: ModelConfig(rope_theta=0.0), "model.rope_theta=0.0; it must be above 0"),
    (lambda: ModelConfig(norm_eps=-1e-6), "model.norm_eps=-1e-06 is negative"),
    (lambda: ModelConfig(vocab_size=2**24 + 1), "model.vocab_size=16777217 is above 16777216"),
    (lambda: ModelConfig(rope_theta=math.inf), "model.rope_theta is inf; a number is needed"),
    (lambda: LossConfig(head_weights=(1.0, math.nan)), "loss.head_weights is nan; a number is needed"),
    (lambda: LossConfig(head_weights=(0.0, 0.0)), "loss.head_weights=(0.0, 0.0) switches every head off"),
    (lambda: LossConfig(z_loss=-0.5), "loss.z_loss=-0.5 is negative"),
    *[
        (functools.partial(LossConfig, **{name: -0.5}), f"loss.{name}=-0.5 is negative; 0 switches it off")
        for name in ("extra_weight", "decay", "token_order", "schedule_final")
    ],
    (lambda: LossConfig(heads_per_step=-1), "loss.heads_per_step=-1 is negative; 0 switches it off"),
    *[
        (functools.partial(LossConfig, **{name: 1.5}), f"loss.{name}=1.5; it must be in [0, 1]")
        for name in ("label_smoothing", "distil_mix", "schedule_at", "entropy_fraction")
    ],
    (lambda: LossConfig(entropy_temperature=0.0), "loss.entropy_temperature=0.0; it must be at least 1e-6"),
    (
        lambda: LossConfig(entropy="keep_top", entropy_fraction=0.0),
        "loss.entropy_fraction=0.0 with loss.entropy='keep_top' leaves nothing to learn",
    ),
    (
        lambda: LossConfig(entropy="random", entropy_fraction=0.0),
        "loss.entropy_fraction=0.0 with loss.entropy='random' leaves nothing to learn",
    ),
    (
        lambda: LossConfig(entropy="random", entropy_source="own"),
        "loss.entropy_source='own' has no effect without loss.entropy='keep_top', 'drop_top' or 'soft'",
    ),
    (
        lambda: LossConfig(entropy="soft", entropy_selection="threshold"),
        "loss.entropy_selection='threshold' has no effect without loss.entropy='keep_top' or 'drop_top'",
    ),
    (lambda: LossConfig(entropy_scope="batch"), "loss.entropy_scope='batch' has no effect without loss.entropy"),
    *[
        (functools.partial(LossConfig, **{name: value}), f"loss.{name}={value!r} has no effect without loss.")
        for name, value in (
            ("distil_mix", 0.5),
            ("schedule_final", 0.5),
            ("schedule_at", 0.2),
            ("order_window", 4),
            ("entropy_fraction", 0.5),
            ("entropy_temperature", 2.0),
            ("entropy_source", "own"),
            ("entropy_normaliser", "all"),
        )
    ],
    (
        lambda: LossConfig(impl="remat", gather="chunk"),
        "loss.gather='chunk' has no effect without loss.impl='fused'",
    ),
    (lambda: HeadsConfig(init_block=-2), "heads.init_block=-2 has no effect without heads.init='copy_block'"),
    (lambda: HeadsConfig(lora_alpha=8.0), "heads.lora_alpha=8.0 has no effect without heads.lora_rank"),
    (
        lambda: HeadsConfig(kind="sequential", norm="none", chain="post_norm"),
        "heads.chain='post_norm' has no effect without a norm",
    ),
    (
        lambda: HeadsConfig(kind="linear", norm_plus_one=True),
        "heads.norm_plus_one=True has no effect without heads.norm='own'",
    ),
    (lambda: TrainConfig(init_heads="same"), "train.init_heads='same' has no effect without train.init_from"),
    (
        lambda: Config(heads=HeadsConfig(kind="registers"), train=TrainConfig(trainable="heads")),
        "train.trainable='heads' with heads.kind='registers': these heads help only while",
    ),
    (
        lambda: Config(loss=LossConfig(extra_weight=0.0), train=TrainConfig(trainable="heads")),
        "loss.head_weights=(), loss.extra_weight=0.0 and loss.decay=1.0 switch every extra head off",
    ),
    (
        lambda: Config(loss=LossConfig(head_weights=(0.0, 1.0, 1.0, 1.0), decay=0.0)),
        "loss.extra_weight=1.0 and loss.decay=0.0 switch every head off",
    ),
    (lambda: Config(loss=LossConfig(heads_per_step=4)), "loss.heads_per_step=4, but heads.num_future=4 has 3 extra"),
    (
        lambda: Config(heads=HeadsConfig(kind="registers"), decode=DecodeConfig(num_draft=2)),
        "decode.num_draft=2, but heads.kind='registers' cannot draft",
    ),
    (lambda: LossConfig(teacherless=-2), "loss.teacherless=-2; give a token id, or -1 to switch it off"),
    (lambda: HeadsConfig(lora_rank=-1), "heads.lora_rank=-1 is negative"),
    (lambda: HeadsConfig(draft_vocab=-1), "heads.draft_vocab=-1 is negative"),
    (lambda: HeadsConfig(lora_alpha=0.0), "heads.lora_alpha=0.0; it must be above 0"),
    (
        lambda: HeadsConfig(kind="linear", layers=2),
        "heads.layers=2 has no effect with heads.kind='linear'; it is",
    ),
    (lambda: HeadsConfig(residual=True), "heads.residual=True has no effect with heads.kind='parallel'"),
    (
        lambda: HeadsConfig(concat="hidden_first"),
        "heads.concat='hidden_first' has no effect with heads.kind=",
    ),
    (lambda: HeadsConfig(kind="medusa", chain="post_norm"), "heads.chain='post_norm' has no effect with"),
    (lambda: HeadsConfig(attention=False), "heads.attention=False has no effect with heads.kind='parallel'"),
    (
        lambda: HeadsConfig(kind="recursive", attention=False, init="copy_block"),
        "heads.init='copy_block' with heads.attention=False; a copied block has attention, so use init='random'",
    ),
    (
        lambda: HeadsConfig(kind="recursive", attention=False, input_norm=False),
        "heads.input_norm=False has no effect without heads.attention",
    ),
    (lambda: HeadsConfig(mask_stride=2), "heads.mask_stride=2 has no effect with heads.kind='parallel'"),
    (lambda: HeadsConfig(lora_rank=4), "heads.lora_rank=4 has no effect with heads.kind='parallel'"),
    (lambda: HeadsConfig(kind="masks", tap=0), "heads.tap=0 has no effect with heads.kind='masks'"),
    (lambda: HeadsConfig(kind="medusa", init="copy_block"), "heads.init='copy_block', but medusa heads have no block"),
    (lambda: HeadsConfig(kind="linear", init="zero"), "heads.init='zero' with heads.kind='linear' needs"),
    (lambda: HeadsConfig(tap_mix=True, tap_norm=True), "heads.tap_norm=True with heads.tap_mix=True"),
    (
        lambda: Config(heads=HeadsConfig(init="copy_block", init_block=4)),
        "heads.init_block=4 is out of range for model.num_layers",
    ),
    (
        lambda: Config(heads=HeadsConfig(num_future=1), train=TrainConfig(trainable="heads")),
        "train.trainable='heads', but heads.num_future=1 has no extra head",
    ),
    (
        lambda: Config(loss=LossConfig(token_order=0.5), train=TrainConfig(trainable="heads")),
        "loss.token_order=0.5 trains the trunk, but train.trainable='heads'",
    ),
    (
        lambda: Config(loss=LossConfig(teacherless=2048)),
        "loss.teacherless=2048 must be a token id below",
    ),
    (lambda: Config(loss=LossConfig(teacherless=3)), "loss.teacherless=3 replaces the tokens after the prompt; set"),
    (lambda: DataConfig(prompt_tokens=-1), "data.prompt_tokens=-1 is negative"),
    (lambda: Config(data=DataConfig(prompt_tokens=256)), "data.prompt_tokens=256 leaves nothing to learn in rows of"),
    (
        lambda: Config(heads=HeadsConfig(kind="masks", mask_stride=300)),
        "heads.mask_stride=300 is above data.seq_len=256",
    ),
    (lambda: LossConfig(head_weights=(1.0, -2.0)), "loss.head_weights=(1.0, -2.0) has a negative weight"),
    (lambda: DataConfig(seq_len=1), "data.seq_len=1; a row needs at least 2 tokens"),
    (lambda: DataConfig(eval_fraction=0.0), "data.eval_fraction=0.0; it must be between 0 and 1"),
    (lambda: DataConfig(eval_fraction=1.0), "data.eval_fraction=1.0; it must be between 0 and 1"),
    (lambda: OptimConfig(learning_rate=0.0), "optim.learning_rate=0.0; it must be above 0"),
    (
        lambda: OptimConfig(muon_learning_rate=0.1),
        "optim.muon_learning_rate=0.1 has no effect without optim.name='muon'",
    ),
    (
        lambda: OptimConfig(name="adafactor", b1=0.8),
        "optim.b1=0.8 has no effect without optim.name='adamw' or 'muon' or",
    ),
    (
        lambda: OptimConfig(name="adafactor", b2=0.8),
        "optim.b2=0.8 has no effect without optim.name='adamw' or 'muon' or",
    ),
    (
        lambda: OptimConfig(name="lion", eps=1e-6),
        "optim.eps=1e-06 has no effect without optim.name='adamw' or 'muon' or",
    ),
    (
        lambda: OptimConfig(name="schedule_free"),
        "optim.schedule='cosine' with optim.name='schedule_free', which averages",
    ),
    (
        lambda: OptimConfig(name="schedule_free", schedule="constant", b1=0.0),
        "optim.b1=0.0 with optim.name='schedule_free'; it must be above 0",
    ),
    (
        lambda: Config(
            optim=OptimConfig(name="schedule_free", schedule="constant"), model=ModelConfig(param_dtype="bfloat16")
        ),
        "optim.name='schedule_free' with model.param_dtype='bfloat16'",
    ),
    (lambda: OptimConfig(muon_learning_rate=-1.0), "optim.muon_learning_rate=-1.0; it must be above 0"),
    (lambda: OptimConfig(eps=0.0), "optim.eps=0.0; it must be above 0"),
    (lambda: OptimConfig(warmup_steps=-1), "optim.warmup_steps=-1 is negative"),
    (lambda: OptimConfig(weight_decay=-0.1), "optim.weight_decay=-0.1 is negative"),
    (lambda: OptimConfig(clip_norm=-1.0), "optim.clip_norm=-1.0 is negative"),
    (lambda: OptimConfig(b1=1.5), "optim.b1=1.5; it must be in [0, 1]"),
    (lambda: OptimConfig(b2=-0.5), "optim.b2=-0.5; it must be in [0, 1]"),
    (lambda: OptimConfig(final_fraction=2.0), "optim.final_fraction=2.0; it must be in [0, 1]"),
    (lambda: OptimConfig(decay_start=2.0), "optim.decay_start=2.0; it must be in [0, 1]"),
    (lambda: Config(mesh=MeshConfig(context=3)), "data.seq_len=256 does not divide over mesh.context=3 devices"),
    (lambda: LossConfig(chunk_bytes=-1), "loss.chunk_bytes=-1 is negative"),
    (lambda: MeshConfig(context=0), "mesh.context=0; use a size of at least 1, or -1"),
    (lambda: MeshConfig(data=0), "mesh.data=0; use a size of at least 1, or -1"),
    (lambda: MeshConfig(fsdp=0), "mesh.fsdp=0; use a size of at least 1, or -1"),
    (lambda: MeshConfig(tensor=-2), "mesh.tensor=-2; use a size of at least 1, or -1"),
    (lambda: MeshConfig(data=-1, fsdp=-1), "mesh has more than one -1 ({'data': -1, 'fsdp': -1,"),
    (lambda: TrainConfig(seed=-1), "train.seed=-1; use a seed from 0 to 4294967295"),
    (lambda: TrainConfig(seed=2**32), "train.seed=4294967296; use a seed from 0 to 4294967295"),
    (lambda: TrainConfig(eval_every=-1), "train.eval_every=-1 is negative"),
    (lambda: TrainConfig(eval_rows=-1), "train.eval_rows=-1 is negative"),
    (lambda: TrainConfig(patience=-1), "train.patience=-1 is negative"),
    (lambda: TrainConfig(patience=2), "train.patience=2 has no effect without train.eval_every"),
    (
        lambda: TrainConfig(stop_on="next_token", eval_every=5),
        "train.stop_on='next_token' has no effect without train.patience",
    ),
    (lambda: TrainConfig(heads_first=-1), "train.heads_first=-1 is negative"),
    (lambda: TrainConfig(heads_first=5, steps=5), "train.heads_first=5 must be below train.steps=5"),
    (
        lambda: TrainConfig(heads_first=5, trainable="heads"),
        "train.heads_first=5 has no effect with train.trainable='heads', which trains only heads",
    ),
    (
        lambda: Config(train=TrainConfig(heads_first=5), heads=HeadsConfig(num_future=1)),
        "train.heads_first=5 with heads.kind='parallel' and heads.num_future=1: there is no head that can learn alone",
    ),
    (
        lambda: Config(train=TrainConfig(heads_first=5), optim=OptimConfig(name="schedule_free", schedule="constant")),
        "train.heads_first=5 with optim.name='schedule_free', which averages all steps",
    ),
    (
        lambda: Config(train=TrainConfig(heads_first=5), loss=LossConfig(token_order=0.5)),
        "loss.token_order=0.5 trains the trunk, but in the first train.heads_first=5 steps only heads learn",
    ),
    (
        lambda: TrainConfig(batch_size=9, grad_accum=2),
        "train.batch_size=9 is not a multiple of train.grad_accum=2",
    ),
    (lambda: DecodeConfig(max_new_tokens=1), "decode.max_new_tokens=1; an evaluation needs 2 or more"),
    (lambda: DecodeConfig(num_draft=-2), "decode.num_draft=-2; use -1 for all heads"),
    (
        lambda: Config(heads=HeadsConfig(num_future=8), data=DataConfig(seq_len=8)),
        "heads.num_future=8 must be below data.seq_len=8",
    ),
    (lambda: Config(data=DataConfig(seq_len=4096)), "data.seq_len=4096 is above model.max_seq_len=2048"),
    (
        lambda: Config(decode=DecodeConfig(prompt_tokens=2000, max_new_tokens=49)),
        "decode.prompt_tokens + decode.max_new_tokens = 2049 is above model.max_seq_len=2048",
    ),
    (lambda: Config(heads=HeadsConfig(tap=5)), "heads.tap=5 is out of range for model.num_layers=4"),
    (lambda: Config(heads=HeadsConfig(tap=-5)), "heads.tap=-5 is out of range for model.num_layers=4"),
    (
        lambda: Config(loss=LossConfig(head_weights=(1.0, 1.0))),
        "loss.head_weights has 2 values for heads.num_future=4 heads",
    ),
    (
        lambda: Config(decode=DecodeConfig(num_draft=4)),
        "decode.num_draft=4, but heads.num_future=4 heads draft at most 3 tokens",
    ),
    (
        lambda: Config(mesh=MeshConfig(data=2, fsdp=4), train=TrainConfig(batch_size=24, grad_accum=2)),
        "a micro-batch of 12 rows (train.batch_size / train.grad_accum) does not divide over mesh.data * mesh.fsdp = 8",
    ),
    (
        lambda: Config(mesh=MeshConfig(tensor=4), model=ModelConfig(vocab_size=2049)),
        "model.vocab_size=2049 does not divide over mesh.tensor=4 devices",
    ),
    (
        lambda: Config(mesh=MeshConfig(tensor=4), model=ModelConfig(num_heads=6, num_kv_heads=6)),
        "model.num_heads=6 does not divide over mesh.tensor=4 devices",
    ),
    (
        lambda: Config(mesh=MeshConfig(tensor=4), model=ModelConfig(num_kv_heads=2)),
        "model.num_kv_heads=2 does not divide over mesh.tensor=4 devices",
    ),
    (
        lambda: Config(mesh=MeshConfig(tensor=4), model=ModelConfig(d_ff=702)),
        "model.d_ff=702 does not divide over mesh.tensor=4 devices",
    ),
    (
        lambda: Config(mesh=MeshConfig(fsdp=4), model=ModelConfig(d_model=258)),
        "model.d_model=258 does not divide over mesh.fsdp * mesh.context = 4",
    ),
    (lambda: LoraConfig(rank=-1), "lora.rank=-1 is negative; 0 switches adapters off"),
    (lambda: LoraConfig(rank=2, alpha=0.0), "lora.alpha=0.0; it must be above 0"),
    (lambda: LoraConfig(rank=2, dropout=1.0), "lora.dropout=1.0; it must be at least 0 and below 1"),
    (lambda: LoraConfig(rank=2, targets=()), "lora.targets=() names no matrix"),
    (lambda: LoraConfig(rank=2, targets="("), "lora.targets='(' is not a regular expression"),
    (lambda: LoraConfig(alpha=8.0), "lora.alpha=8.0 has no effect without lora.rank"),
    (lambda: LoraConfig(dropout=0.1), "lora.dropout=0.1 has no effect without lora.rank"),
    (lambda: LoraConfig(targets="attn"), "lora.targets='attn' has no effect without lora.rank"),
    (lambda: Config(train=TrainConfig(trainable="lora")), "train.trainable='lora', but lora.rank=0 has no adapters"),
    (lambda: Config(train=TrainConfig(trainable=("heads", "lora=2"))), "but lora.rank=0 has no adapters"),
    (lambda: Config(lora=LoraConfig(rank=2)), "train.trainable='all' trains blocks/attn/q itself, and lora.rank=2"),
    (
        lambda: Config(lora=LoraConfig(rank=2), train=TrainConfig(trainable="^embed/")),
        "train.trainable='^embed/' does not train lora/blocks/attn/q/b",
    ),
    (
        lambda: Config(lora=LoraConfig(rank=2, targets=("attn/q", "atn")), train=TrainConfig(trainable="lora")),
        "lora.targets='atn' matches no matrix; paths are blocks/attn/q, blocks/attn/k",
    ),
    (
        lambda: Config(
            lora=LoraConfig(rank=2),
            train=TrainConfig(trainable="lora"),
            model=ModelConfig(num_experts=4, experts_per_token=2),
        ),
        "lora.targets='^blocks/' with model.num_experts=4: adapters of experts are not implemented",
    ),
    (
        lambda: Config(
            lora=LoraConfig(rank=2),
            train=TrainConfig(trainable="lora"),
            heads=HeadsConfig(kind="masks", lora_rank=2),
        ),
        "lora.rank=2 with heads.lora_rank=2",
    ),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message.split(";")[0] for _, message in REFUSED])
def test_refused_with_the_numbers(build, message):
    """A value that cannot work raises, on one line, with the field and the numbers. Breaks without its `_require`."""
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


POSITIVE = [
    ("model", ModelConfig, "vocab_size num_layers d_model num_heads num_kv_heads head_dim d_ff max_seq_len"),
    ("heads", HeadsConfig, "num_future layers"),
    ("loss", LossConfig, "order_window"),
    ("train", TrainConfig, "steps batch_size grad_accum log_every checkpoint_every keep_checkpoints"),
    ("decode", DecodeConfig, "num_prompts prompt_tokens"),
    ("rl", RL, "prompts max_new_tokens updates eval_prompts eval_samples"),
]


@pytest.mark.parametrize(
    ("section", "cls", "name"), [(section, cls, name) for section, cls, names in POSITIVE for name in names.split()]
)
def test_sizes_are_at_least_one(section, cls, name):
    """0 is refused and 1 or 2 is not, for every size. Breaks without the field's name in `_positive`."""
    with pytest.raises(UserError, match=f"^{section}.{name} is 0; it must be at least 1$"):
        cls(**{name: 0})
    others = {"num_heads": {"num_kv_heads": 1}, "order_window": {"token_order": 0.5}}.get(name, {})
    assert getattr(cls(**{name: 2}, **others), name) == 2


def test_every_number_has_a_check_or_needs_none():
    """Every int and float of the schema is refused somewhere above, or stands in this list of what takes any value.

    Breaks when a field is added without validation.
    """
    checked = {re.match(r"[\w.]*", message)[0] for _, message in REFUSED}
    checked |= {f"{section}.{name}" for section, _, names in POSITIVE for name in names.split()}
    types = {section: typing.get_type_hints(cls) for section, cls in typing.get_type_hints(Config).items()}
    numbers = {f"{s}.{name}" for s, hints in types.items() for name, kind in hints.items() if kind in (int, float)}
    assert numbers - checked == {"data.seed"}


def test_derived_values():
    """tap counts from the bottom, head_weights has length M, num_draft has a value. Breaks if -1 passes through."""
    config = Config(model=ModelConfig(num_layers=6), heads=HeadsConfig(num_future=3, tap=-2))
    assert (config.arch.tap, config.head_weights, config.num_draft) == (4, (1.0, 1.0, 1.0), 2)
    config = Config(
        heads=HeadsConfig(tap=0), loss=LossConfig(head_weights=(1.0, 0.5, 0.25, 0.0)), decode=DecodeConfig(num_draft=0)
    )
    assert (config.arch.tap, config.head_weights, config.num_draft) == (0, (1.0, 0.5, 0.25, 0.0), 0)
    assert Arch(heads=HeadsConfig(tap=4)).tap == 4


def test_configs_are_values():
    """Configs cannot be changed and are equal by value: a jitted function may take one as a static argument."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.d_model = 3
    assert {Config(): 1}[from_json(json.dumps({section: {} for section in SECTIONS}))] == 1


@pytest.mark.parametrize("layers", [1, 3])
def test_every_layer_may_be_the_tap(layers):
    """tap = -L..L gives 0..L blocks below it; the default tap fits a model of any depth.

    Breaks with `<` for `<=` in the check of `heads.tap`.
    """
    model = ModelConfig(num_layers=layers)
    below = [Arch(model, HeadsConfig(tap=tap)).tap for tap in range(-layers, layers + 1)]
    assert below == [*range(layers), *range(layers + 1)]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: ModelConfig(remat="blocks"),
            "model.remat is 'blocks'; choose one of 'none', 'dots', 'block', 'offload'",
        ),
        (lambda: ModelConfig(dtype="float16"), "model.dtype is 'float16'; choose one of 'float32', 'bfloat16'"),
        (lambda: HeadsConfig(kind="medus"), "heads.kind is 'medus'; choose one of"),
        (lambda: LossConfig(impl="naive"), "loss.impl is 'naive'; choose one of 'fused', 'remat'"),
        (lambda: OptimConfig(schedule="cosin"), "optim.schedule is 'cosin'; choose one of"),
        (lambda: ModelConfig(d_model=64.0), "model.d_model is 64.0"),
        (lambda: LossConfig(head_weights=[1.0]), "loss.head_weights is [1.0]"),
    ],
)
def test_types_are_checked_in_python_too(build, message):
    """A misspelt choice in a config file is refused where it stands, as in JSON. Breaks without the check of types."""
    with pytest.raises(UserError) as caught:
        build()
    assert message in str(caught.value)
