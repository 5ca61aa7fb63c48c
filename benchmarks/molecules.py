"""Molecules as text: what a molecule contains, pairs of such a description and a molecule, and units in its text.

A molecule is a SMILES string. Its description counts its rings and names the functional groups that it contains, each
by a short SMILES string:

    2.C(=O)N.COC>     2 rings, an amide and an ether, and none of the other groups

A model completes the description with a molecule. The check is exact: the description of a right answer is the prompt.
`rdkit` reads the molecules. The molecules are those of MOSES (Polykovskiy et al. 2020, package `molsets`, MIT).
"""

import functools
import gzip
import json
import pathlib
import re
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax.data.tokenize import Tokenizer
from mtp_jax.eval.spans import TokenSpan, to_tokens

GROUPS = {
    "C(=O)N": "[CX3](=O)[NX3]",
    "C(=O)O": "[CX3](=O)[OX2]",
    "S(=O)=O": "S(=O)(=O)",
    "C#N": "C#N",
    "COC": "[OX2;H0]([#6;!$(C=O)])[#6;!$(C=O)]",
    "CF": "[#6]F",
    "CCl": "[#6]Cl",
    "CBr": "[#6]Br",
    "csc": "s",
}
"""The functional groups of a description: how they are written, and the SMARTS pattern that finds them."""
UNITS = (
    *("C(=O)NC", "C(=O)N", "NC(=O)", "C(=O)OC", "C(=O)O", "S(=O)(=O)N", "NS(=O)(=O)", "S(=O)(=O)", "C#N", "C(F)(F)F"),
    *("OC(F)F", "c1ccccc1", "c1cccc(", "c1ccc(F)cc1", "c1ccc(Cl)cc1", "c1ccc(", "c1ccncc1", "c1cccnc1", "c1ccco1"),
    *("c1cccs1", "c1ccsc1", "c1nc(", "N1CCOCC1", "N1CCCC1", "N1CCCCC1", "C1CCCCC1", "C1CC1", "c1ccc2"),
)
"""Pieces of SMILES that are a unit of chemistry: functional groups and rings."""
_UNIT = re.compile("|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True)))
TRAINED_ON = "moses/dataset/data/train.csv.gz"


class Pair(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


class Rows(NamedTuple):
    """Pairs as token ids, one per row: first token, prompt, answer, end token, and end tokens as padding."""

    tokens_BT: np.ndarray
    answer_BT: np.ndarray
    """1 for the tokens of the answer and its end token, 0 for prompt and padding."""
    starts_B: np.ndarray
    """Index of the first token of the answer."""


@functools.cache
def _chemistry() -> tuple[Any, dict[str, Any]]:
    """The module of rdkit that reads SMILES, and the patterns of the groups."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")  # a wrong molecule is a result here, and each would be a line on standard error
    return Chem, {name: Chem.MolFromSmarts(pattern) for name, pattern in GROUPS.items()}


@functools.cache
def describe(smiles: str) -> str | None:
    """The description of a molecule; None if the text is not a valid molecule."""
    chem, patterns = _chemistry()
    molecule = chem.MolFromSmiles(smiles) if smiles else None
    if molecule is None:
        return None
    rings = molecule.GetRingInfo().NumRings()
    groups = [name for name, pattern in patterns.items() if molecule.HasSubstructMatch(pattern)]
    return ".".join([str(rings), *groups]) + ">"


def read_smiles(path: pathlib.Path) -> list[str]:
    """Molecules, in the order of the file: the training molecules in a wheel of `molsets`, or a text file with one
    molecule per line."""
    if path.suffix != ".whl":
        return path.read_text(encoding="utf-8").split()
    with zipfile.ZipFile(path) as wheel:
        lines = gzip.decompress(wheel.read(TRAINED_ON)).decode().splitlines()
    return [line.partition(",")[0] for line in lines[1:]]


def fitting(pairs: Sequence[Pair], tokenizer: Tokenizer, length: int) -> list[Pair]:
    """The pairs without those that need more than `length` tokens."""
    sides = (tokenizer.encode_documents(side) for side in zip(*pairs, strict=True))
    sizes = [len(prompt) + len(answer) - 2 for prompt, answer in zip(*sides, strict=True)]  # both have begin and end
    return [pair for pair, size in zip(pairs, sizes, strict=True) if size <= length]


def rows_of(pairs: Sequence[Pair], tokenizer: Tokenizer, length: int) -> Rows:
    """Pairs as rows of `length` tokens. Prompt and answer are tokenised apart, as in generation."""
    tokens_BT = np.full((len(pairs), length), tokenizer.eos_id, np.int32)
    answer_BT = np.zeros((len(pairs), length), np.float32)
    starts = []
    for row, pair in enumerate(pairs):
        prompt = tokenizer.encode_prompt(pair.prompt)
        ids = [*prompt, *tokenizer.encode(pair.answer), tokenizer.eos_id]
        tokens_BT[row, : len(ids)] = ids
        answer_BT[row, len(prompt) : len(ids)] = 1
        starts.append(len(prompt))
    return Rows(tokens_BT, answer_BT, np.array(starts))


def write_rows(path: pathlib.Path, rows: Rows) -> None:
    """Writes rows as a `.npy` source of a run, in which only answers are learned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".weights.npy"), rows.answer_BT)
    np.save(path, rows.tokens_BT)


def write_texts(path: pathlib.Path, texts: Iterable[str]) -> None:
    """Writes texts as a `.jsonl` source of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def units_of(answer: str, tokenizer: Tokenizer) -> list[TokenSpan]:
    """The units of a molecule that have several tokens. Indices count the tokens of the answer alone."""
    places = tokenizer.encode_placed(answer)[1][1:-1]  # without the first token and the end
    found = to_tokens(answer, [match.span() for match in _UNIT.finditer(answer)], places)
    return [unit for unit in found if unit.stop - unit.start > 1]
