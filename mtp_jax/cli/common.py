"""Code that the commands share: parsing into dataclasses, reading config files, printing tables and JSON."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from mtp_jax.config import Config, ModelConfig
from mtp_jax.errors import UserError
from mtp_jax.eval.ceiling import COLUMNS as CEILING_COLUMNS
from mtp_jax.eval.page import HEAD_COLUMNS, head_rows, summary
from mtp_jax.eval.report import Evaluation
from mtp_jax.runs.strict_json import strict

T = TypeVar("T")
Run = TypeVar("Run", bound=Config)


def parse(kind: type[T], argv: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """Parses arguments into a dataclass. `--help` prints the help and exits.

    Raises:
      UserError: unknown options (the message lists similar ones), or values of the wrong type.
    """
    errors = io.StringIO()
    options = {} if default is None else {"default": default}
    # While tyro builds a config, the checks of the config raise UserError. These errors pass through here unchanged.
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=list(argv), prog=prog, description=description, **options)
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(_one_line(errors.getvalue()) or f"bad arguments; see {prog} --help") from None


def parse_over(base: Config, kind: type[Run], argv: Sequence[str], prog: str, description: str) -> tuple[Run, Config]:
    """Parses a command's own options and overrides of config fields.

    Args:
      base: the config with the values of all fields that the arguments do not set.
      kind: a subclass of `Config` that adds the command's own options.
      argv, prog, description: as for `parse`.

    Returns:
      An instance of `kind` with everything, and the config alone.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    if type(base.model) is not ModelConfig:
        # The flags of a section are its own fields.
        model = ("model", type(base.model), base.model)
        kind = dataclasses.make_dataclass(kind.__name__, [model], bases=(kind,), frozen=True)
    args = parse(kind, argv, prog, description, kind(**{name: getattr(base, name) for name in names}))
    return args, Config(**{name: getattr(args, name) for name in names})


def parse_run(kind: type[Run], argv: Sequence[str], command: str, description: str) -> tuple[str, Run, Config]:
    """Parses `COMMAND CONFIG.py [--section.field VALUE ...]`.

    Returns:
      The path of CONFIG.py, and the two results of `parse_over`.

    Raises:
      UserError: no config file, or the errors of `read_config` and `parse`.
    """
    path = argv[0] if argv and not argv[0].startswith("-") else ""
    if not path and not {"-h", "--help"} & set(argv):
        usage = f"{command} CONFIG.py [--section.field VALUE ...]"
        raise UserError(f"{command} needs a config file: {usage}; {command} --help lists the options")
    base = read_config(path) if path else Config()
    return path, *parse_over(base, kind, argv[1:] if path else argv, f"{command} CONFIG.py", description)


def check_least(args: Any, least: Mapping[str, int]) -> None:
    """Refuses options that are too small.

    Args:
      args: the parsed options.
      least: the smallest value of each option, by the name of its field.
    """
    for name, smallest in least.items():
        value = getattr(args, name)
        if value < smallest:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}")


def _one_line(boxed: str) -> str:
    """tyro's message, which has a frame and several lines, as one line."""
    # The frame is of dashes where the encoding has no lines.
    text = re.sub(r"[\u2500-\u257f]|-{8,}", " ", boxed)
    text = re.sub(r"For full helptext, (see|run):? .*", "", text)
    text = re.sub(r"Argument helptext:(.|\n)*", "", text)
    text = re.sub(r"Error parsing (?!-)\w+: ", "", text)
    text = re.sub(r"^\s*(Parsing error|Value error|Unrecognized options|Invalid choice|Missing[^\n]*)\s*\n", "", text)
    return re.sub(r"\s+", " ", text).strip()


def read_config(path: str) -> Config:
    """Runs a config file and returns its `config`.

    Raises:
      UserError: the file does not exist, fails while it runs, or defines no `config`.
    """
    if not pathlib.Path(path).is_file():
        problem = "is a directory" if pathlib.Path(path).is_dir() else "does not exist"
        raise UserError(f"config file {path} {problem}")
    try:
        names = runpy.run_path(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(names.get("config"), Config):
        raise UserError(f"{path} does not define `config = mtp_jax.Config(...)`")
    return names["config"]


def print_json(value: Any) -> None:
    """Prints one JSON object on standard output. Numbers that are not finite become null, for strict readers."""
    print(json.dumps(strict(value)))


def own_directory(source: str) -> pathlib.Path:
    """The directory for files that belong to a model, such as compiled programs.

    For a run it is the run's directory. For a Hugging Face checkpoint it is a folder in our cache: the directory of a
    checkpoint is never changed.
    """
    from mtp_jax.convert import fetch
    from mtp_jax.loading import is_run, split_step

    path, _ = split_step(source)
    if is_run(path):
        return path
    return fetch.cache() / source.strip("/.").replace("/", "--")


def figure_table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines, with bold headings."""
    table = Table(*columns, box=None, padding=(0, 2), header_style="bold")
    for row in rows:
        table.add_row(*row)
    return table


def print_evaluation(evaluation: Evaluation, facts: dict[str, str]) -> None:
    """Prints tables on standard output: the figures, one row per head, and one row per offset with marginals."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in (summary(evaluation) | facts).items():
        table.add_row(name, value)
    console.print(table)
    console.print()
    console.print(figure_table(HEAD_COLUMNS, head_rows(evaluation)))
    if evaluation.marginals:
        console.print()
        console.print(figure_table(CEILING_COLUMNS, (one.cells() for one in evaluation.marginals)))
