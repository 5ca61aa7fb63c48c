"""Questions for the chain model of `decoding`, and a dict that is a retriever.

The model goes on from the last letter of its prompt along `abé漢字😀cdefgh` and ends there; behind any other letter it
repeats that letter until the limit. So a question that ends in `e` is answered with `fgh`, and one that ends in `z`
with `zzzz...`, which is long and so has a low probability. With a passage the model goes on from the last letter of the
passage.
"""

from reference.decoding import chain_model

from mtp_jax.eval.retrieval.asking import Asking
from mtp_jax.eval.task_file import Question

HOW = Asking(
    max_new_tokens=8,
    closed="{question}",
    opened="{question}{passages}",
    verdict="{question}{answer}",
    samples=2,
    temperature=8.0,
)
KNOWN = [(f"{i} e", "fgh") for i in range(6)]
"""Right without passages; the passage misleads."""
UNKNOWN = [(f"{i} z", "gh") for i in range(6)]
"""Wrong without passages; right with them."""
LOST = [(f"{i} y", "nothing") for i in range(2)]
"""Wrong either way."""
PASSAGES = {question: ["is", "g"] for question, _ in KNOWN} | {question: ["so f"] for question, _ in (*UNKNOWN, *LOST)}
QUESTIONS = [
    Question(number, question, {"question": question, "answer": answer})
    for number, (question, answer) in enumerate((*KNOWN, *UNKNOWN, *LOST), start=1)
]


def model():
    """The model; kept, so that its programs are made once."""
    return chain_model()
