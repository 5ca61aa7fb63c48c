"""The table of chips: names that jax reports find their own row."""

import pytest

from mtp_jax.cost.hardware import chip


@pytest.mark.parametrize(
    ("kind", "name", "teraflops", "gigabytes_per_second"),
    [
        ("TPU v4", "TPU v4", 275, 1228),
        ("TPU v5 lite", "TPU v5e", 197, 819),
        ("TPU v5", "TPU v5p", 459, 2765),
        ("TPU v6 lite", "TPU v6e", 918, 1638),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB SXM", 312, 1555),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe", 312, 1935),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.4, 3350),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756, 2000),
        ("NVIDIA H200", "H200 SXM", 989.4, 4800),
        ("NVIDIA B200", "B200", 2250, 7700),
        ("NVIDIA L4", "L4", 121, 300),
        ("Tesla T4", "T4", 65, 300),
    ],
)
def test_device_kinds_find_their_chip(kind, name, teraflops, gigabytes_per_second):
    """chip(kind) has the published figures; with plain names before special ones, an H100 PCIe would be an SXM."""
    found = chip(kind)
    figures = (found.name, found.bf16_flops / 1e12, found.hbm_bandwidth / 1e9)
    assert figures == (name, pytest.approx(teraflops), pytest.approx(gigabytes_per_second))


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "TPU v55", ""])
def test_unknown_devices_have_no_figures(kind):
    """chip(kind) is None; a comparison of mere beginnings takes an L40 for an L4."""
    assert chip(kind) is None
