"""Reads from the text of a compiled program how many bytes it sends between devices.

XLA prints the optimised program as computations, one instruction per line. A collective inside loops counts once per
iteration. The count is the least number of bytes that a device must send, with n devices in a group:

    all-gather          result * (n-1)/n         every device passes on all parts but one
    reduce-scatter      result * (n-1)
    all-reduce          result * 2 (n-1)/n       a reduce-scatter, then an all-gather
    all-to-all          result * (n-1)/n
    collective-permute  result
"""

import collections
import math
import re
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16} | {
    **dict.fromkeys(("f32", "s32", "u32"), 32),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 64),
    **dict.fromkeys(("f8e4m3fn", "f8e5m2", "f8e4m3", "f8e4m3b11fnuz", "f8e4m3fnuz", "f8e5m2fnuz"), 8),
    "c128": 128,
}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.-]+) = (.*?[\]})]) ([\w-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes."""


class Sent(NamedTuple):
    """Traffic of one kind of collective in one run of the program."""

    count: int
    bytes: int
    """Bytes that each device sends."""


def read(text: str, devices: int) -> tuple[dict[str, Sent], int]:
    """Reads the collectives of a program.

    Args:
      text: `jax.stages.Compiled.as_text()`.
      devices: number of devices of the program. Collectives without groups run on all of them.

    Returns:
      The traffic by kind of collective, and the number of loops of unknown length that contain collectives. Such a loop
      counts as one iteration.
    """
    computations, entry = _parse(text)
    counts = collections.Counter()
    sent = collections.Counter()
    unknown = set()
    seen = set()

    def walk(name: str, times: int, scattered: bool, loops: tuple[str, ...]) -> None:
        for line in computations[name]:
            kind = line.opcode.removesuffix("-start")
            if kind in KINDS:
                # XLA may split a collective over several computations, which share a chain id. It counts once.
                chain = re.search(r'chain_id="(\w+)"', line.rest)
                if chain and (chain[1], line.opcode) in seen:
                    continue
                seen.add((chain[1], line.opcode) if chain else line.name)
                kind, size = _sends(kind, line, devices, scattered)
                counts[kind] += times
                sent[kind] += times * size
                unknown.update(loops)
            if line.opcode == "while":
                body, condition = (re.search(rf"{part}=%?([\w.-]+)", line.rest)[1] for part in ("body", "condition"))
                turns = _turns(line, computations, name, condition)
                walk(body, times * (turns or 1), False, loops if turns else (*loops, line.name))
                continue
            for inner in _inner(line):
                walk(inner, times, inner.startswith("all-reduce-scatter"), loops)

    walk(entry, 1, False, ())
    return {kind: Sent(counts[kind], round(sent[kind])) for kind in KINDS if counts[kind]}, len(unknown)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation, and the name of the entry computation."""
    computations = {}
    entry = ""
    current = None
    for line in text.splitlines():
        if not line.startswith(" "):
            head = _COMPUTATION.match(line)
            if head:
                current = computations.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
            continue
        found = _INSTRUCTION.match(line.strip())
        if found and current is not None:
            current.append(Instruction(*found.groups()))
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY")
    return computations, entry


def _inner(line: Instruction) -> list[str]:
    """Computations that an instruction calls, without the scalar functions of collectives and reductions."""
    if line.opcode not in ("fusion", "call", "conditional", "async-start"):
        return []
    branches = _BRANCHES.search(line.rest)
    names = re.findall(r"%?([\w.-]+)", branches[1]) if branches else []
    return names + _CALLED.findall(line.rest)


def _sends(kind: str, line: Instruction, devices: int, scattered: bool) -> tuple[str, float]:
    """The kind and the bytes of one collective. `scattered` marks a reduce-scatter that a TPU program writes as an
    all-reduce and a slice."""
    n = _group(line.rest, devices)
    size = _bytes(line.shape)
    if line.opcode.endswith("-start") and line.shape.startswith("("):
        # The shape is ((operands), (results), ...). The results of a gather have n times the size of its operands;
        # those of a permutation have the same size.
        size = size * n / (n + 1) if kind == "all-gather" else size / 2
    if kind == "all-reduce" and scattered:
        return "reduce-scatter", size * (n - 1) / n
    if kind == "collective-permute":
        return kind, size
    return kind, size * {"all-reduce": 2 / n, "reduce-scatter": 1}.get(kind, 1 / n) * (n - 1)


def _bytes(shape: str) -> int:
    """Bytes of the arrays in a shape. Scalars next to arrays are counters, and do not count."""
    arrays = [(kind, dims) for kind, dims in _ARRAY.findall(shape) if kind in BITS]
    large = [pair for pair in arrays if pair[1]] or arrays
    return sum(BITS[kind] * math.prod(map(int, filter(None, dims.split(",")))) for kind, dims in large) // 8


def _group(rest: str, devices: int) -> int:
    """Number of devices in one group of a collective."""
    found = re.search(r"replica_groups=(\{\{[\d,]*\}|\[[\d,]+\]|mesh\[[^\]]*\]\s*\{[^}]*\})", rest)
    if found is None:
        return devices
    groups = found[1]
    if groups.startswith("mesh"):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", groups))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", groups[groups.index("{") :]))
    numbers = re.findall(r"\d+", groups)
    return len(numbers) if groups.startswith("{") else int(numbers[-1])


def _turns(loop: Instruction, computations: dict[str, list[Instruction]], name: str, condition: str) -> int | None:
    """Number of iterations of a loop; None if it is not known. XLA gives it, or it follows from the condition
    `counter < constant` and a constant start of the counter."""
    known = re.search(r'known_trip_count[^0-9]*"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    lines = {line.name: line for line in computations[condition]}
    root = computations[condition][-1]
    if root.opcode == "fusion":  # the comparison is inside another computation, which is not read here
        return None
    operands = re.findall(r"%([\w.-]+)", root.rest.split(")")[0])
    if root.opcode != "compare" or "direction=LT" not in root.rest or len(operands) != 2:
        return None
    end = _constant(lines[operands[1]])
    index = re.search(r"index=(\d+)", lines[operands[0]].rest)
    start = _start(loop, computations[name], int(index[1])) if index else None
    return None if end is None or start is None else max(end - start, 0)


def _start(loop: Instruction, around: list[Instruction], index: int) -> int | None:
    """The constant at which the counter of a loop starts; None if it is not a constant."""
    lines = {line.name: line for line in around}
    state = lines.get(re.search(r"%([\w.-]+)", loop.rest)[1])
    if state is None or state.opcode != "tuple":
        return None
    first = lines.get(re.findall(r"%([\w.-]+)", state.rest.split(")")[0])[index])
    while first is not None and first.opcode == "copy":
        first = lines.get(re.search(r"%([\w.-]+)", first.rest)[1])
    return None if first is None else _constant(first)


def _constant(line: Instruction) -> int | None:
    value = re.match(r"(-?\d+)\)", line.rest)
    return int(value[1]) if line.opcode == "constant" and value else None
