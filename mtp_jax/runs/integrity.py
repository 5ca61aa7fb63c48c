"""Files that are either complete or do not exist: atomic writes, and manifests that show damage."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator

from mtp_jax.errors import UserError

MANIFEST = "manifest.json"
WRITTEN_AT_COMMIT = ("_CHECKPOINT_METADATA", "commit_success.txt", MANIFEST)
"""Files that Orbax writes after the manifest; a restore does not depend on them."""


def check_name(path: str | os.PathLike[str], what: str) -> None:
    """Refuses a path that is not UTF-8, because the tokenizer and checkpoint libraries cannot open it.

    Raises:
      UserError: the path is not UTF-8.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(path).decode("utf-8", errors="backslashreplace")
        raise UserError(f"the name of {what} {name} is not UTF-8; use another name") from error


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Replaces the text of a file. At any moment, also after a kill, the file has either the old or the new text."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def new_directories(path: pathlib.Path) -> Iterator[None]:
    """For a `with` block that makes a directory and its parents: at its end, new directories that are empty are
    removed."""
    path = path.absolute()
    made = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        yield
    finally:
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()


@contextlib.contextmanager
def whole_directory(out: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes a new directory in a `with` block. It appears under its name when the block ends; on failure nothing stays.

    Raises:
      UserError: the directory exists already, or cannot be written.
    """
    check_name(out, "the directory")
    out = pathlib.Path(out)
    temporary = None
    with new_directories(out.parent):
        try:
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise UserError(f"{out} exists already; give a new directory, or delete it")
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
            temporary.chmod(0o755)
            yield temporary
            os.replace(temporary, out)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {short_reason(error)}; nothing was left there") from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(directory: pathlib.Path) -> None:
    """Writes a manifest with the size and CRC-32 of every file below a directory. The files are flushed first."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in WRITTEN_AT_COMMIT:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(directory))] = [path.stat().st_size, crc32(path)]
    write_atomically(directory / MANIFEST, json.dumps({"files": files}))


def damage(directory: pathlib.Path) -> str:
    """The first difference between a checkpoint and its manifest; "" if there is none."""
    manifest = directory / MANIFEST
    if not manifest.exists():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads(manifest.read_text())["files"]
        if not files:
            return f"{MANIFEST} lists no files"
        for name, (size, crc) in files.items():
            path = directory / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes of {size}"
            if crc32(path) != crc:
                return f"{name} fails its checksum"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"{MANIFEST} cannot be checked: {short_reason(error)}"
    return ""


def crc32(path: pathlib.Path, block: int = 2**20) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(block):
            crc = zlib.crc32(data, crc)
    return crc


def short_reason(error: BaseException, limit: int = 160) -> str:
    """An error as a short text without line breaks. From TensorStore's long messages it takes the system's reason."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."
