"""Lines of progress for a person. They go to standard error, because standard output is for results."""

import sys


def say(line: str) -> None:
    """Prints a line on standard error."""
    print(line, file=sys.stderr, flush=True)
