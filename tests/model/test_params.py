"""Equations of the parameters: their shapes, their number, their randomness and the decoding view.

Each docstring names the line whose deletion breaks the test.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.models import small_config
from reference.quick import quick_jit

from mtp_jax.config import equal_parameter_layers
from mtp_jax.model import mtp, trunk
from mtp_jax.training.optim import param_path


def shapes(tree):
    return {param_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract(config):
    return jax.eval_shape(lambda: mtp.init(config.arch, jax.random.key(0)))


BLOCK = {
    "attn/q": (16, 4, 4),
    "attn/k": (16, 2, 4),
    "attn/v": (16, 2, 4),
    "attn/o": (4, 4, 16),
    "attn_norm/scale": (16,),
    "mlp/gate": (16, 24),
    "mlp/up": (16, 24),
    "mlp/down": (24, 16),
    "mlp_norm/scale": (16,),
}


BIASES = {"q": (4, 4), "k": (2, 4), "v": (2, 4), "o": (16,)}


def test_shapes_are_literal():
    """blocks lead with L, heads/blocks with M-1; the rest is embedding and final norm.

    Breaks if heads get num_future blocks, or if blocks are not stacked.
    """
    config = small_config({"num_layers": 5}, {"num_future": 4})
    expected = {"embed/table": (24, 16), "final_norm/scale": (16,)}
    expected |= {f"blocks/{name}": (5, *shape) for name, shape in BLOCK.items()}
    expected |= {f"heads/blocks/{name}": (3, *shape) for name, shape in BLOCK.items()}
    assert shapes(abstract(config)) == expected


@pytest.mark.parametrize(
    ("model", "heads", "extra"),
    [
        ({"tie_embeddings": False}, {}, {"unembed/table": (24, 16)}),
        (
            {"qk_norm": True},
            {},
            {
                f"{stack}attn/{norm}/scale": (2, 4)
                for stack in ("blocks/", "heads/blocks/")
                for norm in ("q_norm", "k_norm")
            },
        ),
        ({}, {"num_future": 1}, {}),
        (
            {"norm_position": "sandwich", "qkv_bias": True, "out_bias": True, "mlp_bias": True},
            {"num_future": 1},
            {f"blocks/{part}_post_norm/scale": (2, 16) for part in ("attn", "mlp")}
            | {f"blocks/attn/{name}_bias": (2, *shape) for name, shape in BIASES.items()}
            | {f"blocks/mlp/{name}_bias": (2, width) for name, width in {"gate": 24, "up": 24, "down": 16}.items()},
        ),
        (
            {"norm": "layer", "qk_norm": True, "qk_norm_joint": True},
            {"num_future": 1},
            {"final_norm/bias": (16,)}
            | {f"blocks/{part}_norm/bias": (2, 16) for part in ("attn", "mlp")}
            | {f"blocks/attn/q_norm/{leaf}": (2, 16) for leaf in ("scale", "bias")}
            | {f"blocks/attn/k_norm/{leaf}": (2, 8) for leaf in ("scale", "bias")},
        ),
    ],
    ids=["untied", "qk-norm", "one-head", "sandwich-biases", "layer-norms"],
)
def test_options_add_exactly_their_parameters(model, heads, extra):
    """params(option) - params(base) = what the option names; M = 1 has no `heads` at all.

    Breaks without `if not config.tie_embeddings`, without `if c.qk_norm`, or without `num_future > 1`.
    """
    base = {"embed/table": (24, 16), "final_norm/scale": (16,)}
    for stack in ("blocks", "heads/blocks")[: 1 if heads else 2]:
        base |= {f"{stack}/{name}": (2, *shape) for name, shape in BLOCK.items()}
    assert shapes(abstract(small_config(model, heads))) == base | extra


def test_count_params_by_hand():
    """V D (embedding) + (L + M - 1) (D H (2 N + 2 K) + 3 D F + 2 D) + D, in literals.

    Breaks if `count_params` leaves out the heads.
    """
    block = 16 * 4 * (2 * 4 + 2 * 2) + 3 * 16 * 24 + 2 * 16
    assert block == 1952
    assert mtp.count_params(small_config({"num_layers": 5}, {"num_future": 4}).arch) == 384 + 8 * 1952 + 16
    assert mtp.count_params(small_config({"num_layers": 8}, {"num_future": 1}).arch) == 384 + 8 * 1952 + 16


@pytest.mark.parametrize("num_future", [1, 2, 4, 6])
def test_equal_parameter_layers(num_future):
    """count(L = equal_parameter_layers(6, M), M) is the same for every M.

    Breaks if `num_future` is taken for `num_future - 1`, or if a head owns more than one block.
    """
    layers = equal_parameter_layers(total_layers=6, num_future=num_future)
    tap = {"tap": 0} if layers == 1 else {}
    config = small_config({"num_layers": layers}, {"num_future": num_future, **tap})
    assert mtp.count_params(config.arch) == 384 + 6 * 1952 + 16


def test_equal_parameter_layers_refuses():
    """More heads than layers is an error with the numbers."""
    with pytest.raises(ValueError, match=r"3 layers are too few to give one to each of 3 .* num_future <= 3"):
        equal_parameter_layers(3, 4)


WIDE = {"num_layers": 3, "tie_embeddings": False, "d_model": 64, "num_heads": 2, "head_dim": 64, "d_ff": 96}


@pytest.fixture(scope="module")
def config():
    return small_config(WIDE)


@pytest.fixture(scope="module")
def init(config):
    return quick_jit(functools.partial(mtp.init, config.arch))


@pytest.fixture(scope="module")
def params(init):
    return init(jax.random.key(0))


@pytest.mark.grid
def test_init_is_a_function_of_the_key(config, init, params):
    """init(key) twice is the same bit for bit and the same program; another key changes every entry of every matrix.

    Breaks if a parameter's key is a constant, or if `init` draws from anything but its key.
    """
    jax.tree.map(np.testing.assert_array_equal, params, init(jax.random.key(0)))
    again = quick_jit(functools.partial(mtp.init, config.arch)).lower(jax.random.key(0))
    assert again.as_text() == init.lower(jax.random.key(0)).as_text()
    pair = jax.device_get((params, init(jax.random.key(1))))
    same = flat(jax.tree.map(lambda x, y: bool((x == y).any()), *pair))
    assert {name for name, any_same in same.items() if any_same} == {name for name in same if "norm" in name}


def flat(tree):
    return {param_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_every_matrix_is_drawn_once(params):
    """All layers, heads and tables of equal shape differ from each other: no key is used twice.

    Breaks with one key for `embed` and `unembed`, for the LM's blocks and the heads', or for all layers of a stack.
    """
    drawn = {}
    for name, leaf in flat(params).items():
        if "norm" not in name:
            for i, matrix in enumerate(leaf if "blocks" in name else [leaf]):
                drawn[f"{name}[{i}]"] = np.asarray(matrix).ravel()[:8].tobytes()
    assert len(drawn) == (3 + 2) * 7 + 2
    assert len(set(drawn.values())) == len(drawn)


def test_initial_sizes(params):
    """Weights into a layer have standard deviation fan_in^-0.5, writes into the residual stream (2 L)^-0.5 of that.

    Breaks without the gain in `_residual`, or with the wrong axis as fan-in (o's is N H, not D). 5 % is 3 standard
    errors of the smallest matrix.
    """
    drawn = flat(params)
    for stack in ("blocks/", "heads/blocks/"):
        for name in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
            np.testing.assert_allclose(np.std(drawn[stack + name]), 64**-0.5, rtol=0.05)
        for name, fan_in in {"attn/o": 128, "mlp/down": 96}.items():
            np.testing.assert_allclose(np.std(drawn[stack + name]), (fan_in * 2 * 3) ** -0.5, rtol=0.05)
    for name in ("embed/table", "unembed/table"):
        np.testing.assert_allclose(np.std(drawn[name]), 64**-0.5, rtol=0.05)
    np.testing.assert_array_equal(drawn["final_norm/scale"], 1)


def test_param_dtype():
    """param_dtype is the dtype of every parameter at rest. Breaks if a norm scale ignores it."""
    tree = abstract(small_config({"param_dtype": "bfloat16", "tie_embeddings": False, "qk_norm": True}))
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("bfloat16")}


def test_decode_view_round_trip(config, params):
    """stack(decode_view(params)) = params, bit for bit: one tree per layer and per head, in order.

    Breaks if `unstack` takes the wrong index or drops the last layer, or if `decode_view` leaves the heads stacked.
    """
    view = mtp.decode_view(config.arch, params)
    assert (len(view["blocks"]), len(view["heads"]["blocks"])) == (3, 2)
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    heads = stack([block for blocks in view["heads"]["blocks"] for block in blocks])
    stacked = view | {"blocks": stack(view["blocks"]), "heads": {"blocks": heads}}
    stacked["unembed"] = {"table": trunk.unembedding(config.arch, view)}
    for blocks in (stacked["blocks"], heads):
        blocks.pop("constants")
    jax.tree.map(np.testing.assert_array_equal, stacked, params)


def test_decode_view_is_in_the_compute_dtype(params):
    """decode_view casts every matrix to `model.dtype`, keeps norm scales, which multiply in float32, and leaves a model
    without heads without them.

    Breaks without the `astype`: every decode step would read float32 weights to multiply in bfloat16.
    """
    config = small_config(WIDE | {"dtype": "bfloat16"})
    view = mtp.decode_view(config.arch, {name: tree for name, tree in params.items() if name != "heads"})
    leaves = [(str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(view)]
    dtypes = {("scale" in path, leaf.dtype) for path, leaf in leaves if "constants" not in path}
    assert dtypes == {(False, jnp.dtype("bfloat16")), (True, jnp.dtype("float32"))}
    assert "heads" not in view
    np.testing.assert_array_equal(trunk.unembedding(config.arch, view), params["unembed"]["table"].astype(jnp.bfloat16))
