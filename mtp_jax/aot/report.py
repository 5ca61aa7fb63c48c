"""Report on a compiled program: memory by kind, operations, traffic, and the least possible time (roofline)."""

import dataclasses
import re
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from mtp_jax import sharding
from mtp_jax.aot import collectives, flops
from mtp_jax.aot.programs import ROUNDS, Compiled, Program, shard_bytes
from mtp_jax.config import Config
from mtp_jax.cost.hardware import Chip, chip


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a program runs. A value is None if compilation failed before it was known."""

    arguments: dict[str, int]
    """Bytes of the arguments by kind, computed from their shardings."""
    argument_bytes: int
    """Bytes of all arguments in memory. Tiles that are not full make it more than the sum by kind."""
    temp_bytes: int | None
    kept_bytes: int
    """The part of `temp_bytes` that the forward pass keeps for the backward pass, at most."""
    output_bytes: int | None
    """Bytes of results that do not reuse the memory of an argument."""
    code_bytes: int | None
    hbm_bytes: int
    beside_bytes: int = 0
    """Bytes of other arrays that stay in memory while the program runs."""

    @property
    def total(self) -> int | None:
        """Bytes of everything that is in memory at the same time."""
        parts = (self.argument_bytes, self.temp_bytes, self.output_bytes, self.code_bytes, self.beside_bytes)
        return None if None in parts else sum(parts)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds that one run of a program takes, for each of the three limits; see docs/compile.md."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Seconds if all three overlap completely."""
        return max(self.compute, self.memory, self.network)

    @property
    def apart(self) -> float:
        """Seconds if nothing is computed while data is sent."""
        return max(self.compute, self.memory) + self.network


@dataclasses.dataclass(frozen=True)
class Report:
    """All results for one program."""

    name: str
    fits: bool
    memory: Memory
    flops: float
    """Operations of the program, over all devices, recomputation included."""
    open_loops: int
    """Number of loops of unknown length. They count as one iteration in operations and traffic."""
    sent: dict[str, collectives.Sent] | None
    """Traffic by kind of collective, sent by each device."""
    roofline: Roofline | None
    """None if the figures of the chip are not known, or the program does not fit."""
    compile_seconds: float
    error: str

    def as_json(self) -> dict[str, Any]:
        """The stable keys of `mtp compile --json`."""
        memory = self.memory
        sent = self.sent
        roofline = self.roofline
        return {
            "fits": self.fits,
            "per_device": {
                **{f"{kind}_bytes": size for kind, size in memory.arguments.items()},
                "argument_bytes": memory.argument_bytes,
                "activation_bytes": memory.kept_bytes,
                "temp_bytes": memory.temp_bytes,
                "output_bytes": memory.output_bytes,
                "code_bytes": memory.code_bytes,
                **({"beside_bytes": memory.beside_bytes} if memory.beside_bytes else {}),
                "total_bytes": memory.total,
                "hbm_bytes": memory.hbm_bytes,
            },
            "flops": self.flops,
            "open_loops": self.open_loops,
            "collectives": sent and {kind: one._asdict() for kind, one in sent.items()},
            "collective_bytes": None if sent is None else sum(one.bytes for one in sent.values()),
            "roofline": roofline
            and {
                "compute_seconds": roofline.compute,
                "memory_seconds": roofline.memory,
                "network_seconds": roofline.network,
                "seconds": roofline.seconds,
                "seconds_without_overlap": roofline.apart,
            },
            "compile_seconds": self.compile_seconds,
            "error": self.error,
        }


def report(config: Config, mesh: Mesh, program: Program, compiled: Compiled) -> Report:
    """Reads a compiled program.

    Args:
      config: the run's config.
      mesh: the devices that it was compiled for.
      program: the program before it was compiled.
      compiled: the result of `compile_program`.
    """
    device = mesh.devices.flat[0]
    figures = chip(device.device_kind)
    counted = flops.count(program.traced.jaxpr)
    memory = _memory(mesh, program, compiled, _capacity(device, mesh, figures))
    sent = None
    open_loops = counted.open_loops
    roofline = None
    if compiled.executable is not None:
        sent, open_sends = collectives.read(compiled.executable.as_text(), mesh.size)
        open_loops = max(open_loops, open_sends)
        if program.name in ROUNDS:
            open_loops -= 1  # the loop over rounds: the report is about one round
        roofline = figures and _roofline(figures, memory, counted.flops / mesh.size, sent)
    fits = memory.total is not None and memory.total <= memory.hbm_bytes
    error = re.sub(r"\s+", " ", compiled.error).strip()
    return Report(program.name, fits, memory, counted.flops, open_loops, sent, roofline, compiled.seconds, error)


def _capacity(device: jax.Device, mesh: Mesh, figures: Chip | None) -> int:
    """Memory of one device in bytes. Fake devices share the memory of the host."""
    if figures is not None:
        return figures.hbm_bytes
    return psutil.virtual_memory().total // mesh.size


def _memory(mesh: Mesh, program: Program, compiled: Compiled, capacity: int) -> Memory:
    by_kind = {kind: shard_bytes(tree) for kind, tree in program.arguments.items()}
    kept = -(-program.kept // sharding.row_shards(mesh))
    beside = shard_bytes(program.beside)
    if compiled.executable is None:
        wanted = re.search(r"([\d.]+)([KMGT])\)? exceeds", compiled.error)
        temp = round(float(wanted[1]) * 1024 ** (" KMGT".index(wanted[2]))) if wanted else None
        return Memory(by_kind, sum(by_kind.values()), temp, kept, None, None, capacity, beside)
    stats = compiled.executable.memory_analysis()
    return Memory(
        arguments=by_kind,
        argument_bytes=stats.argument_size_in_bytes,
        temp_bytes=stats.temp_size_in_bytes,
        kept_bytes=min(kept, stats.temp_size_in_bytes),
        output_bytes=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        hbm_bytes=capacity,
        beside_bytes=beside,
    )


def _roofline(figures: Chip, memory: Memory, flops_here: float, sent: dict[str, collectives.Sent]) -> Roofline:
    """The roofline of a program. It reads each argument once and writes each result once; donated arguments are
    overwritten in place."""
    return Roofline(
        compute=flops_here / figures.bf16_flops,
        memory=(memory.argument_bytes + memory.output_bytes) / figures.hbm_bandwidth,
        network=sum(one.bytes for one in sent.values()) / figures.link_bandwidth,
    )
