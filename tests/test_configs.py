"""Every file in configs/ builds, abstractly, and has the parameters it should have."""

import pathlib
import re

import jax
import pytest
from reference.tiers import sampled

from mtp_jax import sharding
from mtp_jax.aot import flops, programs
from mtp_jax.cli.common import read_config
from mtp_jax.config import equal_parameter_layers
from mtp_jax.convert.starting import with_run
from mtp_jax.cost.flops import step_flops
from mtp_jax.data import synthetic
from mtp_jax.kernels import rows
from mtp_jax.model import mtp
from mtp_jax.training.start import check_start

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PARAMETERS = {
    "tiny": 62_816,
    "quickstart": 1_410_688,
    "bench_30m": 34_087_424,
    "bench_200m": 219_702_272,
    "bench_1b": 1_100_048_384,
    "star_graph_2_3": 444_384,
    "star_graph_2_5": 887_904,
    "star_graph_5_3": 214_848,
    "induction": 1_082_752,
    "polynomials": 1_281_280,
    "sums": 1_051_904,
    "bytes_1": 1_305_888,
    "bytes_4": 1_307_616,
    "bytes_8": 1_306_464,
    "bytes_medusa": 2_117_888,
    "byte_entropy": 1_021_920,
    "blt_tiny": 277_856,
    "blt_entropy": 6_180_864,
    "standalone": 1_052_032,
    "pretrain_1b": 1_100_048_384,
    "pretrain_7b": 6_738_415_616,
    "pretrain_13b": 13_015_864_320,
    "caft_heads": 148_675_392,
    "caft_lora": 148_675_392,
    "caft_full": 148_675_392,
    "next_token_lora": 134_515_008,
    "next_token_full": 134_515_008,
    "naive_multi_token": 148_675_392,
    "joint_heads": 148_675_423,
    "rl_arithmetic_pretrain": 689_568,
    "rl_arithmetic": 689_568,
    "rl_grpo": 689_568,
    "rl_dapo": 689_568,
    "rl_top_fifth": 689_568,
    "rl_gsm8k": 134_515_008,
}


NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
ALIKE = (
    *("bench_30m", "bench_1b", "pretrain_13b", "star_graph_2_3", "star_graph_5_3"),
    *("rl_arithmetic", "rl_grpo", "rl_dapo", "rl_top_fifth", "rl_gsm8k"),
)
"""Configs that differ from another one in their sizes alone."""


@pytest.mark.grid
@pytest.mark.parametrize("name", ALIKE)
def test_parameter_counts(name):
    """A config that is not built in the grid is read there at least, and has the known number of parameters."""
    assert mtp.count_params(read_config(str(CONFIGS / f"{name}.py"))) == PARAMETERS[name]


@pytest.mark.grid
@pytest.mark.parametrize("name", sampled(NAMES, *(name for name in NAMES if name not in ALIKE), others="slow"))
def test_config_builds(name, monkeypatch):
    """Every config's train step is traced and lowered on the config's own mesh, over eight devices where it takes the
    rest; it has the known number of parameters, and the products that the formula counts, or those and recomputed ones.

    A new config needs a line above. With a head left out of the loss there are too few products.
    """
    monkeypatch.setattr(rows, "SHORT", 2**20)  # the formula counts attention in one piece
    config = read_config(str(CONFIGS / f"{name}.py"))
    program = programs.train_step(config, sharding.make_mesh(config.mesh))
    parameters = program.arguments["parameters"].items()
    count = sum(
        leaf.size for leaf in jax.tree.leaves([tree for name, tree in parameters if name not in mtp.OF_TRAINING])
    )
    assert count == mtp.count_params(config.arch) == PARAMETERS[name]
    assert "stablehlo.dot_general" in program.lowered.as_text()
    ratio = flops.count(program.traced.jaxpr).flops / step_flops(
        config, config.train.batch_size, config.data.seq_len, computed=True
    )
    if config.optim.name == "muon":
        assert ratio > 1  # orthogonalising momentum is products, too
    elif config.heads.num_future > 1 and not config.train.learns("heads/blocks/attn/q"):
        assert 1 < ratio < 1.25  # gradients of frozen matrices are traced, and not compiled
    elif config.lora.rank:
        assert 1 < ratio < (1.5 if config.model.block.remat == "none" else 1.75)  # remat runs the blocks once more
    elif config.model.remat == "none":
        assert ratio == pytest.approx(1)
    elif config.model.remat == "dots":  # scores of attention alone
        assert 1 < ratio < 1.15
    else:
        assert 1.2 < ratio < 4 / 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["caft_heads", "next_token_lora", "next_token_full", "naive_multi_token", "joint_heads"]
)
def test_fine_tuning_fits_smollm2(name):
    """The model section is that of SmolLM2, from the cache or the package index. Breaks without `norm_eps`."""
    check_start(with_run(read_config(str(CONFIGS / f"{name}.py")), print))


def test_phases_of_caft_have_one_model_and_the_same_heads():
    """Phase 2 goes on with model and heads of phase 1."""
    first, *others = (read_config(str(CONFIGS / f"{name}.py")) for name in ("caft_heads", "caft_lora", "caft_full"))
    assert [config.arch for config in others] == 2 * [first.arch]
    assert [config.train.init_from for config in others] == 2 * ["runs/caft_heads"]


def test_equal_parameter_rule():
    """29 layers and 3 one-block heads are 32 layers (Gloeckle et al. 2024)."""
    assert equal_parameter_layers(32, 4) == 29
    assert equal_parameter_layers(32, 1) == 32
    with pytest.raises(ValueError, match="2 layers are too few to give one to each of 2 extra heads"):
        equal_parameter_layers(2, 3)


def test_byte_models_have_equal_parameters():
    """1, 4 and 8 heads on bytes: parameters and blocks are equal, to a fifth of a percent. Breaks if a trunk is deeper
    or a feed-forward layer wider."""
    configs = [read_config(str(CONFIGS / f"bytes_{heads}.py")) for heads in (1, 4, 8)]
    sizes = [mtp.count_params(config.arch) for config in configs]
    assert max(sizes) < 1.002 * min(sizes)
    assert [config.model.num_layers for config in configs] == [equal_parameter_layers(12, heads) for heads in (1, 4, 8)]
    assert [config.heads.unembed for config in configs] == ["shared", "own", "own"]


@pytest.mark.parametrize(
    "name", ["star_graph_2_3", "star_graph_2_5", "star_graph_5_3", "induction", "polynomials", "sums"]
)
def test_generated_tasks_fit_their_configs(name):
    """Vocabulary, prompt and rows of a config are those of the task that it names."""
    config = read_config(str(CONFIGS / f"{name}.py"))
    task = synthetic.make(re.sub(r"documents=\d+", "documents=4", config.data.source))
    assert (len(task.vocab), task.prompt_tokens) == (config.model.vocab_size, config.data.prompt_tokens)
    assert config.data.seq_len % task.tokens_BT.shape[1] == 1
