"""Published peak figures of accelerators, for rooflines and MFU. The key is the device kind that jax reports.

All figures are per jax device, dense (no structured sparsity) and in decimal units. Only memory is in binary units if
the maker gives it so. Sources:

  TPU v4, v5e, v5p, v6e, 7x: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, the tables of chip specifications.
    Google gives sent and received bytes together; the table has half of that. jax shows a v4 or v5p chip as one device,
    and each half of a 7x chip as one device.
  A100, H100, H200, B200, L4, L40S, T4: NVIDIA's data sheets of these products. Figures "with sparsity" are halved.
    NVLink is given for both directions together, and is halved, too. T4 has no bfloat16: the table has its float16
    peak, which bfloat16 does not reach.
"""

import dataclasses

GB = 10**9
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The peak figures of one device."""

    name: str
    bf16_flops: float
    """Floating-point operations per second of bfloat16 matrix products that accumulate in float32."""
    hbm_bytes: int
    """Memory of the device, in bytes."""
    hbm_bandwidth: float
    """Bytes per second between the memory and the cores of the device."""
    link_bandwidth: float
    """Bytes per second that the device can send to other devices over all its links together."""


_A100 = {"bf16_flops": 312e12, "link_bandwidth": 300 * GB}
_H100 = {"bf16_flops": 989.4e12, "link_bandwidth": 450 * GB}

# Beginnings of device kinds. The first match counts, so longer names come before shorter ones.
_CHIPS = (
    ("TPU v4", Chip("TPU v4", 275e12, 32 * GIB, 1228 * GB, 300 * GB)),
    ("TPU v5 lite", Chip("TPU v5e", 197e12, 16 * GIB, 819 * GB, 200 * GB)),
    ("TPU v5e", Chip("TPU v5e", 197e12, 16 * GIB, 819 * GB, 200 * GB)),
    ("TPU v5", Chip("TPU v5p", 459e12, 95 * GIB, 2765 * GB, 600 * GB)),
    ("TPU v6 lite", Chip("TPU v6e", 918e12, 32 * GIB, 1638 * GB, 400 * GB)),
    ("TPU v6e", Chip("TPU v6e", 918e12, 32 * GIB, 1638 * GB, 400 * GB)),
    ("TPU7x", Chip("TPU 7x, half a chip", 1153.5e12, 96 * GIB, 3690 * GB, 300 * GB)),
    ("NVIDIA A100-SXM4-40GB", Chip("A100 40GB SXM", hbm_bytes=40 * GIB, hbm_bandwidth=1555 * GB, **_A100)),
    ("NVIDIA A100-SXM4-80GB", Chip("A100 80GB SXM", hbm_bytes=80 * GIB, hbm_bandwidth=2039 * GB, **_A100)),
    ("NVIDIA A100-PCIE-40GB", Chip("A100 40GB PCIe", hbm_bytes=40 * GIB, hbm_bandwidth=1555 * GB, **_A100)),
    ("NVIDIA A100 80GB PCIe", Chip("A100 80GB PCIe", hbm_bytes=80 * GIB, hbm_bandwidth=1935 * GB, **_A100)),
    ("NVIDIA H100 PCIe", Chip("H100 PCIe", 756e12, 80 * GIB, 2000 * GB, 300 * GB)),
    ("NVIDIA H100 NVL", Chip("H100 NVL", 835.5e12, 94 * GIB, 3900 * GB, 300 * GB)),
    ("NVIDIA H100", Chip("H100 SXM", hbm_bytes=80 * GIB, hbm_bandwidth=3350 * GB, **_H100)),
    ("NVIDIA H200 NVL", Chip("H200 NVL", 835.5e12, 141 * GB, 4800 * GB, 450 * GB)),
    ("NVIDIA H200", Chip("H200 SXM", hbm_bytes=141 * GB, hbm_bandwidth=4800 * GB, **_H100)),
    ("NVIDIA B200", Chip("B200", 2250e12, 180 * GB, 7700 * GB, 900 * GB)),
    ("NVIDIA L40S", Chip("L40S", 362e12, 48 * GB, 864 * GB, 32 * GB)),
    ("NVIDIA L4", Chip("L4", 121e12, 24 * GB, 300 * GB, 32 * GB)),
    ("Tesla T4", Chip("T4", 65e12, 16 * GB, 300 * GB, 16 * GB)),
)


def chip(device_kind: str) -> Chip | None:
    """The published figures of a device.

    Args:
      device_kind: `jax.Device.device_kind`, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3".

    Returns:
      The chip; None for CPUs and for accelerators that are not in the table.
    """
    return next((chip for kind, chip in _CHIPS if _is(device_kind, kind)), None)


def _is(device_kind: str, kind: str) -> bool:
    """Whether `device_kind` begins with the whole words of `kind`: "NVIDIA L40" does not begin with "NVIDIA L4"."""
    return device_kind == kind or device_kind.startswith(kind + " ")
