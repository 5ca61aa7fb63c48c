"""What a request may be: bad input is one clear UserError, odd but legal input gives what the plain form gives."""

import dataclasses
import inspect
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import (
    CONFIG,
    NEW,
    PROMPTS,
    chain_model,
    compilations,
    loaded,
    loud_params,
    model,
    plain,
    slow_greedy,
)
from reference.tiers import sampled
from reference.tiny import tiny_config

from mtp_jax.decode import memory
from mtp_jax.decode.drafters import NONE, Drafter, Drafts, make_drafter
from mtp_jax.decode.generate import generate, stream
from mtp_jax.decode.memory import cache_bytes
from mtp_jax.decode.options import Options
from mtp_jax.decode.state import Plan
from mtp_jax.decode.verify import Rule
from mtp_jax.errors import UserError

PLAIN_LM = tiny_config(heads={"num_future": 1})

BAD = {
    "no prompts": ([], {}, "no prompt was given"),
    "empty text": (["a", ""], {}, "prompt 1 is empty; give at least one token"),
    "empty ids": ([[]], {}, "prompt 0 is empty"),
    "negative id": ([[1], [3, -1]], {}, r"prompt 1 holds token id -1; the vocabulary is 0\.\.257"),
    "id beyond the vocabulary": ([[258]], {}, r"prompt 0 holds token id 258; the vocabulary is 0\.\.257"),
    "prompt as long as the model": ([[1] * 80], {}, "prompt 0 has 80 tokens; the limit, .* model.max_seq_len=80"),
    "text as long as the model": (["a" * 79], {}, "prompt 0 has 80 tokens"),
    "no new tokens": ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0; it must be a whole number, at least 1"),
    "negative new tokens": ([[1]], {"max_new_tokens": -3}, "max_new_tokens=-3; it must be a whole number, at least 1"),
    "too many drafts": ([[1]], {"num_draft": 4}, r"num_draft=4, but this model has 3 extra heads; use 0\.\.3"),
    "negative drafts": ([[1]], {"num_draft": -1}, r"num_draft=-1, but .* use 0\.\.3, or draft='none'"),
    "drafts of nobody": ([[1]], {"draft": "none", "num_draft": 2}, "num_draft=2 with draft='none'"),
    "unknown drafter": (
        [[1]],
        {"draft": "lookup2"},
        "draft='lookup2' is not a drafter; choose 'heads', ",
    ),
    "lookup without end": (
        [[1]],
        {"draft": "lookup", "num_draft": 65},
        r"num_draft=65 .*; use 0\.\.64",
    ),
    "negative temperature": (
        [[1]],
        {"temperature": -0.5},
        "temperature=-0.5; it must be 0 for greedy, or",
    ),
    "hot temperature alone": ([[1]], {"temperature": 1.0, "hot_temperature": 2.0}, "needs hot_entropy, too"),
    "hot entropy alone": (
        [[1]],
        {"temperature": 1.0, "hot_entropy": 2.0},
        "hot_entropy=2.0 needs hot_temperature, too",
    ),
    "hot temperature of 0": (
        [[1]],
        {"temperature": 1.0, "hot_temperature": 0.0, "hot_entropy": 1.0},
        "hot_temperature=0.0; it must be from 1e-6 to 1e6",
    ),
    "negative entropy": (
        [[1]],
        {"temperature": 1.0, "hot_temperature": 1.0, "hot_entropy": -1.0},
        "hot_entropy=-1.0; it must be 0 or above, in nats",
    ),
    "hot and tempered": (
        [[1]],
        {"temperature": 1.0, "hot_temperature": 2.0, "hot_entropy": 1.0, "logprobs": 0, "logprobs_tempered": True},
        "records are at one temperature; leave one of them out",
    ),
    "hot but greedy": ([[1]], {"hot_temperature": 2.0, "hot_entropy": 1.0}, "at temperature 0, which draws nothing"),
    "temperature nan": ([[1]], {"temperature": float("nan")}, "temperature=nan; it must be"),
    "temperature inf": ([[1]], {"temperature": float("inf")}, "temperature=inf; it must be"),
    "temperature as text": ([[1]], {"temperature": "1"}, "temperature='1'; it must be"),
    "top-k of 0": ([[1]], {"top_k": 0}, "top_k=0; it must be a whole number, 1 or above"),
    "fractional top-k": ([[1]], {"top_k": 2.5}, "top_k=2.5; it must be a whole number"),
    "top-p of 0": ([[1]], {"top_p": 0}, "top_p=0; it must be above 0, at most 1"),
    "top-p above 1": ([[1]], {"top_p": 1.01}, "top_p=1.01; it must be above 0, at most 1"),
    "min-p above 1": ([[1]], {"min_p": 1.5}, "min_p=1.5; it must be from 0 to 1"),
    "negative min-p": ([[1]], {"min_p": -0.1}, "min_p=-0.1; it must be from 0 to 1"),
    "penalty of 0": ([[1]], {"repetition_penalty": 0}, "repetition_penalty=0; it must be from 1e-6 to 1e6; 1 for none"),
    "negative seed": ([[1]], {"seed": -1}, r"seed=-1; it must be a whole number, from 0 to 2\*\*64 - 1"),
    "fractional seed": ([[1]], {"seed": 0.5}, "seed=0.5; it must be a whole number"),
    "no seed": ([[1]], {"seed": None}, "seed=None; it must be a whole number"),
    "seeds for other prompts": (
        [[1], [2]],
        {"seed": [1, 2, 3]},
        "seed has 3 numbers for 2 rows; give one",
    ),
    "bias beyond the vocabulary": (
        [[1]],
        {"logit_bias": {258: 1.0}},
        "logit_bias: token=258; .* from 0 to 257",
    ),
    "bias that is no number": ([[1]], {"logit_bias": {5: float("nan")}}, r"logit_bias\[5\]=nan"),
    "bias as a list": ([[1]], {"logit_bias": [1.0]}, r"logit_bias=\[1.0\]; it must map token ids to numbers"),
    "bias against everything": (
        [[1]],
        {"logit_bias": dict.fromkeys(range(258), -float("inf"))},
        "logit_bias forbids all 258 tokens; leave at least one",
    ),
    "logits function that is none": ([[1]], {"logits_fn": 3}, "logits_fn=3; it must be a function"),
    "unknown rule": ([[1]], {"accept": "lossy"}, "accept='lossy'; choose one of 'exact', 'rejection', 'typical'"),
    "unknown number of drafts": ([[1]], {"num_draft": "all"}, "num_draft='all'; it must be a whole number, or 'auto'"),
    "empty stop": ([[1]], {"stop": ("x", "")}, "it must be a list of strings that are not empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """generate and stream name the thing, its value and the remedy, before they compute anything."""
    prompts, options, message = BAD[name]
    options = {"max_new_tokens": 8, **options}
    with pytest.raises(UserError, match=message):
        generate(chain_model(), prompts, **options)
    with pytest.raises(UserError, match=message):
        stream(chain_model(), prompts, **options)  # at the call, not at the first item


def test_options_as_an_object_or_as_keywords():
    """options=o, seed=4 is every field of o as a keyword and seed=4. Breaks when keywords do not come last."""
    lm = model("random")
    options = Options(temperature=0.8, top_k=7, seed=3)
    given = generate(lm, PROMPTS[:1], max_new_tokens=6, options=options, seed=4)
    assert given.tokens == generate(lm, PROMPTS[:1], max_new_tokens=6, temperature=0.8, top_k=7, seed=4).tokens
    with pytest.raises(TypeError, match="unknown option 'temprature'; did you mean 'temperature'"):
        generate(lm, PROMPTS[:1], max_new_tokens=6, temprature=0.8)
    shown = inspect.signature(generate).parameters
    assert {field.name for field in dataclasses.fields(Options)} < set(shown)


def test_bad_input_compiles_nothing():
    """Every refusal comes before the first program. Breaks when a check moves behind the prefill."""
    fresh = loaded(CONFIG, loud_params(CONFIG, seed=6))
    with compilations() as compiled:
        for options in ({"temperature": -1.0}, {"top_p": 0.0}, {"logit_bias": dict.fromkeys(range(40), -np.inf)}):
            with pytest.raises(UserError):
                generate(fresh, [[1]], **{"max_new_tokens": 4, **options})
        with pytest.raises(UserError):
            generate(fresh, [[40]], max_new_tokens=4)
    assert compiled == []


def test_a_cache_that_does_not_fit(monkeypatch):
    """The message holds the bytes needed and free, and what would fit; nothing is compiled."""
    lm = model("random")
    needed = cache_bytes(Plan(CONFIG.arch, make_drafter("heads", CONFIG.arch)), 4, 40)
    state_bytes = 2 * 4 * 4 * 40 * (2 + 3) * CONFIG.model.num_kv_heads * CONFIG.model.head_dim
    assert state_bytes <= needed <= 1.2 * state_bytes  # keys and values in float32, and little else
    half = -(-needed // 2)
    with monkeypatch.context() as patched, compilations() as compiled:
        patched.setattr(memory, "free_bytes", lambda: half)
        with pytest.raises(UserError) as error:
            generate(lm, PROMPTS, max_new_tokens=NEW)
        patched.setattr(memory, "free_bytes", lambda: needed // 8)
        with pytest.raises(UserError, match="no row of 40 slots would fit"):
            generate(lm, PROMPTS, max_new_tokens=NEW)
    assert compiled == []
    said = str(error.value)
    assert f"a cache of 4 rows with 40 slots each needs {needed:,} bytes, and {half:,} are free" in str(error.value)
    assert "2 rows of 40 slots would fit, or 4 rows of 20: use fewer prompts" in said
    monkeypatch.setattr(memory, "free_bytes", lambda: needed)
    assert generate(lm, PROMPTS, max_new_tokens=NEW).tokens


@pytest.mark.parametrize("temperature", sampled([0.0, 1.0], 0.0))
def test_logits_without_a_token(temperature):
    """NaN parameters, and a function that forbids everything at some length, end in an error that names the row."""
    params = jax.tree.map(lambda leaf: leaf, model("random").params)
    params["final_norm"] = {"scale": params["final_norm"]["scale"].at[3].set(jnp.nan)}
    with pytest.raises(UserError, match=r"prompt 0: no token can be chosen .* logits hold NaN or forbid every token"):
        generate(loaded(CONFIG, params), PROMPTS, max_new_tokens=NEW, temperature=temperature)
    with pytest.raises(UserError, match=r"prompt 2: no token can be chosen within (19|20) tokens"):
        generate(model("random"), PROMPTS, max_new_tokens=4, logits_fn=forbid_at_18, temperature=temperature)


def forbid_at_18(logits_V, tokens_S, length):
    return jnp.where(length == 18, -jnp.inf, logits_V)


@pytest.mark.grid
def test_ten_thousand_stop_strings():
    """They are looked for in no time, and the first of them ends the text."""
    stop = [f"<{i}>" for i in range(10_000)] + ["de"]
    began = time.perf_counter()
    result = generate(chain_model(), ["ab"], max_new_tokens=40, stop=stop)
    assert (result.text, result.finish_reason) == (["é漢字😀c"], ["stop"])
    assert time.perf_counter() - began < 60


def test_bad_input_of_models_that_lack_a_part():
    """No tokenizer: no text, no stop strings. No extra heads: no heads that draft, and the message says what to do."""
    with pytest.raises(UserError, match="prompt 1 is text, but this model has no tokenizer; give a list of token ids"):
        generate(model("random"), [[1], "a"], max_new_tokens=8)
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        generate(model("random"), [[1]], max_new_tokens=8, stop=("x",))
    for num_draft in (None, 1):
        with pytest.raises(UserError, match=r"no extra heads \(heads.num_future=1\); use draft='lookup' or 'none'"):
            make_drafter("heads", PLAIN_LM.arch, num_draft)


def test_drafters_by_name():
    """none drafts nothing, with num_draft=0 as well; heads draft with every head unless told otherwise."""
    assert make_drafter("none", CONFIG.arch) is make_drafter("none", PLAIN_LM.arch, 0) is NONE
    assert [make_drafter("heads", CONFIG.arch, n).num_draft for n in (None, 1, 2, 3)] == [3, 1, 2, 3]


ODD = {
    "tuples": lambda prompts: tuple(tuple(p) for p in prompts),
    "numpy arrays": lambda prompts: [np.array(p) for p in prompts],
    "small numpy integers": lambda prompts: [np.array(p, np.uint8) for p in prompts],
    "jax arrays": lambda prompts: [jnp.array(p) for p in prompts],
    "numpy scalars in lists": lambda prompts: [[np.int64(t) for t in p] for p in prompts],
    "ranges and tuples": lambda prompts: [prompts[0], prompts[1], range(16), prompts[3]],
}


@pytest.mark.parametrize("name", ODD)
def test_ids_in_any_container(name):
    """generate(any sequence of ids) = generate(lists), and the answer holds Python integers."""
    result = generate(model("random"), ODD[name](PROMPTS), max_new_tokens=NEW)
    assert result.tokens == [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    assert {type(token) for row in result.tokens for token in row} == {int}
    assert result.text is None


def test_prompts_as_one_array():
    """A [B, T] array is B prompts."""
    prompts = np.array([[5], [9], [5], [5]])
    result = generate(model("random"), prompts, max_new_tokens=NEW)
    assert result.tokens == [plain("random", (p,))[:NEW] for p in (5, 9, 5, 5)]


def test_prompts_are_not_changed():
    """A request leaves its prompts alone."""
    prompts = [[7, 3, 11], [5], list(range(16)), [1, 2]]
    generate(model("random"), prompts, max_new_tokens=NEW)
    assert prompts == [[7, 3, 11], [5], list(range(16)), [1, 2]]


@pytest.mark.grid
@pytest.mark.parametrize("vocab", [1, 2, 3])
def test_the_smallest_vocabularies(vocab):
    """heads = reference with one, two or three tokens, where drafts are mostly right."""
    shape = {"vocab_size": vocab, "num_layers": 1, "d_model": 8, "num_heads": 1, "num_kv_heads": 1, "d_ff": 8}
    config = tiny_config(model=shape, heads={"num_future": 2, "tap": 0})
    lm = loaded(config, loud_params(config, seed=1))
    prompt = [0, vocab - 1, 0]
    result = generate(lm, [prompt], max_new_tokens=9)
    assert result.tokens == [slow_greedy(config, lm.params, prompt, 9, width=16)]
    assert sum(result.stats.histogram) == result.stats.rounds


@pytest.mark.grid
def test_a_batch_of_seventeen():
    """Rows beyond any power of two, lengths 1..17, the longest one beyond the smallest bucket."""
    prompts = [tuple((3 * i + j) % 40 for j in range(i + 1)) for i in range(17)]
    result = generate(model("random"), prompts, max_new_tokens=4, draft="none")
    assert result.tokens == [plain("random", prompt, 4) for prompt in prompts]


def test_a_drafter_of_your_own():
    """A `Drafter` is used as it is: its init gets (arch, P, batch, slots) and its draft the tokens so far."""
    seen = {}

    def init(arch, num_draft, batch, slots):
        seen["init"] = (arch, num_draft, batch, slots)
        return ()

    def repeat_last(arch, params, cache, context):
        seen["shapes"] = (context.tokens_BS.shape, context.tap_BQD.shape[0])
        last_B1 = jnp.take_along_axis(context.tokens_BS, context.total_B[:, None] - 1, axis=1)
        return Drafts(jnp.repeat(last_B1, 2, axis=1)), cache

    result = generate(model("random"), PROMPTS, max_new_tokens=NEW, draft=Drafter("repeat", 2, init, repeat_last))
    assert result.tokens == [plain("random", prompt)[:NEW] for prompt in PROMPTS]
    arch, num_draft, batch, slots = seen["init"]
    assert (arch, num_draft, batch) == (CONFIG.arch, 2, 4) and slots >= 16 + NEW + 3
    assert seen["shapes"] == ((4, slots), 4)


def own(drafts):
    """A drafter of three that returns what it is given."""
    return Drafter("own", 3, lambda *_: (), lambda config, params, cache, context: (drafts, cache))


WRONG_DRAFTS = {
    "too many": Drafts(np.zeros((1, 4), np.int32)),
    "of other rows": Drafts(np.zeros((2, 3), np.int32)),
    "fractions": Drafts(np.zeros((1, 3), np.float32)),
    "one axis": Drafts(np.zeros((3,), np.int32)),
    "a bare array": np.zeros((1, 3), np.int32),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", WRONG_DRAFTS)
def test_wrong_drafts(name):
    """What a drafter of the caller's may not return is refused with its name and the shape that is wanted."""
    with pytest.raises(UserError, match=r"drafter 'own' returns .*; it must return Drafts\(tokens\) .* \[1, 3\]"):
        generate(model("random"), [PROMPTS[0]], max_new_tokens=4, draft=own(WRONG_DRAFTS[name]))


@pytest.mark.grid
def test_fewer_drafts_and_any_integers():
    """Fewer drafts than announced are fine, and so are ids of any integer type."""
    for good in (np.zeros((1, 1), np.int32), np.full((1, 3), 2, np.uint8)):
        tokens = generate(model("random"), [PROMPTS[0]], max_new_tokens=4, draft=own(Drafts(good))).tokens
        assert tokens == [plain("random", PROMPTS[0])[:4]]


@pytest.mark.grid
@pytest.mark.parametrize("rule", ["rejection", Rule("typical", epsilon=0.0, delta=0.0)])
def test_drafts_of_no_token(rule):
    """Ids that do not exist count as token 0: none is ever returned. Breaks without `known_BP`."""
    wrong = own(Drafts(np.array([[-7, 2**30, -1]], np.int32)))
    settings = {"draft": wrong, "accept": rule, "temperature": 1.0}
    tokens = generate(model("random"), [PROMPTS[0]], max_new_tokens=12, **settings).tokens[0]
    assert min(tokens) >= 0 and max(tokens) < model("random").config.model.vocab_size


@pytest.mark.grid
def test_registers_draft_nothing():
    """A model with registers drafts by lookup, and asking its heads for drafts says why not."""
    config = tiny_config(heads={"kind": "registers", "num_future": 3})
    lm = loaded(config, loud_params(config))
    with pytest.raises(UserError, match=r"heads.kind='registers' is for training only; use draft='lookup'"):
        generate(lm, [[1, 2]], max_new_tokens=4, draft="heads")
    assert len(generate(lm, [[1, 2]], max_new_tokens=4, draft="none").tokens[0]) == 4
    assert config.num_draft == 0
    auto, lookup = (generate(lm, [[1, 2, 1, 2]], max_new_tokens=8, draft=draft) for draft in ("auto", "lookup"))
    assert auto.stats.histogram == lookup.stats.histogram
    assert len(auto.stats.histogram) > 1


def test_a_path_is_no_model():
    """A path in the place of the model is named, with what to call."""
    with pytest.raises(UserError, match=r"'runs/mine' is a path; load it first: generate\(mtp_jax.load"):
        generate("runs/mine", ["x"], max_new_tokens=4)


@pytest.mark.grid
def test_wrong_probabilities():
    """A drafter's probabilities must be over the vocabulary, one row per draft; any float will do."""
    tokens, V = np.zeros((1, 3), np.int32), model("random").config.model.vocab_size
    settings = {"max_new_tokens": 4, "accept": "rejection"}
    wrong = own(Drafts(tokens, np.ones((1, 3, V + 1), np.float32)))
    with pytest.raises(UserError, match=rf"probabilities of shape \[1, 3, {V + 1}\] .* must be \[1, 3, {V}\]"):
        generate(model("random"), [PROMPTS[0]], draft=wrong, **settings)
    half = own(Drafts(tokens, np.eye(V, dtype=np.float16)[tokens]))
    assert generate(model("random"), [PROMPTS[0]], draft=half, **settings).tokens == [plain("random", PROMPTS[0])[:4]]


@pytest.mark.parametrize("count", [-1, 2.0, None])
def test_wrong_number_of_drafts(count):
    """A drafter announces a whole number of drafts."""
    with pytest.raises(UserError, match=rf"Drafter.num_draft={count}; it must be an int, 0 or above"):
        Drafter("own", count, lambda *_: (), lambda *_: None)


@pytest.mark.parametrize("draft", [3, dataclasses.make_dataclass("Function", [], namespace={"__call__": print})()])
def test_a_drafter_without_functions(draft):
    """What is compiled in must be a function with a hash. Breaks without the check in `Drafter.__post_init__`."""
    with pytest.raises(UserError, match=r"Drafter.draft=.* must be a function with a hash; it is compiled in"):
        Drafter("own", 1, lambda *_: (), draft)


@pytest.mark.grid
def test_numbers_of_numpy():
    """numpy's whole numbers and fractions are numbers."""
    settings = {"temperature": np.float32(0.5), "top_k": np.int32(3), "top_p": np.float64(0.75), "seed": np.uint64(5)}
    ours = {"temperature": 0.5, "top_k": 3, "top_p": 0.75, "seed": 5}
    lm = model("random")
    wanted = generate(lm, PROMPTS, max_new_tokens=4, num_draft=2, **ours).tokens
    assert generate(lm, PROMPTS, max_new_tokens=np.int64(4), num_draft=np.int8(2), **settings).tokens == wanted
    assert generate(lm, PROMPTS, max_new_tokens=4, **ours | {"seed": np.array([5, 5, 5, 5])}).tokens[0] == wanted[0]


UNHASHABLE = type("Unhashable", (), {"__call__": max, "__hash__": None})()
UNCLEAR = {
    "one string instead of a list": ("ab", {}, "prompts"),
    "one list of ids instead of a list of them": ([1, 2, 3], {}, "prompt 0"),
    "nothing": (None, {}, "prompts"),
    "no prompt among prompts": ([[1], None], {}, "prompt 1"),
    "fractions as ids": ([[1.5, 2.0]], {}, "prompt 0"),
    "text that is no unicode": (["\ud800"], {}, "prompt 0"),
    "a drafter in an array": ([[1]], {"draft": np.array([1, 2])}, "is not a drafter"),
    "drafts in an array": ([[1]], {"num_draft": np.array([1, 2])}, "num_draft=array"),
    "bias in an array": ([[1]], {"logit_bias": np.zeros(258)}, "it must map token ids to numbers"),
    "bias beyond float32": ([[1]], {"logit_bias": {1: 10**400}}, "it must be from -1e30 to 1e30, or -inf"),
    "temperature beyond float32": ([[1]], {"temperature": 10**400}, "it must be 0 for greedy, or from 1e-6 to 1e6"),
    "complex temperature": ([[1]], {"temperature": np.complex64(1)}, "temperature="),
    "seed of no axis": ([[1]], {"seed": np.array(-3)}, r"seed=array\(-3\)"),
    "confidence of a lookup": ([[1]], {"draft": "lookup", "accept": "confidence"}, "'lookup' returns none"),
    "a function of two": ([[1]], {"logits_fn": lambda z, tokens: z}, "logits_fn fails when it is traced .* positional"),
    "a function that branches": (
        [[1]],
        {"logits_fn": lambda z, tokens, length: z if length > 3 else -z},
        r"logits_fn fails when it is traced with \(logits \[\d+\], tokens \[\d+\], length\): Attempted boolean",
    ),
    "a function without a hash": (
        [[1]],
        {"logits_fn": type("F", (), {"__call__": max, "__hash__": None})()},
        "no hash",
    ),
    "no list of stops": ([[1]], {"stop": None}, "stop=None; it must be a list of strings"),
    "a truth as a number": ([[1]], {"max_new_tokens": True}, "max_new_tokens=True"),
    "a function of other logits": ([[1]], {"logits_fn": lambda z, tokens, length: z[:3]}, r"logits_fn returns \(3,\)"),
    "one string as stop": ([[1]], {"stop": "ab"}, "stop"),
    "stop that is no string": ([[1]], {"stop": [5]}, "stop"),
    "fractional new tokens": ([[1]], {"max_new_tokens": 8.5}, "max_new_tokens=8.5"),
    "new tokens as text": ([[1]], {"max_new_tokens": "8"}, "max_new_tokens='8'"),
    "fractional drafts": ([[1]], {"num_draft": 1.0}, "num_draft=1.0"),
    "drafts for a drafter that has its own": ([[1]], {"draft": NONE, "num_draft": 2}, "num_draft=2"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_unclear_input(name):
    """What cannot be meant is refused in one line, instead of a traceback or an answer to another question."""
    prompts, options, message = UNCLEAR[name]
    with pytest.raises(UserError, match=message):
        generate(chain_model(), prompts, **{"max_new_tokens": 32, **options})


@pytest.mark.grid
@pytest.mark.parametrize("new", [2**31, 10**12])
def test_as_many_tokens_as_the_model_can(new):
    """A huge max_new_tokens means up to model.max_seq_len, and costs no more than that."""
    result = generate(model("random"), PROMPTS, max_new_tokens=new)
    longest = CONFIG.model.max_seq_len
    assert [len(p) + len(row) for p, row in zip(PROMPTS, result.tokens, strict=True)] == [longest] * 4


def test_one_layer():
    """A model of one layer, at the default tap: the input of its only block."""
    assert tiny_config(model={"num_layers": 1}).arch.tap == 0
    assert tiny_config(model={"num_layers": 1}, heads={"num_future": 1}).model.num_layers == 1
