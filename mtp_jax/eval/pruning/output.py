"""What pruning leaves behind: the order of deletion, training text, and ranks as weights of tokens.

    order.jsonl                a line per token: chain, token_position, token_text, deleted_step, category
    train.jsonl                the question, the pruned chain and the answer, as `mtp train` reads them
    ranks.npy                  the ids of the whole texts, one after the other
    ranks.weights.npy          the weight of each id as a target
    ranks.documents.npy        the number of the text that each id belongs to
    page.html                  the chains, coloured by step

The weight of a token of the chain is its rank, step / (steps + 1), and 1 if it was never deleted. Tokens of the answer,
and the end token behind it, have weight 1, and tokens of the question 0.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtp_jax.data.extras import DOCUMENTS, WEIGHTS, extra_file
from mtp_jax.data.sources import replacing
from mtp_jax.eval.pruning.chains import Chain
from mtp_jax.eval.pruning.greedy import Pruned
from mtp_jax.eval.pruning.kinds import kind_of
from mtp_jax.eval.pruning.page import write_page
from mtp_jax.runs.integrity import write_atomically

Results = Sequence[tuple[Chain, Pruned]]


def write_results(directory: pathlib.Path, results: Results, end_id: int | None, title: str) -> dict[str, str]:
    """Writes all files.

    Args:
      directory: an existing directory.
      results: the chains and their deletions.
      end_id: the token that ends a document; None leaves it out.
      title: heading of the page.

    Returns:
      The paths by what they hold: `order`, `train`, `ranks` and `page`.
    """
    paths = {
        "order": directory / "order.jsonl",
        "train": directory / "train.jsonl",
        "ranks": directory / "ranks.npy",
        "page": directory / "page.html",
    }
    _write_lines(paths["order"], (line for number, one in enumerate(results) for line in order_lines(number, *one)))
    _write_lines(paths["train"], (training_record(*one) for one in results))
    _write_ranks(paths["ranks"], results, end_id)
    write_page(paths["page"], title, results)
    return {name: str(path) for name, path in paths.items()}


def order_lines(number: int, chain: Chain, pruned: Pruned) -> list[dict[str, Any]]:
    """A record per token of a chain. `deleted_step` counts from 1, and is None for a token that was kept.

    Args:
      number: number of the chain, from 0 on.
      chain: the chain.
      pruned: its deletions.
    """
    return [
        {
            "chain": number,
            "token_position": position,
            "token_text": piece,
            "deleted_step": int(step) or None,
            "category": kind_of(piece),
        }
        for position, (piece, step) in enumerate(zip(chain.pieces, pruned.step, strict=True))
    ]


def training_record(chain: Chain, pruned: Pruned) -> dict[str, Any]:
    """The record with the pruned chain: a conversation if the question was one, and otherwise a prompt with its
    completion.

    The text is encoded again in training. Tokens that deletion made neighbours may then be read as one token.
    """
    text = chain.text(pruned.keep) + chain.answer_text
    if chain.messages is None:
        return {"prompt": chain.prompt_text, "completion": text}
    return {"messages": [*chain.messages, {"role": "assistant", "content": text}]}


def weighted_ids(chain: Chain, pruned: Pruned, end_id: int | None) -> tuple[list[int], list[float]]:
    """The ids of the whole text, and the weight of each as a target."""
    end = [] if end_id is None else [end_id]
    ids = [*chain.ids.prompt, *chain.ids.chain, *chain.ids.answer, *end]
    behind = len(chain.ids.answer) + len(end)
    return ids, [0.0] * len(chain.ids.prompt) + pruned.ranks.tolist() + [1.0] * behind


def _write_ranks(path: pathlib.Path, results: Results, end_id: int | None) -> None:
    parts = [weighted_ids(*one, end_id) for one in results]
    arrays = {
        path: np.array([token for ids, _ in parts for token in ids], np.int32),
        extra_file(path, WEIGHTS): np.array([weight for _, weights in parts for weight in weights], np.float32),
        extra_file(path, DOCUMENTS): np.repeat(np.arange(len(parts)), [len(ids) for ids, _ in parts]).astype(np.int32),
    }
    for file, array in arrays.items():
        with replacing(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, array)


def _write_lines(path: pathlib.Path, records: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))
