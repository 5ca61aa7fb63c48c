"""Prompts to answer: from a file, or made here.

Made here they are of four kinds. An instruct model writes what a user may say when it is given the beginning of a
user's message alone (Magpie, Xu et al. 2024, arXiv:2406.08464, section 2): so come `chat` and `mathematics`, the latter
behind the first words of a problem. `code` is the head of a function of Python's standard library, `prose` the
beginning of a documentation text in it; the model goes on with those. A model without a chat template gets the last two
only.
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
"""Prompts that are needed: one is held out, and training holds out another."""
SHARES = {"chat": 0.4, "mathematics": 0.2, "code": 0.3, "prose": 0.1}
"""Of the prompts that are made here, by kind."""
WRITTEN = ("chat", "mathematics")
"""Kinds that the model writes."""
BATCH = 64
SPARE = 1.4
"""Messages that the model is made to write per prompt that is wanted; some are no use."""
USER_TOKENS = 80
"""Most tokens of a message that the model writes; longer ones are cut off and left out."""
SAMPLING = {"temperature": 1.0, "top_k": 64}
BEGINNINGS = (
    *("A farmer has", "A baker makes", "A train leaves", "Anna has", "Ben buys", "Carla reads", "A shop sells"),
    *("In a class of", "Daniel runs", "A box holds", "Emma earns", "A bus carries", "Felix saves", "A tank is filled"),
    *("Grace plants", "Each week Henry", "Ivy bakes", "A team scores", "If a worker", "Jack drives", "A rope is"),
)
"""First words of problems of mathematics."""
SPREAD = 5
"""Beginnings that are read per one that is taken, so that they come from many files."""
CODE_LINES = 14
FUNCTION_LINES = 40
PAGE_CHARACTERS = 1500
PROSE_CHARACTERS = (160, 400)


def read_prompts(path: str, has_template: bool) -> list[Record]:
    """Prompts of a file: records with `messages`, or with `prompt`, a text to go on with; or a text, one prompt a line.

    Args:
      path: a `.jsonl`, or a text file. A line of a text is what a user says where the model has a chat template.
      has_template: whether it has.

    Raises:
      UserError: no such file, none in it, or a record of another form.
    """
    file = pathlib.Path(path).expanduser()
    if file.suffix == ".json":
        raise UserError(f"--prompts {path}: give a .jsonl, one record a line, or a text file, one prompt a line")
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
        raise UserError(f"{where}: field 'prompt' is no Unicode text: {error}") from error
    raise UserError(f"{where} has neither 'messages' nor a text 'prompt'; give one of them")


def _user(kind: str, text: str) -> Record:
    return {"kind": kind, "messages": [{"role": "user", "content": text}]}


def _text(kind: str, text: str) -> Record:
    return {"kind": kind, "text": text}


def text_of(prompt: Record) -> str:
    """What a prompt says, without its template."""
    return prompt["text"] if "text" in prompt else "\n".join(one.get("content") or "" for one in prompt["messages"])


def engine_prompt(prompt: Record) -> Any:
    """A prompt as `generate` takes it."""
    return prompt["text"] if "text" in prompt else prompt["messages"]


def num_tokens(lm: LoadedModel, prompt: Record) -> int:
    """Tokens of a prompt as the model reads it; 0 where its tokenizer knows nothing in it."""
    if "text" in prompt:
        return len(lm.tokenizer.encode_prompt(prompt["text"]))
    return len(lm.tokenizer.encode_chat(prompt["messages"]))


def fitting(lm: LoadedModel, prompts: list[Record], say: Say) -> list[Record]:
    """Prompts of at least one token that fill at most half of the model's length: the rest is for the answer."""
    longest = lm.config.model.max_seq_len // 2
    found = [prompt for prompt in prompts if 1 <= _counted(lm, prompt) <= longest]
    if skipped := len(prompts) - len(found):
        say(f"{skipped} of {len(prompts)} prompts have no token, or more than {longest}, and are left out")
    return found


def _counted(lm: LoadedModel, prompt: Record) -> int:
    try:
        return num_tokens(lm, prompt)
    except UserError as error:
        raise UserError(f"prompt {text_of(prompt)[:60]!r}: {error}") from error


def make_prompts(
    lm: LoadedModel, count: int, seed: int, folder: pathlib.Path, excluded: Excluded, say: Say
) -> list[Record]:
    """Prompts of all kinds that suit the model, mixed; fewer than `count` where too few were of use.

    Args:
      lm: the model.
      count: prompts wanted.
      seed: of what is drawn.
      folder: where batches of written messages are kept.
      excluded: texts that none may come close to.
      say: is told of progress.
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
    """What stands before a user's message; "" where the model cannot be made to write one."""
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
    """In an order of their own, which does not hang on the order in which they were found."""
    return sorted(records, key=lambda one: hashlib.blake2b(f"{seed}\0{text_of(one)}".encode()).digest())


def _distinct(prompts: list[Record], excluded: Excluded) -> list[Record]:
    """Each text once, and none that is close to an excluded one."""
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
            continue  # the library holds files that are broken on purpose


def _code(seed: int) -> Iterator[Record]:
    """Heads of functions: the signature and the documentation."""
    for source, tree in _sources(seed):
        lines = source.splitlines()
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not ast.get_docstring(node) or len(node.body) < 2:
                continue
            head = lines[node.lineno - 1 : node.body[0].end_lineno]
            if len(head) <= CODE_LINES and len(same_text("\n".join(head)).split()) >= 10:
                yield _text("code", textwrap.dedent("\n".join(head)) + "\n")


def _prose(seed: int) -> Iterator[Record]:
    """Beginnings of documentation, cut behind a word."""
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
    """Functions with their bodies, and pages of Python's documentation, half of the characters each.

    Reading a text costs far less than writing one, so it adds variety to the answers; the heads learn what the model
    expects at every place of it.

    Args:
      characters: of all texts together.
      seed: of the choice.
      excluded: texts that none may come close to.
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
