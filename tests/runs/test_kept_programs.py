"""Compiled programs: few are kept, those dropped are freed, and nothing else changes. Each docstring names the line
whose deletion breaks the test."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.decoding import compilations, loaded, loud_params, slow_greedy
from reference.tiny import tiny_config

from mtp_jax.decode import counts
from mtp_jax.decode.buckets import batch_rows
from mtp_jax.decode.generate import generate
from mtp_jax.decode.stats import DecodeStats
from mtp_jax.errors import UserError
from mtp_jax.runs import programs
from mtp_jax.runs.programs import PROGRAMS, Recent, bounded

CALLS = []


@bounded(statics=(0,), donate=(2,), weights=1)
def scaled_sum(times, weights, x_B):
    """times * weights * x, added up step by step."""
    CALLS.append((times, x_B.shape))
    return jax.lax.fori_loop(0, times, lambda _, y_B: y_B + jnp.sort(weights * x_B), jnp.zeros_like(x_B))


def call(times, size):
    # No jnp.ones: it would keep a program for every size.
    return scaled_sum(times, jnp.float32(2), jnp.asarray(np.ones((size,), np.float32))).tolist()


@pytest.fixture
def three(monkeypatch):
    """Room for three programs, and none there."""
    monkeypatch.setattr(PROGRAMS, "most", 3)
    PROGRAMS.clear()
    CALLS.clear()
    yield
    PROGRAMS.clear()


def test_the_least_recently_used_are_dropped(three):
    """Six shapes, room for three: at most three are kept, those met last; results are those of plain arithmetic; one
    that is used again in between stays. Breaks without `forget` in `recall`, or `move_to_end`."""
    for size in (1, 2, 3, 1, 4, 1, 5):
        assert call(2, size) == [4.0] * size
        assert len(PROGRAMS) <= 3
    assert [shape for _, shape in CALLS] == [(size,) for size in (1, 2, 3, 4, 5)]
    assert [key[2] for key in PROGRAMS] == [((4,),), ((1,),), ((5,),)]
    assert scaled_sum._cache_size() == 3


def test_kept_programs_are_neither_traced_nor_compiled_again(three):
    """The same static arguments and shapes: one trace. Others: one more each. Breaks when the key holds too little or
    too much."""
    for times, size in ((1, 2), (1, 2), (2, 2), (1, 3), (1, 2)):
        call(times, size)
    assert CALLS == [(1, (2,)), (2, (2,)), (1, (3,))]


def test_arguments_are_donated(three):
    """As with jax.jit. Breaks without `donate_argnums`."""
    x_B = jnp.ones((3,))
    scaled_sum(1, jnp.float32(1), x_B)
    assert x_B.is_deleted()


def test_inside_another_function(three):
    """Traced by others, it is what it wraps, and keeps nothing. Breaks without the look for tracers."""
    made = jax.eval_shape(functools.partial(scaled_sum, 2), jnp.float32(2), jnp.ones((3,)))
    assert made.shape == (3,) and not PROGRAMS
    assert jax.jit(lambda x_B: scaled_sum(2, jnp.float32(2), x_B))(jnp.ones((2,))).tolist() == [4.0, 4.0]


@pytest.mark.grid
def test_dropped_programs_give_their_mappings_back(three):
    """The number of the process's memory mappings after twelve shapes is that after three, up to what one program
    holds. Breaks when the dropped ones are still held anywhere."""
    if not programs.mappings():
        pytest.skip("this system does not say")
    for size in range(1, 4):
        call(3, size)
    gc.collect()
    before = programs.mappings()
    for size in range(4, 13):
        call(3, size)
    gc.collect()
    assert programs.mappings() <= before + 8


def test_parameters_of_another_kind(three):
    """A program whose parameters have another dtype is compiled, timed, and gives what jax gives."""
    call(1, 3)
    began = programs.compile_seconds()
    assert scaled_sum(1, jnp.float16(2), jnp.ones((3,))).tolist() == [2.0] * 3
    assert programs.compile_seconds() > began


class Full:
    """A process with so many mappings; dropping a program frees ten."""

    def __init__(self, monkeypatch, others, most=100):
        monkeypatch.setattr(programs, "mappings", lambda: others + 10 * len(PROGRAMS))
        monkeypatch.setattr(programs, "most_mappings", lambda: most)


@pytest.mark.grid
def test_room_is_made_before_mappings_run_out(three, monkeypatch):
    """From seven tenths of the mappings on half of the programs go, from nine tenths on all of them; where that does
    not help, one line says so, instead of XLA ending the process. Breaks without `make_room` in `_compile`."""
    for size in (1, 2, 3):
        call(1, size)
    Full(monkeypatch, others=39)
    PROGRAMS.popitem(last=False)
    call(1, 1)
    assert len(PROGRAMS) == 3
    Full(monkeypatch, others=40)
    call(1, 4)
    assert [key[2] for key in PROGRAMS] == [((1,),), ((4,),)]
    Full(monkeypatch, others=75)
    call(1, 5)
    assert [key[2] for key in PROGRAMS] == [((5,),)]
    Full(monkeypatch, others=95)
    with pytest.raises(UserError, match=r"95 memory mappings of the 100 that vm.max_map_count allows.*sysctl"):
        call(1, 6)
    assert not PROGRAMS


def test_a_dict_of_recent_entries():
    """recall returns what is there, makes what is not, and keeps the `most` asked for last."""
    recent = Recent(2)
    asked = [recent.recall(key, lambda key=key: [key]) for key in "abacab"]
    assert asked == [["a"], ["b"], ["a"], ["c"], ["a"], ["b"]]
    assert list(recent) == ["a", "b"]


SHAPE = {"vocab_size": 24, "num_layers": 1, "d_model": 8, "num_heads": 1, "num_kv_heads": 1, "d_ff": 8}
PROMPTS = [(7, 3, 11), (5,), (1, 18, 2, 21), *((row, row + 1) for row in range(7))]


@functools.cache
def small():
    """A model that compiles fast."""
    config = tiny_config(model=SHAPE, heads={"num_future": 1})
    return loaded(config, loud_params(config, seed=2))


@pytest.mark.grid
def test_generation_with_room_for_three_programs(three):
    """A request of one batch size takes three programs. With room for three, each size drops the one before: at most
    three are kept, nothing else is compiled, and the tokens are those of the slow reference. The same size again
    compiles nothing, and says so to the letter. Breaks with `jnp.asarray`, which has programs of its own."""
    lm = small()
    expected = [slow_greedy(lm.config, lm.params, prompt, 6, width=16) for prompt in PROMPTS[:2]]
    for rows in (1, 2, 1):
        with compilations() as compiled:
            result = generate(lm, PROMPTS[:rows], max_new_tokens=6, draft="none")
        assert result.tokens == expected[:rows]
        assert len(PROGRAMS) <= 3
        assert result.stats.compile_seconds > 0
    assert len(compiled) == 3
    longer = [(1, 2) * 10]
    with compilations() as compiled:
        generate(lm, longer, max_new_tokens=20, draft="none")
    assert len(compiled) == 3
    generate(lm, PROMPTS[:1], max_new_tokens=6, draft="none")
    with compilations() as compiled:
        result = generate(lm, PROMPTS[1:2], max_new_tokens=5, draft="none")
    assert (compiled, result.stats.compile_seconds) == ([], 0.0)
    assert result.tokens == [expected[1][:5]]


@pytest.mark.parametrize("compiling", [0.0, 3.5])
def test_seconds(compiling):
    """seconds = prefill + decoding + compiling, and tokens_per_second is over the seconds of decoding alone, in Python
    and in JSON. Breaks when compiling is part of either."""
    stats = DecodeStats((4,), 4, 6, 4, 0.25, 2.0, 0, compile_seconds=compiling)
    assert stats.seconds == 2.25 + compiling
    assert stats.tokens_per_second == 2.0
    names = ("seconds", "prefill_seconds", "decode_seconds", "compile_seconds", "tokens_per_second")
    assert [stats.as_json()[name] for name in names] == [2.25 + compiling, 0.25, 2.0, compiling, 2.0]


def test_seconds_of_compiling_are_not_those_of_decoding(monkeypatch):
    """With a clock that only compiling moves, prefill and decoding take 0 seconds."""
    now = [0.0]
    monkeypatch.setattr(programs, "compile_seconds", lambda: now[0])
    monkeypatch.setattr(counts.time, "perf_counter", lambda: now[0])
    clock = counts.Clock()
    now[0] += 5.0
    assert (clock.compiling(), clock.seconds()) == (5.0, 0.0)


def test_batch_sizes():
    """Up to 8 rows as they are, then four sizes up to every power of two: never below, at most a quarter more, and 28
    sizes up to 256."""
    sizes = [batch_rows(count) for count in range(1, 257)]
    assert sizes[:20] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12, 14, 14, 16, 16, 20, 20, 20, 20]
    assert all(count <= size <= 1.25 * count for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 28


@pytest.mark.grid
def test_rows_that_fill_a_batch_are_not_seen():
    """Nine rows run the program of ten, and get what they get there, with seeds of their own; counts are those of nine
    rows, and what fails in a row that only fills fails for nobody. Breaks when counters or failures are read from rows
    that fill, or seeds are not filled up."""
    settings = {"max_new_tokens": 4, "draft": "none", "temperature": 1.0, "logits_fn": none_behind_the_first}
    ten = generate(small(), PROMPTS, seed=list(range(10)), **settings)
    nine = generate(small(), PROMPTS[:9], seed=list(range(9)), **settings)
    assert nine.stats.compile_seconds == 0.0
    assert (nine.tokens, nine.finish_reason) == (ten.tokens[:9], ["length"] * 9)
    assert (nine.stats.emitted, nine.stats.histogram, nine.stats.batch_rounds) == (36, (27,), 3)


def none_behind_the_first(logits_V, tokens_S, length):
    """No token may follow a prompt that is token 0 alone, as in rows that fill."""
    return jnp.where((length == 1) & (tokens_S[0] == 0), -jnp.inf, logits_V)
