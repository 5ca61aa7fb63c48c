"""`mtp chat SOURCE`: a conversation in the terminal."""

import dataclasses
import sys
from collections.abc import Iterator

from mtp_jax.cli.common import parse
from mtp_jax.cli.options import Decoding, open_model, options_of, statistics, with_best_draft
from mtp_jax.decode.conversation import Conversation, Piece
from mtp_jax.decode.generate import Generation
from mtp_jax.errors import UserError
from mtp_jax.runs.progress import say

NEW = "/new"
GREEN = "\x1b[32m"
PLAIN = "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Args(Decoding):
    """Arguments of `mtp chat`."""

    max_new_tokens: int = 512
    """Most tokens of an answer."""
    system: str = ""
    """System message, sent before the first message."""
    show_drafts: bool = False
    """Show drafted text in green. The model itself chose the rest, one token per round."""


def main(argv: list[str]) -> None:
    """Reads messages, one per line, and answers each."""
    args = parse(Args, argv, "mtp chat", "A conversation with a model that has a chat template, line by line.")
    options = options_of(args)
    lm = open_model(args)
    options = with_best_draft(args, lm, options)
    conversation = Conversation(lm, **options)
    if sys.stdin.isatty():
        say(f"Each line is a message. {NEW} starts a new conversation, Ctrl-C ends an answer, Ctrl-D ends the program.")
    for line in _lines():
        if line.strip() == NEW:
            conversation = Conversation(lm, **options)
        elif line.strip():
            _turn(conversation, line, args)


def _lines() -> Iterator[str]:
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def _turn(conversation: Conversation, line: str, args: Args) -> None:
    """Sends one message, and prints the answer while it is generated."""
    first = [{"role": "system", "content": args.system}] if args.system and not conversation.messages else []
    try:
        items = conversation.stream([*first, {"role": "user", "content": line}])
    except UserError as error:
        if not sys.stdin.isatty():
            raise
        say(f"{error}; {NEW} starts a new conversation")
        return
    result = None
    try:
        for item in items:
            if isinstance(item, Generation):
                result = item
            else:
                print(_shown(item, args.show_drafts), end="", flush=True)
    except KeyboardInterrupt:
        items.close()  # The text that was printed so far becomes the answer.
    print(flush=True)
    if result is not None:
        prompt = conversation.prompt_tokens
        reused = conversation.reused_tokens
        say(f"{statistics(result)[:-1]}; {prompt - reused} of {prompt} prompt tokens processed]")


def _shown(piece: Piece, show_drafts: bool) -> str:
    return f"{GREEN}{piece.text}{PLAIN}" if show_drafts and piece.drafted else piece.text
