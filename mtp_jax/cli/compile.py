"""`mtp compile CONFIG.py --topology v5e:16x16 [--section.field VALUE ...]`: does a config fit on these devices?

You can ask this before you rent them.
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mtp_jax.aot import programs, topology
from mtp_jax.aot.report import Report, report
from mtp_jax.cli.common import parse_run, print_json
from mtp_jax.config import Config
from mtp_jax.cost.flops import step_flops
from mtp_jax.cost.hardware import Chip, chip
from mtp_jax.errors import UserError
from mtp_jax.model.mtp import count_params
from mtp_jax.runs.progress import say
from mtp_jax.sharding import mesh_of

DESCRIPTION = (
    "Compile the train step and the decode round of CONFIG.py for devices that you do not have, and say what the "
    "programs need; with a section rl, the update step and the rollout round of mtp rl. Nothing runs and no parameter "
    "is made. Any field of the config can be overridden by its dotted path. Usage: mtp compile CONFIG.py --topology "
    "v5e:16x16 [--program train|decode|both] [--json] [--section.field VALUE ...]"
)
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Args(Config):
    """A run's config, and the devices to compile it for."""

    topology: str = ""
    """Devices to compile for: a slice of TPUs (v5e:16x16, v5p:4x4x4, v6e:8x8), or CPUs (cpu:8)."""
    program: Literal["both", "train", "decode"] = "both"
    """Which program to compile."""
    decode_rows: int = 0
    """Number of prompts that are decoded together; 0 takes decode.num_prompts."""
    decode_tokens: int = 0
    """Length of the caches: tokens of prompt and output; 0 takes decode.prompt_tokens + decode.max_new_tokens."""
    json: bool = False
    """Print one JSON object instead of tables."""


def main(argv: list[str]) -> None:
    """Compiles and reports. Exits with 0 whether the programs fit or not; the output says which."""
    path, args, config = parse_run(Args, argv, "mtp compile", DESCRIPTION)
    _check_sizes(args, config)
    if not args.topology:
        raise UserError(f"mtp compile needs --topology, such as {topology.EXAMPLES}")
    topology.prepare(args.topology)
    devices = topology.devices(args.topology)
    mesh = mesh_of(config, devices)
    reports = [_compile(config, mesh, args, which) for which in ("train", "decode") if args.program in ("both", which)]
    facts = {
        "config": pathlib.Path(path).name,
        "topology": args.topology,
        "devices": mesh.size,
        "topology_devices": len(devices),
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "parameters": count_params(config.arch, token_order=config.has_token_order),
    }
    if args.json:
        print_json(_json(config, facts, reports))
        return
    _print(config, facts, reports, chip(mesh.devices.flat[0].device_kind))


def _check_sizes(args: Args, config: Config) -> None:
    for name in ("decode_rows", "decode_tokens"):
        value = getattr(args, name)
        option = f"--{name.replace('_', '-')}"
        if value < 0:
            raise UserError(f"{option} is {value}; it must be at least 0")
        if value and config.rl.task:
            raise UserError(
                f"{option} {value} has no effect with rl.task={config.rl.task!r}: its rollouts are rl.prompts * "
                "rl.samples rows of data.seq_len tokens; leave it out"
            )


def _compile(config: Config, mesh: Any, args: Args, which: str) -> Report:
    say(f"compiling the {_name(config, which)} for {args.topology}; minutes for a large model")
    if config.rl.task:
        program = (programs.update_step if which == "train" else programs.rollout_round)(config, mesh)
    elif which == "train":
        program = programs.train_step(config, mesh)
    else:
        settings = config.decode
        tokens = args.decode_tokens or settings.prompt_tokens + settings.max_new_tokens
        if tokens > config.model.max_seq_len:
            raise UserError(f"--decode-tokens {tokens} is above model.max_seq_len={config.model.max_seq_len}")
        program = programs.decode_round(config, mesh, args.decode_rows or settings.num_prompts, tokens)
    return report(config, mesh, program, programs.compile_program(program))


def _name(config: Config, which: str) -> str:
    """The name of a program."""
    names = ("update step", "rollout round") if config.rl.task else ("train step", "decode round")
    return names[which == "decode"]


def _json(config: Config, facts: dict[str, Any], reports: list[Report]) -> dict[str, Any]:
    """The keys of the first program at the top level; those of the decode or rollout round (also) under `decode`."""
    result = facts | reports[0].as_json() | {"fits": all(one.fits for one in reports)}
    if reports[0].name == "update step":
        result |= {"train_fits": reports[0].fits}
    if reports[0].name == "train step":
        result |= {"train_fits": reports[0].fits, "model_flops": _model_flops(config)}
    if reports[-1].name in programs.ROUNDS:
        result["decode"] = reports[-1].as_json()
    return result


def _model_flops(config: Config) -> float:
    return step_flops(config, config.train.batch_size, config.data.seq_len)


LESS = "to need less memory, raise mesh.fsdp, mesh.tensor or train.grad_accum, or set model.remat"
FEWER = "to need less memory, raise mesh.tensor, or lower rl.prompts, rl.samples or data.seq_len"


def _print(config: Config, facts: dict[str, Any], reports: list[Report], figures: Chip | None) -> None:
    width = None if sys.stdout.isatty() else 120  # a file gets the same line length whatever the terminal is
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, width=width)
    mesh = " x ".join(f"{name} {size}" for name, size in facts["mesh"].items()) or "one device"
    console.print(
        f"{facts['config']}: {facts['parameters'] / 1e6:,.1f} million parameters on {facts['topology']}, "
        f"devices: {facts['devices']}, mesh: {mesh}"
    )
    there = facts["topology_devices"]
    if facts["devices"] < there:
        idle = there - facts["devices"]
        console.print(f"the mesh leaves {idle} of {there} devices idle; --mesh.fsdp -1 uses all of them")
    for one in reports:
        table = Table(show_header=False, box=None, padding=(0, 2))
        tokens = config.train.batch_size * config.data.seq_len if one.name == "train step" else 0
        for row in _rows(config, one, figures, facts["devices"], tokens):
            table.add_row(*row)
        console.print(f"\n[bold]{one.name}[/bold]")
        console.print(table)
    for one in reports:
        console.print(f"\n{_verdict(one)}", end="")
    console.print()


def _rows(config: Config, one: Report, figures: Chip | None, devices: int, tokens: int) -> list[tuple[str, str]]:
    memory = one.memory
    rows = [(kind, _size(size)) for kind, size in memory.arguments.items()]
    rows += [("training state", _size(memory.beside_bytes))] if memory.beside_bytes else []
    kept = memory.kept_bytes
    whole = memory.temp_bytes
    if whole is not None and 0 < kept < whole:
        rows += [("activations", _size(kept)), ("temporaries", _size(whole - kept))]
    else:
        rows += [("temporaries", _size(whole))]
        rows += [("activations", f"at most {_size(kept).strip()} of them")] if kept else []
    if memory.total is not None:
        padding = max(memory.argument_bytes - sum(memory.arguments.values()), 0)
        rows += [
            ("padding", _size(padding)),
            ("results", _size(memory.output_bytes)),
            ("program", _size(memory.code_bytes)),
        ]
    rows += [("per device", f"{_size(memory.total)} of {memory.hbm_bytes / GIB:.2f} GiB")]
    rows += [("operations", f"{one.flops:.3e}, {one.flops / devices:.3e} per device")]
    if tokens:
        rows += [("the model's", f"{_model_flops(config):.3e} of them")]
    for kind, sent in (one.sent or {}).items():
        rows += [(kind, f"{_size(sent.bytes)} sent per device in {sent.count}")]
    roofline = one.roofline
    if roofline is not None:
        shown = [f"{1e3 * getattr(roofline, name):.2f} ms {name}" for name in ("compute", "memory", "network")]
        rows += [("roofline", f"{', '.join(shown)} ({figures.name})")]
        rows += [("at best", f"{1e3 * roofline.seconds:.2f} ms; {1e3 * roofline.apart:.2f} ms without overlap")]
        if tokens:
            rate = tokens / roofline.seconds
            peak = figures.bf16_flops * devices
            mfu = _model_flops(config) / roofline.seconds / peak
            rows += [("that is", f"{rate:,.0f} tokens/s, {mfu:.1%} MFU")]
    rows += [("compiled in", f"{one.compile_seconds:.0f} s")]
    if one.open_loops:
        rows += [("note", f"{one.open_loops} loops have no fixed length; each was counted as one iteration")]
    return rows


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / GIB:9.3f} GiB" if count >= GIB / 100 else f"{count / 2**20:9.3f} MiB"


def _verdict(one: Report) -> str:
    if one.fits:
        return f"the {one.name} fits"
    remedy = FEWER if one.name == programs.ROLLOUT else LESS
    if one.error:
        return f"the {one.name} does NOT fit: {one.error}; {remedy}"
    over = one.memory.total - one.memory.hbm_bytes
    return f"the {one.name} does NOT fit: {over / GIB:.2f} GiB too much on every device; {remedy}"
