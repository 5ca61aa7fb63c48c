"""Prompts for the model: read from a file, or made here.

The prompts made here have four kinds:

- `chat`: an instruct model writes what a user may say, if its input ends at the beginning of a user's message (Magpie,
  Xu et al. 2024, arXiv:2406.08464, section 2).
- `mathematics`: the same, but the first words of a mathematical problem are given.
- `code`: the signature and docstring of a function of Python's standard library. The model continues it.
- `prose`: the beginning of a documentation text of Python's standard library. The model continues it.

A model without a chat template gets only `code` and `prose`.
"""

import ast
import hashlib
import itertools
import json
import pathlib
import random
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from mtp_jax.accelerate.batches import Record, Say, read_records, run_batches
from mtp_jax.accelerate.overlap import Excluded, same_text
from mtp_jax.data.chat import check_messages
from mtp_jax.data.sources import STDLIB, list_files
from mtp_jax.decode.generate import generate
from mtp_jax.errors import UserError
from mtp_jax.loading import LoadedModel

LEAST = 3
"""The fewest prompts that work: one is held out for the measurement, and training holds out another."""
SHARES = {"chat": 0.4, "mathematics": 0.2, "code": 0.3, "prose": 0.1}
"""Share of each kind in the prompts that are made here."""
WRITTEN = ("chat", "mathematics")
"""Kinds that the model writes."""
BATCH = 64
SPARE = 1.4
"""The model writes this many messages per wanted prompt, because some cannot be used."""
USER_TOKENS = 80
"""Most tokens of a message that the model writes. A longer message is cut off and not used."""
SAMPLING = {"temperature": 1.0, "top_k": 64}
BEGINNINGS = (
    *("A farmer has", "A baker makes", "A train leaves", "Anna has", "Ben buys", "Carla reads", "A shop sells"),
    *("In a class of", "Daniel runs", "A box holds", "Emma earns", "A bus carries", "Felix saves", "A tank is filled"),
    *("Grace plants", "Each week Henry", "Ivy bakes", "A team scores", "If a worker", "Jack drives", "A rope is"),
)
"""First words of mathematical problems."""
SPREAD = 5
"""This many beginnings are read per one that is used, so that they come from many files."""
CODE_LINES = 14
FUNCTION_LINES = 40
PAGE_CHARACTERS = 1500
PROSE_CHARACTERS = (160, 400)


def read_prompts(path: str, has_template: bool) -> list[Record]:
    """Reads prompts from a file.

    Args:
      path: a `.jsonl` file of records with `messages`, or with `prompt` (a text to continue); or a text file with one
        prompt per line. If the model has a chat template, a line of a text file is a message of the user.
      has_template: whether the model has a chat template.

    Raises:
      UserError: the file does not exist, holds too few prompts, or holds a record of another form.
    """
    file = pathlib.Path(path).expanduser()
    if file.suffix == ".json":
        raise UserError(f"--prompts {path}: give a .jsonl with one record per line, or a text with one prompt per line")
    if file.suffix == ".jsonl":
        found = [_given(record, f"{path}, record {i}") for i, record in enumerate(read_records(file), start=1)]
    else:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts {path} cannot be read: {error}; give a .jsonl or a text file") from error
        found = [_user("given", line) if has_template else _text("given", line) for line in lines if line]
    found = list({json.dumps(one, sort_keys=True): one for one in found}.values())
    if len(found) < LEAST:
        raise UserError(f"--prompts {path} holds {len(found)} different prompts; at least {LEAST} are needed")
    return found


def _given(record: Record, where: str) -> Record:
    kind = record.get("kind", "given")
    if not isinstance(kind, str):
        raise UserError(f"{where}: field 'kind' is {kind!r}; it must be a text")
    text = record.get("prompt")
    try:
        if "messages" in record:
            check_messages(record["messages"])
            return {"kind": kind, "messages": record["messages"]}
        if isinstance(text, str) and text and text.encode():
            return _text(kind, text)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field 'prompt' is not Unicode text: {error}") from error
    raise UserError(f"{where} has neither 'messages' nor a text 'prompt'; give one of them")


def _user(kind: str, text: str) -> Record:
    return {"kind": kind, "messages": [{"role": "user", "content": text}]}


def _text(kind: str, text: str) -> Record:
    return {"kind": kind, "text": text}


def text_of(prompt: Record) -> str:
    """The text of a prompt, without the chat template."""
    return prompt["text"] if "text" in prompt else "\n".join(one.get("content") or "" for one in prompt["messages"])


def engine_prompt(prompt: Record) -> Any:
    """A prompt in the form that `generate` takes."""
    return prompt["text"] if "text" in prompt else prompt["messages"]


def num_tokens(lm: LoadedModel, prompt: Record) -> int:
    """Number of tokens of a prompt, chat template included; 0 if the tokenizer has no token for it."""
    if "text" in prompt:
        return len(lm.tokenizer.encode_prompt(prompt["text"]))
    return len(lm.tokenizer.encode_chat(prompt["messages"]))


def fitting(lm: LoadedModel, prompts: list[Record], say: Say) -> list[Record]:
    """The prompts that have at least one token and at most half of the model's length. The answer gets the other
    half."""
    longest = lm.config.model.max_seq_len // 2
    found = [prompt for prompt in prompts if 1 <= _counted(lm, prompt) <= longest]
    if skipped := len(prompts) - len(found):
        say(f"{skipped} of {len(prompts)} prompts have no token, or more than {longest} tokens, and are left out")
    return found


def _counted(lm: LoadedModel, prompt: Record) -> int:
    try:
        return num_tokens(lm, prompt)
    except UserError as error:
        raise UserError(f"prompt {text_of(prompt)[:60]!r}: {error}") from error


def make_prompts(
    lm: LoadedModel, count: int, seed: int, folder: pathlib.Path, excluded: Excluded, say: Say
) -> list[Record]:
    """Makes prompts of all kinds that suit the model, in mixed order. It can be fewer than `count`.

    Args:
      lm: the model.
      count: number of wanted prompts.
      seed: seed of everything that is random.
      folder: directory for the batches of messages that the model writes.
      excluded: texts that no prompt may overlap with.
      say: is called with a line of text about the progress.
    """
    opening = _opening(lm, say)
    shares = {kind: share for kind, share in SHARES.items() if kind not in WRITTEN or opening}
    wanted = {kind: round(count * share / sum(shares.values())) for kind, share in shares.items()}
    makers = {"code": _code, "prose": _prose}
    found = []
    for kind, number in wanted.items():
        if kind in WRITTEN:
            made = _written(lm, opening, kind, number, seed, folder / kind, say)
        else:
            made = shuffled(list(itertools.islice(makers[kind](seed), SPREAD * number)), seed)
        found += _distinct(made, excluded)[:number]
    say(f"{len(found):,} prompts: {_counts(found)}")
    return shuffled(found, seed)


def _opening(lm: LoadedModel, say: Say) -> str:
    """The text that a chat template puts before a user's message; "" if the model cannot write user messages."""
    if getattr(lm.tokenizer, "chat", None) is None:
        return ""
    try:
        return lm.tokenizer.chat.opening()
    except UserError as error:
        say(f"the model cannot write prompts: {error}")
        return ""


def _counts(prompts: list[Record]) -> str:
    kinds = [prompt["kind"] for prompt in prompts]
    return ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))


def shuffled(records: list[Record], seed: int) -> list[Record]:
    """The records in a random order that depends only on the seed and the texts, not on the order of the input."""
    return sorted(records, key=lambda one: hashlib.blake2b(f"{seed}\0{text_of(one)}".encode()).digest())


def _distinct(prompts: list[Record], excluded: Excluded) -> list[Record]:
    """The prompts without duplicates, and without those that overlap with an excluded text."""
    found = {}
    for prompt in prompts:
        text = text_of(prompt)
        if not excluded.is_close(text):
            found.setdefault(same_text(text) or text, prompt)
    return list(found.values())


# Messages that the model writes.


def _written(
    lm: LoadedModel, opening: str, kind: str, wanted: int, seed: int, folder: pathlib.Path, say: Say
) -> list[Record]:
    batches = -(-round(wanted * SPARE) // BATCH)

    def make(number: int) -> list[Record]:
        draw = random.Random(f"{seed} {kind} {number}")
        begun = [draw.choice(BEGINNINGS) if kind == "mathematics" else "" for _ in range(BATCH)]
        ids = [lm.tokenizer.encode_rendered(opening + words) for words in begun]
        seeds = [seed * 1_000_003 + number * BATCH + i for i in range(BATCH)]
        made = generate(lm, ids, max_new_tokens=USER_TOKENS, draft="none", seed=seeds, **SAMPLING)
        texts = [words + text for words, text in zip(begun, made.text, strict=True)]
        ended = [reason == "eos" for reason in made.finish_reason]
        return [{"text": text.strip(), "ended": end} for text, end in zip(texts, ended, strict=True)]

    records = run_batches(folder, batches, make, f"messages, {kind}", say)
    return [_user(kind, record["text"]) for record in records if record["ended"] and _is_message(record["text"])]


def _is_message(text: str) -> bool:
    return len(text.split()) >= 4 and "\ufffd" not in text


# Beginnings from the standard library.


def _sources(seed: int) -> Iterator[tuple[str, ast.Module]]:
    files = list_files(STDLIB)
    random.Random(seed).shuffle(files)
    for file in files:
        try:
            source = file.path.read_text(encoding="utf-8")
            yield source, ast.parse(source)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # the library has some files that are broken on purpose


def _code(seed: int) -> Iterator[Record]:
    """Beginnings of functions: the signature and the docstring."""
    for source, tree in _sources(seed):
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
                continue
            head = lines[node.lineno - 1 : node.body[0].end_lineno]
            if len(head) <= CODE_LINES and len(same_text("\n".join(head)).split()) >= 10:
                yield _text("code", textwrap.dedent("\n".join(head)) + "\n")


def _prose(seed: int) -> Iterator[Record]:
    """Beginnings of documentation texts, cut after a word."""
    least, most = PROSE_CHARACTERS
    for _, tree in _sources(seed):
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
                text = " ".join(paragraph.split())
                if len(text) >= least and not re.search(r">>>|[=_{}\[\]]|--", text):
                    yield _text("prose", text[: random.Random(text).randint(least // 2, most)].rsplit(" ", 1)[0])


# Whole texts from the standard library.


def library_texts(characters: int, seed: int, excluded: Excluded) -> list[Record]:
    """Whole functions, and pages of Python's documentation. Each of the two gives half of the characters.

    These texts add variety to the answers at little cost, because the model only has to read them. The heads learn what
    the model predicts at every position of them.

    Args:
      characters: number of characters of all texts together.
      seed: seed of the choice.
      excluded: texts that these texts may not overlap with.
    """
    found = []
    for texts in (_functions(seed), _pages(seed)):
        size = 0
        for text in texts:
            if size >= characters / 2:
                break
            if not excluded.is_close(text):
                found.append({"text": text})
                size += len(text)
    return found


def _functions(seed: int) -> Iterator[str]:
    for source, tree in _sources(seed):
        lines = source.splitlines()
        taken = 0
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not 5 <= node.end_lineno - node.lineno <= FUNCTION_LINES:
                continue
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])) + "\n"
            taken += 1
            if taken == SPREAD:
                break


def _pages(seed: int) -> Iterator[str]:
    from pydoc_data.topics import topics

    names = sorted(topics)
    random.Random(seed).shuffle(names)
    for name in names:
        page = topics[name]
        for start in range(0, len(page), PAGE_CHARACTERS):
            text = page[start : start + PAGE_CHARACTERS]
            if len(text) >= PROSE_CHARACTERS[0]:
                yield text if not start else text.split(" ", 1)[-1]
