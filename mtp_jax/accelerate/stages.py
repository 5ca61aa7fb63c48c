"""The stages of `mtp accelerate`, one after the other. A stage is skipped if its result is already complete."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.accelerate import endpoint, plan
from mtp_jax.accelerate.answers import make_answers
from mtp_jax.accelerate.batches import Record, Say, read_records, write_records
from mtp_jax.accelerate.overlap import Excluded, read_excluded
from mtp_jax.accelerate.plan import HeadTraining, Plan
from mtp_jax.accelerate.prompts import (
    LEAST,
    USER_TOKENS,
    engine_prompt,
    fitting,
    library_texts,
    make_prompts,
    read_prompts,
    shuffled,
    text_of,
)
from mtp_jax.config import (
    FACTS,
    Config,
    DecodeConfig,
    HeadsConfig,
    LossConfig,
    MeshConfig,
    override,
)
from mtp_jax.convert import fetch
from mtp_jax.convert.starting import run_of, start_from
from mtp_jax.data.conversations import FINISHED
from mtp_jax.data.loader import prepare
from mtp_jax.decode.generate import generate
from mtp_jax.errors import UserError
from mtp_jax.eval.by_kind import Result, measure
from mtp_jax.loading import LoadedModel, is_run, load
from mtp_jax.model import mtp
from mtp_jax.runs.integrity import write_atomically
from mtp_jax.runs.workdir import claim
from mtp_jax.training.budget import steps_within
from mtp_jax.training.console import RunConsole
from mtp_jax.training.loop import TrainResult, train
from mtp_jax.training.start import config_of

SHARES = {"text": 0.45, "training": 0.45, "measurement": 0.1}
"""Share of the minutes that each stage may take."""
LEAST_PROMPTS = 64
MEASURED_TOKENS = 16
MEASURED_ROWS = 64
PROMPTS = "prompts.jsonl"
TEXT = "text.jsonl"
"""File of the text that the heads learn from."""
RESULTS = ("prompts", PROMPTS, "answers", TEXT, "heads", "figures.json")
"""Files and directories that the stages write into the workdir."""
NEW_TOKENS = 128
"""Number of tokens that are generated for a held-out prompt."""


class Outcome(NamedTuple):
    """The result of `accelerate`: it finished, or was stopped during training."""

    heads: pathlib.Path
    """Workdir of the run with the model and its heads; `mtp generate` takes it."""
    training: TrainResult
    results: list[Result] | None
    """Figures on held-out prompts; None if training was stopped."""


def accelerate(source: str, workdir: pathlib.Path, settings: HeadTraining, say: Say) -> Outcome:
    """Trains heads that draft for a model, and measures them. A run that was stopped continues.

    Args:
      source: the model, as `load` takes it.
      workdir: directory for all results.
      settings: the settings of the run.
      say: is called with a line of text about the progress.

    Raises:
      UserError: the source has no tokenizer, the workdir belongs to another run, or a stage refuses its input.
    """
    before = plan.read_plan(workdir)
    if before is not None:
        before = plan.changed(before, source, settings, workdir, _changeable(workdir))
    elif found := [name for name in RESULTS if (workdir / name).exists()]:
        raise UserError(f"{workdir} holds {found[0]} but no {plan.FILE}, so it is no run of ours; use another WORKDIR")
    excluded = read_excluded(settings.exclude)  # here, so that a bad file is refused before any work
    with claim(workdir):
        trunk = _trunk(source, workdir, say)
        heads_config(trunk, workdir / TEXT, settings)  # here, so that bad settings are refused before any work
        now = plan.write_plan(workdir, before or Plan(source, settings))
        lm = load(trunk, notify=say)
        if lm.tokenizer is None:
            raise UserError(f"{source} has no tokenizer, which training on text needs; give a model that has one")
        prompts, heldout, now = _prompts(lm, workdir, now, excluded, say)
        _answers(lm, workdir, now, prompts, excluded.and_of(map(text_of, heldout)), say)
        del lm
        config, now = _config(trunk, workdir, now, say)
        heads = workdir / "heads"
        with RunConsole() as console:
            training = train(config, heads, console)
        if not training.finished:
            return Outcome(heads, training, None)
        return Outcome(heads, training, _measured(heads, workdir, heldout, say))


def _changeable(workdir: pathlib.Path) -> set[str]:
    """Names of the settings that no result depends on yet."""
    if not (workdir / PROMPTS).is_file() and not (workdir / "prompts").exists():
        return {"prompts", "num_prompts", "exclude", "heldout", "endpoint"}
    return set() if (workdir / TEXT).is_file() else {"endpoint"}


def _trunk(source: str, workdir: pathlib.Path, say: Say) -> pathlib.Path:
    """The source as a run. A checkpoint that is not a run is imported into the workdir."""
    if fetch.is_named(source):
        return run_of(source, say)
    if is_run(pathlib.Path(source)):
        config_of(source, "SOURCE")
        return pathlib.Path(source)
    trunk = workdir / "trunk"
    if not (trunk / "config.json").is_file():
        from mtp_jax.convert.importer import import_model

        import_model(source, trunk, notify=say)
    return trunk


# Prompts and answers.


def _prompts(
    lm: LoadedModel, workdir: pathlib.Path, now: Plan, excluded: Excluded, say: Say
) -> tuple[list[Record], list[Record], Plan]:
    """The prompts to answer, the held-out prompts for the measurement, and the plan."""
    asked = now.settings
    path = workdir / PROMPTS
    if now.num_prompts is None:
        count = asked.num_prompts
        if not count and not asked.prompts:
            count = max(LEAST_PROMPTS, int(SHARES["text"] * 60 * asked.minutes / _seconds_per_prompt(lm, asked, say)))
            say(f"{count:,} prompts fit into {SHARES['text'] * asked.minutes:.3g} minutes")
        now = plan.write_plan(workdir, dataclasses.replace(now, num_prompts=count))
    if not path.is_file():
        if asked.prompts:
            found = read_prompts(asked.prompts, getattr(lm.tokenizer, "chat", None) is not None)
            # A file may be sorted by kind, and the first ones are held out.
            found = shuffled([one for one in found if not excluded.is_close(text_of(one))], asked.seed)
            found = fitting(lm, found[: now.num_prompts or len(found)], say)
        else:
            made = make_prompts(lm, now.num_prompts, asked.seed, workdir / "prompts", excluded, say)
            found = fitting(lm, made, say)
        if len(found) < LEAST:
            raise UserError(f"{len(found)} prompts are left, and {LEAST} are needed; give more, or exclude less")
        write_records(path, found)
    found = read_records(path)
    held = min(asked.heldout, max(1, len(found) // 4))
    return found[held:], found[:held], now


def _seconds_per_prompt(lm: LoadedModel, asked: HeadTraining, say: Say) -> float:
    """Measured seconds to make one prompt and its answer."""
    say("measuring how fast this machine generates text ...")
    ids = lm.tokenizer.encode_prompt("The") or [0]
    made = [
        generate(lm, [ids] * MEASURED_ROWS, max_new_tokens=MEASURED_TOKENS, draft="none", ignore_eos=True)
        for _ in range(2)
    ][1]
    per_token = (made.stats.prefill_seconds + made.stats.decode_seconds) / made.stats.emitted
    return per_token * (asked.answer_tokens + USER_TOKENS)


def _answers(
    lm: LoadedModel, workdir: pathlib.Path, now: Plan, prompts: list[Record], excluded: Excluded, say: Say
) -> None:
    """Writes the text that the heads learn from: the answers, and texts of the standard library."""
    path = workdir / TEXT
    asked = now.settings
    if path.is_file():
        return
    make = (lambda *args: endpoint.make_answers(asked.endpoint, *args)) if asked.endpoint else make_answers
    tokens = min(asked.answer_tokens, lm.config.model.max_seq_len // 2)
    answers = make(lm, prompts, tokens, asked.seed, workdir / "answers", say)
    finished = sum(answer[FINISHED] for answer in answers)
    tokens = sum(answer["tokens"] for answer in answers)
    say(f"{len(answers):,} answers, {tokens:,} tokens; {finished:,} are finished, the others were cut off")
    if len(answers) < 2:
        raise UserError(f"only {len(answers)} prompts have an answer, and at least 2 are needed; give more prompts")
    said = sum(len(_answer(one)) for one in answers)
    texts = library_texts(round(asked.library * said), asked.seed, excluded) if asked.library else []
    write_records(path, answers + texts)


def _answer(record: Record) -> str:
    return record["completion"] if "completion" in record else record["messages"][-1]["content"]


# Heads.


def heads_config(trunk: pathlib.Path, text: pathlib.Path, asked: HeadTraining) -> Config:
    """The config of the training run of the heads. Its number of steps is set later."""
    model = config_of(trunk, "SOURCE").model
    vocab = min(asked.draft_vocab, model.vocab_size // 4)
    # `start_from` keeps the sections of the source. Heads, loss and mesh start from the defaults instead.
    heads = _fresh(HeadsConfig, kind=asked.kind, num_future=asked.num_future, draft_vocab=vocab)
    facts = FACTS[asked.kind]
    if facts.chains_tokens:
        heads |= {"tap": model.num_layers, "norm": "own", "init": "random", "attention": asked.attention}
    kept = not facts.in_trunk
    train = {"trainable": "heads", "keep_states": kept, "batch_size": asked.batch_size, "checkpoint_every": 100}
    return start_from(
        trunk,
        heads=heads,
        loss=_fresh(LossConfig, distil="kl" if asked.targets == "soft" else "none"),
        mesh=_fresh(MeshConfig),
        decode={"num_draft": DecodeConfig.num_draft},
        data={
            "source": str(text.absolute()),
            "seq_len": min(asked.seq_len, model.max_seq_len),
            "text_field": "text",
            "prompt_tokens": 0,
        },
        optim={"name": "muon", "learning_rate": 3e-3, "warmup_steps": 20, "schedule": "linear", "final_fraction": 0.05},
        train=train | {"seed": asked.seed},
    )


def _fresh(section: type, **fields: Any) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(section)} | fields


def _config(trunk: pathlib.Path, workdir: pathlib.Path, now: Plan, say: Say) -> tuple[Config, Plan]:
    """The config of the heads' run with its number of steps, which is measured once, and the plan."""
    asked = now.settings
    config = heads_config(trunk, workdir / TEXT, now.settings)
    if now.steps is None:
        steps = asked.steps
        if not steps:
            seconds = SHARES["training"] * 60 * asked.minutes
            say(f"measuring how many steps fit into {seconds / 60:.3g} minutes ...")
            began = time.monotonic()
            corpus = prepare(config, workdir / "heads" / "data")
            seconds -= time.monotonic() - began
            if config.train.keep_states:
                seconds -= _seconds_of_states(trunk, config, len(corpus.train))
            steps = steps_within(config, workdir / "heads", seconds)
        now = plan.write_plan(workdir, dataclasses.replace(now, steps=steps))
    warmup = min(config.optim.warmup_steps, now.steps // 4)
    return override(config, {"train.steps": now.steps, "optim.warmup_steps": warmup}), now


def _seconds_of_states(trunk: pathlib.Path, config: Config, rows: int) -> float:
    """Seconds to run the model over this many rows, estimated from one batch."""
    params = load(trunk, notify=lambda _: None).stacked_params()
    shape = (config.train.batch_size, config.data.seq_len)
    tokens_BT = jnp.zeros(shape, jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    run = jax.jit(lambda params, *rows: mtp.trunk_states(config.arch, params, *rows))
    jax.block_until_ready(run(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))
    began = time.monotonic()
    jax.block_until_ready(run(params, tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))
    return (time.monotonic() - began) * -(-rows // config.train.batch_size)


# Figures.


def _measured(heads: pathlib.Path, workdir: pathlib.Path, heldout: list[Record], say: Say) -> list[Result]:
    path = workdir / "figures.json"
    if path.is_file():
        return [Result.of_json(one) for one in json.loads(path.read_text(encoding="utf-8"))]
    lm = load(heads, notify=say, decode_only=True)
    tokens = min(NEW_TOKENS, lm.config.model.max_seq_len // 2)
    results = measure(lm, by_kind(heldout), max_new_tokens=tokens, timed_runs=1, progress=say)
    write_atomically(path, json.dumps([one.as_json() for one in results], indent=1) + "\n")
    return results


def by_kind(prompts: list[Record]) -> Mapping[str, list[Any]]:
    """Prompts by kind, in the form that `generate` takes."""
    found: dict[str, list[Any]] = {}
    for prompt in prompts:
        found.setdefault(prompt["kind"], []).append(engine_prompt(prompt))
    return dict(sorted(found.items()))
