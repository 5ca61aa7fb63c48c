"""Does an uncertainty gate save retrievals? Questions about Python's standard library, on a small model.

    python benchmarks/retrieval.py [--source smollm2] [--questions 200] [--samples 4] [--workdir runs/retrieval]

The corpus and the questions come from the docstrings of the standard library that runs the script. The corpus has a
text file per module: a paragraph with the first lines of the documentation of every public function and class. A
question is the beginning of a sentence that ends with the module of one of them: a model of this size goes on with a
sentence better than it follows an instruction. Only names that a single module has, and that are not the name of a
module, are asked for. An answer is right if it has the name of the module. `mtp retrieve` answers and measures; its
answers are kept, so a run that was stopped goes on.
"""

import argparse
import importlib
import inspect
import json
import pathlib
import random
import warnings
from collections.abc import Iterator

import jax
from reporting import RESULTS, Report

from mtp_jax.cli.retrieve import COLUMNS, Args, cells, measure

MODULES = (
    "argparse asyncio base64 bisect calendar collections contextlib copy csv ctypes dataclasses datetime decimal "
    "difflib email.utils enum fractions functools glob gzip hashlib heapq html http.client importlib inspect io "
    "itertools json logging math mimetypes multiprocessing operator os os.path pathlib pickle platform pprint queue "
    "random re secrets select shlex shutil signal socket sqlite3 ssl statistics string struct subprocess sys tarfile "
    "tempfile textwrap threading time timeit traceback types typing unicodedata unittest unittest.mock urllib.parse "
    "urllib.request uuid warnings weakref xml.etree.ElementTree zipfile zlib "
)
PER_MODULE = 6
"""Most questions with one module as their answer."""
DOC_WORDS = 40
"""Most words of the documentation of a name."""


def public(module_name: str) -> Iterator[tuple[str, str, str]]:
    """Kind, name and documentation of the functions and classes that a module makes public and documents."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(module_name)
        listed = module.__all__ if hasattr(module, "__all__") else ()
        for name in sorted(set(listed) | set(dir(module))):
            value = getattr(module, name)
            is_own = name in listed or str(getattr(value, "__module__", "")).lstrip("_") == module_name
            doc = inspect.getdoc(value) if callable(value) and is_own else None
            if doc and not name.startswith("_"):
                kind = "class" if inspect.isclass(value) else "function"
                yield kind, name, " ".join(doc.split()[:DOC_WORDS])


def build(directory: pathlib.Path, count: int, seed: int) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the corpus and the questions.

    Returns:
      The directory of the corpus, and the file of the questions.
    """
    known = {module: list(public(module)) for module in MODULES.split()}
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    homes: dict[str, list[tuple[str, str]]] = {}
    for module, entries in known.items():
        paragraphs = [f"The {kind} {name} of the module {module}: {doc}" for kind, name, doc in entries]
        (corpus / f"{module}.txt").write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
        for kind, name, _ in entries:
            homes.setdefault(name.lower(), []).append((kind, f"{module}.{name}"))
    parts = {part for module in MODULES.split() for part in module.lower().split(".")}
    names = [name for name, found in sorted(homes.items()) if len(found) == 1 and len(name) > 3 and name not in parts]
    random.Random(seed).shuffle(names)
    asked: dict[str, list[str]] = {}
    for name in names:
        asked.setdefault(homes[name][0][1].rpartition(".")[0], []).append(name)
    # Few names of each module, so that no module is a good guess.
    drawn = [name for own in asked.values() for name in own[:PER_MODULE]]
    random.Random(seed).shuffle(drawn)
    task = directory / "questions.jsonl"
    with task.open("w", encoding="utf-8") as file:
        for [(kind, path)] in map(homes.get, drawn[:count]):
            module, _, name = path.rpartition(".")
            text = f"In Python, the {kind} `{name}` is in the module"
            file.write(json.dumps({"question": text, "answer": module}) + "\n")
    return corpus, task


def main() -> None:
    """Builds, measures and publishes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--passages", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/retrieval"))
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    corpus, task = build(args.workdir, args.questions, args.seed)
    asked = Args(
        source=args.source,
        task=str(task),
        corpus=str(corpus),
        passages=args.passages,
        passage_words=60,
        samples=args.samples,
        max_new_tokens=args.max_new_tokens,
        closed="{question}",
        opened="{passages}\n\n{question}",
        verdict="Sentence: {question}{answer}\nIs the sentence True or False?\nAnswer:",
        stop=("\n",),
        seed=args.seed,
        output=str(args.workdir),
    )
    measured, _ = measure(asked)
    rows = [cells(measured, row) for row in measured.rows]
    files = len(list(corpus.iterdir()))
    note = (
        f"`{args.source}`, {args.questions} beginnings of sentences that end with the module of a name, as plain text: "
        f"{measured.train} for fitting, {measured.test} for the table. {args.passages} passage per question, of {files}"
        " files. Right: the answer has the name of the module. Costs are per question. Intervals are by bootstrap over "
        "questions; a star marks a difference whose interval does not hold 0."
    )
    Report("When to retrieve", COLUMNS, rows, note).publish(args.results, jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
