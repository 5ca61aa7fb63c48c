"""Links in the documentation lead to what is there. Sphinx, which CI runs, checks the rest."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if not {"_build", "copied"} & set(page.parts)]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"`((?:mtp_jax|tests|configs|benchmarks|notebooks|docs)/[\w/]+\.\w+)`")
DOCS_PATH = re.compile(r"\bdocs/[\w/]+\.(?:md|py)\b")


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What the headings of a page can be linked by, in the repository and on the site alike."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page):
    """Every link without a scheme is a file, and its anchor a heading of that file. Rename a page, and this fails."""
    wrong = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_paths_of_pages_exist():
    """Every `docs/...` that a page, a message or a config names is a file. Rename docs/cluster.md, and this fails."""
    code = [*ROOT.glob("mtp_jax/**/*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("benchmarks/*.py")]
    named = {(path, name) for path in (*PAGES, *code) for name in DOCS_PATH.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 20
    assert [(str(path), name) for path, name in named if not (ROOT / name).is_file()] == []


def test_files_that_pages_name_exist():
    """A file of the repository that a page names is there. Move `mtp_jax/axes.py`, and this fails."""
    named = {(page.name, name) for page in PAGES for name in FILE.findall(page.read_text(encoding="utf-8"))}
    assert len(named) > 20
    made = {"NAME", "_build"}
    gone = [pair for pair in named if not (ROOT / pair[1]).is_file() and not made & set(re.split(r"[/.]", pair[1]))]
    assert gone == []


def test_every_page_is_in_the_contents():
    """Every page of the site stands in a table of contents, so that a reader can find it."""
    trees = re.compile(r"^```\{toctree\}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    listed = {ROOT / "docs" / "index.md"}
    for page in PAGES:
        for tree in trees.findall(page.read_text(encoding="utf-8")):
            names = [re.sub(r".*<(.*)>", r"\1", line) for line in tree.splitlines() if line and line[0] != ":"]
            listed |= {page.parent / f"{name}.md" for name in names}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} <= listed
