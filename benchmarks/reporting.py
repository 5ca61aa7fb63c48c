"""The table of a benchmark: it is printed, and appended to RESULTS.md with command, machine, versions and date."""

import dataclasses
import datetime
import math
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata

RESULTS = str(pathlib.Path(__file__).with_name("RESULTS.md"))


@dataclasses.dataclass(frozen=True)
class Report:
    """A table with a title and a note."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """Explanation of the figures and their limits."""

    def table(self) -> str:
        """The table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def publish(self, results: str, device: str) -> None:
        """Prints the table, and appends it to a file.

        Args:
          results: path of the file; with an empty path the table is only printed.
          device: the device of the measurement, `jax.Device.device_kind`.
        """
        note = [self.note] if self.note else []
        print("", self.table(), *note, sep="\n", flush=True)
        if results:
            with open(results, "a", encoding="utf-8") as file:
                origin = "\n".join([provenance(device), *note])
                file.write(f"\n## {self.title}\n\n{origin}\n\n{self.table()}\n")


def provenance(device: str) -> str:
    """Command, hardware, versions and date, as a line of Markdown."""
    command = shlex.join(["python", *sys.argv])
    where = f"{os.cpu_count()} cores of {processor()}" + ("" if device == "cpu" else f", {device}")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("mtp_jax", "jax", "flax", "optax"))
    today = datetime.datetime.now().astimezone().date().isoformat()
    return f"`{command}`; {where}; Python {platform.python_version()}, {versions}; {today}."


def processor() -> str:
    """The name of the processor, if the system reports it."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family', '?')})"


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent p of the power law `value = c * size^p`, fitted by least squares of the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
