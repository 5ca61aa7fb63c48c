"""`benchmarks/bytes.py`: models of equal blocks and equal training FLOPs, and its tables."""

import pathlib

import pytest

PLAIN = ("BPE, 4 heads", "bytes, 1 head", "bytes, 8 heads")
BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def script(monkeypatch):
    """The script, found as Python finds it when it runs."""
    import importlib.util
    import sys

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(BENCHMARKS.parent)
    spec = importlib.util.spec_from_file_location("byte_benchmark", BENCHMARKS / "bytes.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "byte_benchmark", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("scale", [1, 4])
def test_models_have_equal_blocks(script, scale):
    """Blocks with heads are 12 and widths are equal, so that a step costs nearly the same; times steps, it is equal.

    Breaks if a model forgets one of the changes, or if the scale misses the feed-forward layer.
    """
    configs = {name: script.plain_config(name, scale) for name in PLAIN}
    for config in configs.values():
        assert config.model.num_layers + config.heads.num_future - 1 == 12
        assert (config.model.d_model, config.model.num_heads) == (64 * scale, 2 * scale)
    costs = {name: script.per_step(config) for name, config in configs.items()}
    assert max(costs.values()) < 1.2 * min(costs.values())
    assert configs["bytes, 8 heads"].model.d_ff == 128 * scale


def test_patched_models(script):
    """A Byte Latent Transformer has room for 1.5 times the mean number of patches, and a wide latent transformer.

    Its entropy model has the shape of the run that it comes from. Breaks if the sections of the config are lost.
    """
    from byte_models import entropy_config

    static = script.patched_config(script.PatchRule("static", stride=4), 4.0, 1, None)
    assert (static.model.latent.d_model, static.model.d_model, static.model.slots_per_byte) == (128, 64, 1.5 / 4)
    by_entropy = script.patched_config(script.PatchRule(threshold=1.0), 6.0, 1, pathlib.Path("runs/entropy"))
    assert by_entropy.train.entropy_from == "runs/entropy"
    assert by_entropy.model.part("entropy").num_layers == entropy_config(1).model.num_layers == 3
    assert by_entropy.data == script.plain_config("bytes, 8 heads", 1).data


def test_tables(script):
    """Means and ranges over seeds, and dashes for what a model without drafts has not. Breaks if a column is lost."""
    args = script.Args(noise=("drop:0.1",), seeds=2)
    facts = {"parameters": 5e5, "flops": 4e12, "bytes": 1e6}
    speed = {"plain": 100.0, "step_ms": 1.0}
    drafts = {"drafted": 150.0, "bytes_per_round": 2.0, "accept_at": [0.5, 0.25], "identical": True}
    drafts |= {"verify_ms": 2.0, "round_ms": 3.0, "choice_ms": 0.5}
    bits = [{"clean": 2.0, "drop:0.1": 3.0}, {"clean": 2.2, "drop:0.1": 3.0}]
    found = {
        "bytes, 1 head": [facts | speed | {"bits": one} for one in bits],
        "bytes, 8 heads": [facts | speed | drafts | {"bits": one} for one in bits],
    }
    assert script._quality(args, found).rows[0][2:] == [
        "4.00M",
        "1.00",
        "2.100 (2.000-2.200)",
        "3.000 (3.000-3.000)",
    ]
    assert script._speed(args, found).rows[0] == ["bytes, 1 head", "100 (100-100)", "-", "-", "-", "-", "-"]
    assert script._speed(args, found).rows[1][3:] == ["1.50 (1.50-1.50)", "2.00 (2.00-2.00)", "50%, 25%", "yes"]
    assert script._round(args, found).rows[1][1:] == [
        f"{value} ({value}-{value})" for value in ("1.00", "3.00", "1.50", "1.00", "0.50")
    ]
    for report in (script._quality, script._speed, script._round):
        assert {len(row) for row in report(args, found).rows} == {len(report(args, found).columns)}
