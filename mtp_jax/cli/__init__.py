"""The command `mtp`: one file per command, argument parsing and printing only."""

import importlib
import keyword
import sys

from mtp_jax.errors import UserError
from mtp_jax.runs.threads import enough_threads

COMMANDS = {
    "quickstart": "decode with a real checkpoint, train a small model, write a report",
    "accelerate": "train heads that draft for a model, on the model's own answers",
    "train": "train a config, or continue where its workdir stopped",
    "rl": "reinforce a model with rewards for its responses, or continue where its workdir stopped",
    "generate": "generate text from a trained model",
    "chat": "hold a conversation in the terminal",
    "eval": "measure loss by head, bits per byte, and acceptance by depth",
    "compare": "compare methods that spend more compute at inference: votes, choices, revisions, by tokens",
    "retrieve": "answer questions with and without passages, and measure when to look them up",
    "formats": "count in which formats models answer, and how often each format is right",
    "prune": "shorten chains of reasoning by the tokens that a model misses least",
    "patches": "cut text into patches by the entropies of a byte model, and show them",
    "import": "make a model directory from a Hugging Face checkpoint, with new heads if you want some",
    "export": "write a model as a Hugging Face directory",
    "compile": "say whether a config fits on devices that you do not have: memory, operations, traffic",
    "bench": "measure decoding, the loss or the training step, and compare with the least possible time",
}


def main() -> None:
    """Entry point. Exits 0 on success, 2 with one line on bad input, 130 on an interrupt."""
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Runs one command line and returns the exit status."""
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(_usage())
            return 0 if argv else 2
        if argv[0] == "--version":
            from mtp_jax import __version__

            print(f"mtp_jax {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise UserError(f"there is no command {argv[0]!r}; choose one of {', '.join(COMMANDS)} (mtp --help)")
        enough_threads()
        module = f"mtp_jax.cli.{argv[0]}" + "_" * keyword.iskeyword(argv[0])
        importlib.import_module(module).main(argv[1:])
    except UserError as error:
        print(f"mtp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mtp: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`mtp ... | head`). Without the next line, Python would fail again at exit,
        # when it flushes standard output.
        sys.stdout = None
        return 141
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return f"usage: mtp COMMAND ...\n\n{rows}\n\nmtp COMMAND --help shows a command's options."
