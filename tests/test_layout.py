"""Who may import whom, and what `import mtp_jax` must not cost."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from mtp_jax import axes
from mtp_jax.config import FACTS
from mtp_jax.model.heads import FAMILIES

ROOT = pathlib.Path(__file__).parents[1] / "mtp_jax"
MODULES = sorted(ROOT.rglob("*.py"))

# Package-internal imports that each part may make; `errors` is open to all. An edge that is not here needs a reason in
# the commit that adds it.
ALLOWED = {
    "__init__": {
        "accelerate",
        "config",
        "convert",
        "decode",
        "eval",
        "loading",
        "rl",
        "runs",
        "training",
    },  # names only, imported at first use
    "__main__": {"cli"},
    "errors": set(),
    "axes": set(),
    "trees": set(),
    "config": set(),
    "kernels": {"axes"},
    "model": {"axes", "config", "kernels"},
    "losses": {"axes"},
    "sharding": {"axes", "config"},
    "runs": {"axes", "config", "trees"},
    "cost": {"config"},
    "data": {"axes", "config", "runs"},  # runs: files that are written whole or not at all
    "training": {"axes", "config", "cost", "data", "losses", "model", "runs", "sharding", "trees"},
    "decode": {"config", "model", "runs", "sharding"},  # runs: a bound on the programs that are kept
    # training: what a run started from, and where training starts from an import
    "convert": {"config", "data", "model", "runs", "sharding", "training", "trees"},
    "loading": {"config", "convert", "data", "model", "runs", "sharding"},
    "eval": {"config", "data", "decode", "loading", "losses", "model", "runs", "sharding", "training"},
    # convert: the tokenizer of the run that reinforcement starts from
    "rl": {
        *("axes", "config", "convert", "data", "decode", "eval", "loading", "losses", "model", "runs", "sharding"),
        *("training", "trees"),
    },
    "bench": {"config", "cost", "data", "decode", "eval", "loading", "losses", "model", "runs", "sharding", "training"},
    # rl: its update step is a program of a run, too
    "aot": {"axes", "config", "cost", "decode", "model", "rl", "sharding", "training"},
    "accelerate": {"config", "convert", "data", "decode", "eval", "loading", "model", "runs", "training"},
    "cli": {
        *("accelerate", "aot", "bench", "config", "convert", "cost", "data", "decode", "eval", "loading", "model"),
        *("rl", "runs", "sharding", "training"),
    },
}


def part_of(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: pathlib.Path) -> set[str]:
    """Parts of mtp_jax that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("mtp_jax.")} - {"errors", "__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_table(path):
    """imports(file) is a subset of ALLOWED[part] plus the part itself. Fails on any new cross-edge."""
    part = part_of(path)
    assert imported_parts(path) <= ALLOWED[part] | {part}


OF_FAMILIES = {"config/heads.py", *(f"model/heads/{path.name}" for path in (ROOT / "model" / "heads").iterdir())}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_asks_for_a_family_by_name(path):
    """What a family is stands in its row of `config.heads.FACTS`: no file but those of families compares `kind` with a
    name. Fails on `heads.kind == "masks"` anywhere else."""
    compared = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Compare)
        and any(isinstance(part, ast.Constant) and part.value in FACTS for part in ast.walk(node))
        and "kind" in ast.unparse(node)
    ]
    assert not compared or str(path.relative_to(ROOT)) in OF_FAMILIES


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_part_knows_the_decoder_lm(path):
    """What is asked of the next-token model goes through `model.trunk`: no file outside `model/` imports `model.lm`.
    Fails on `from mtp_jax.model import lm` in the engine."""
    names = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    known = any(f"{name}.".startswith("mtp_jax.model.lm.") for name in names)
    assert not known or part_of(path) == "model"


def test_every_family_has_a_row_and_functions():
    """The rows of facts and the modules with functions have the same names, in one order."""
    assert list(FACTS) == list(FAMILIES)


@pytest.mark.parametrize("part", ["sampling", "verify"])
def test_accept_rule_and_sampling_are_arrays_in_arrays_out(part):
    """decode/sampling and decode/verify import nothing of the package."""
    assert imported_parts(ROOT / "decode" / f"{part}.py") == set()


def test_git_ignores_no_file_of_the_package():
    """A wheel holds what git does not ignore: a pattern such as `runs/` would leave a part of the package out."""
    if not (ROOT.parent / ".git").exists():
        pytest.skip("no git checkout")
    files = [str(path.relative_to(ROOT.parent)) for path in ROOT.rglob("*") if path.suffix in (".py", ".safetensors")]
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, input="\n".join(files), capture_output=True, text=True, cwd=ROOT.parent)
    assert ignored.stdout == ""


def test_names_of_test_files_are_unique():
    """No two files of tests have one name: pytest imports them by it, and refuses the second when both are collected.

    Fails with a second `test_adapters.py`, which passes as long as each is run alone.
    """
    names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_import_is_light():
    """import mtp_jax loads none of the slow packages; delete the lazy `__getattr__` and it does."""
    heavy = ["torch", "transformers", "grain", "orbax", "tokenizers", "matplotlib", "tyro", "optax"]
    code = f"import sys, mtp_jax; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_public_names_resolve():
    """Every name in __all__ is importable and documented."""
    import mtp_jax

    undocumented = [name for name in mtp_jax.__all__ if not getattr(mtp_jax, name).__doc__]
    assert undocumented == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mtp_jax.nonsense


def test_no_public_name_is_shadowed_by_a_module():
    """Importing every module leaves every public name what it was: a module `x.py` would replace a function `x`."""
    import mtp_jax

    modules = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert not modules & set(mtp_jax.__all__)


LEGEND = set(re.findall(r"^\| ([A-Za-z](?:, [A-Za-z])*) +\|", axes.__doc__, flags=re.M))
LETTERS = {letter for entry in LEGEND for letter in entry.split(", ")}
SUFFIX = re.compile(r"^_?[a-z][a-z0-9_]*?_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)$")


def shape_of(name: str) -> str:
    """The shape at the end of a name, or nothing."""
    match = SUFFIX.match(name)
    return match.group(1) if match else ""


def names_in(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Attribute):
            yield node.attr


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_suffixes_are_of_the_glossary(path):
    """Every axis letter at the end of an array's name stands in `axes.py`. Breaks with a letter that is not there."""
    shapes = {name: shape_of(name) for name in names_in(ast.parse(path.read_text()))}
    unknown = {name for name, shape in shapes.items() if set(shape) - LETTERS - set("0123456789")}
    assert not unknown


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_products_agree_with_the_names_around_them(path):
    """The letters of an einsum are the suffixes of its operands and of what it is assigned to. Breaks with another
    letter on either side."""
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        call = node.value if isinstance(node, ast.Assign) else node
        if not isinstance(call, ast.Call) or not call.args or not isinstance(call.args[0], ast.Constant):
            continue
        letters = re.fullmatch(r"([A-Za-z1,]+)->([A-Za-z1]*)", str(call.args[0].value))
        if not letters:
            continue
        given = zip(letters.group(1).split(","), call.args[1:], strict=True)
        found = [(part, operand.id) for part, operand in given if isinstance(operand, ast.Name)]
        found += [(letters.group(2), target.id) for target in targets if isinstance(target, ast.Name)]
        wrong += [(part, name) for part, name in found if shape_of(name) and shape_of(name) != part]
    assert not wrong
