"""Sphinx builds the site from the Markdown in this folder, the notebooks, and the docstrings of the package."""

import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import mtp_jax  # noqa: E402

project = "mtp_jax"
author = "the mtp_jax authors"
copyright = author
version = release = mtp_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = False

html_theme = "sphinx_book_theme"
html_title = "mtp_jax"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "navbar_persistent": []}
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
# The language of a code block without one.
highlight_language = "none"

autodoc_typehints = "none"
autodoc_member_order = "bysource"
# `generate` shows the fields of `Options`, which its source does not spell.
autodoc_preserve_defaults = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# A single backtick in a docstring is code.
default_role = "code"

CODE = re.compile(r"(`[^`]+`)(\w?)")

FIELDS: dict[str, list[str]] = {}
"""Docstrings of fields while Napoleon is at work."""

# Files from outside this folder that are pages of the site. Git ignores the copies.
COPIED = {
    "notebooks/01_train_and_decode.ipynb": "copied/01_train_and_decode.ipynb",
    "notebooks/02_make_a_checkpoint_faster.ipynb": "copied/02_make_a_checkpoint_faster.ipynb",
    "notebooks/03_fine_tune_with_caft.ipynb": "copied/03_fine_tune_with_caft.ipynb",
    "notebooks/04_reinforce.ipynb": "copied/04_reinforce.ipynb",
    "benchmarks/RESULTS.md": "copied/RESULTS.md",
    "CHANGELOG.md": "copied/CHANGELOG.md",
}


def copy_pages() -> None:
    """Copies what changed since the last build."""
    for origin, copy in COPIED.items():
        page = HERE / copy
        page.parent.mkdir(exist_ok=True)
        if not page.is_file() or page.read_bytes() != (ROOT / origin).read_bytes():
            shutil.copyfile(ROOT / origin, page)


def link_to_copies(app, name, source) -> None:
    """A link to such a file works in the repository; on the site it leads to the page that was copied."""
    for origin, copy in COPIED.items():
        source[0] = source[0].replace(f"](../{origin})", f"]({copy})")


def keep_drawings(app, what, name, obj, options, lines) -> None:
    """An indented block behind a paragraph of a docstring is a drawing or a formula: it stays as it is typed."""
    result = []
    indented = False
    before = ""
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.strip():
            starts = indent >= 4 and not indented and not (result and result[-1].strip())
            if starts and not before.startswith(" ") and before:
                result += ["::", ""]
                indented = True
            elif indent == 0:
                indented = False
            before = line
        result.append(line if indented else CODE.sub(end_of_code, line))
    lines[:] = result


def end_of_code(match: re.Match) -> str:
    """Sphinx ends code only before a blank or a punctuation mark: `LayerCache`s needs an invisible one."""
    return f"{match[1]}\\ {match[2]}" if match[2] else match[1]


def set_aside(app, what, name, obj, options, lines) -> None:
    """Keeps the text of a field from Napoleon, which would take what stands before a colon for the type."""
    if what not in ("attribute", "property") or not lines:
        return
    # A field of a named tuple without a docstring has this line from Python.
    FIELDS[name] = [] if lines[0].startswith("Alias for field number") else list(lines)
    lines.clear()


def put_back(app, what, name, obj, options, lines) -> None:
    """Undoes `set_aside` after Napoleon."""
    if name in FIELDS:
        lines[:] = FIELDS.pop(name)


def short_signature(app, what, name, obj, options, signature, returns) -> tuple | None:
    """A section of the config lists its fields below; all of them once more in one line cannot be read."""
    return ("", None) if what == "class" and name.endswith("Config") else None


def make_tables(app, what, name, obj, options, lines) -> None:
    """A Markdown table in a docstring becomes a table of Sphinx."""
    result = []
    for line in lines:
        if not line.startswith("|"):
            result.append(line)
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if set("".join(cells)) == {"-"}:
            continue
        if not (result and result[-1].startswith("   ")):
            result += [".. list-table::", "   :header-rows: 1", ""]
        result += [f"   {'*' if number == 0 else ' '} - {cell}" for number, cell in enumerate(cells)]
    lines[:] = result


copy_pages()


def setup(app) -> None:
    """Connects the functions above. Napoleon reads docstrings at priority 500, after `keep_drawings`."""
    app.connect("source-read", link_to_copies)
    app.connect("autodoc-process-docstring", keep_drawings, priority=400)
    app.connect("autodoc-process-docstring", make_tables, priority=410)
    app.connect("autodoc-process-docstring", set_aside, priority=420)
    app.connect("autodoc-process-docstring", put_back, priority=600)
    app.connect("autodoc-process-signature", short_signature)
