"""The process that runs a function of the user. It reads calls from its standard input and writes results.

It runs as a script, so it imports nothing of the package. A frame is four bytes with the length, and JSON. What the
function prints goes to standard error: the standard output of this process belongs to the frames.
"""

import json
import os
import runpy
import sys
import threading
import time
from typing import Any, BinaryIO

LONGEST = 2000
"""Most characters of a text that goes back."""


def plain(value: Any) -> Any:
    """A value as JSON can carry it: truth values, numbers, texts, and lists of them. Anything else becomes
    `{"type": NAME}`."""
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)[:LONGEST]
    if isinstance(value, tuple | list) and 0 < len(value) <= 3:
        return [plain(value[0]), *(str(one)[:LONGEST] for one in value[1:])]
    return {"type": type(value).__name__}


def text_of(error: BaseException) -> str:
    """The text of an exception, also of one that has no readable text."""
    try:
        return str(error)[:200]
    except BaseException:
        return "its text cannot be read"


def read(file: BinaryIO) -> Any:
    """The next frame; None at the end."""
    head = file.read(4)
    if len(head) < 4:
        return None
    return json.loads(file.read(int.from_bytes(head, "big")))


def frame(value: Any) -> bytes:
    """A value as a frame."""
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


def _loaded(file: str, name: str) -> tuple[Any, dict[str, Any]]:
    """The function, and what is said about it."""
    try:
        names = runpy.run_path(file)
    except OSError as error:
        return None, {"unread": error.strerror}
    except BaseException as error:
        return None, {"failed": f"{type(error).__name__}: {text_of(error)}"}
    if not callable(names.get(name)):
        return None, {"missing": name}
    return names[name], {"ready": True}


def _called(function: Any, values: list[Any]) -> bytes:
    try:
        return frame({"value": plain(function(*values))})
    except BaseException as error:
        return frame({"raised": type(error).__name__, "text": text_of(error)})


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone, also in the middle of a call."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def main() -> None:
    """Loads the function that the first frame names, and calls it with the values of every further frame."""
    # The function gets neither of the two pipes: it could read a call, or write what looks like a result.
    inlet = os.fdopen(os.dup(0), "rb")
    outlet = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    first = read(inlet)
    sys.path[:] = first["path"]
    function, said = _loaded(first["file"], first["name"])
    reply = frame(said)
    while True:
        outlet.write(reply)
        outlet.flush()
        values = read(inlet)
        if values is None:
            return
        reply = _called(function, values)


if __name__ == "__main__":
    main()
